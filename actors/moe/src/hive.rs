//! [`Hive`]: what a mixture remembers between calls, and its way to search and to call.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use libp2p_identity::PeerId;
use skep_dht::{DhtError, Freshness, ListedSuccessors, Successors};
use skep_kernel::{Deadline, Moment, Seed, time::before};
use skep_rpc::{Bans, RpcError};
use skep_wire::{ExpertInfo, ExpertPrefix, ExpertUid, HostTensor};
use tokio::sync::{Notify, Semaphore};
use tracing::debug;

use crate::{
    Client, GridScores, MoeConfig, MoeError,
    beam::{BeamSearch, Candidate, Grid},
    cache::{Due, PrefixCache},
    expert_call::{ExpertCall, fetch_info},
    gather::Layout,
    refresher,
};

/// Calls of one mixture under way at once; as many substreams as one connection carries.
const MAX_CALLS_IN_FLIGHT: usize = 256;
/// Prefixes and schemas that a mixture remembers, each.
const MAX_REMEMBERED: usize = 16_384;
/// What the calls of one mixture share.
pub(crate) struct Hive {
    pub client: Client,
    pub config: MoeConfig,
    pub grid: Grid,
    permits: Semaphore,
    /// Peers too slow for this mixture's deadlines, which may be good DHT nodes and good enough for other mixtures. Those
    /// that cannot be reached are in the runtime's list, which the transport keeps.
    late: Bans,
    memory: Mutex<Memory>,
    /// Tells the refresher that there is more to do, or that nobody has this any more.
    news: Arc<Notify>,
}

impl Drop for Hive {
    fn drop(&mut self) {
        self.news.notify_one();
    }
}

struct Memory {
    prefixes: PrefixCache,
    /// Somebody sees to it that prefixes in use are read again.
    refreshed: bool,
    schemas: BTreeMap<(ExpertUid, PeerId), Arc<ExpertInfo>>,
    /// What experts of this mixture answer; known once one has.
    layout: Option<Layout>,
}

/// Tensors for one expert.
pub(crate) struct Errand {
    pub uid: ExpertUid,
    pub peer: PeerId,
    pub inputs: Vec<HostTensor>,
    pub grad_outputs: Option<Vec<HostTensor>>,
}

impl Hive {
    /// Checks the configuration.
    pub fn new(client: Client, config: MoeConfig) -> Result<Self, MoeError> {
        let prefix = config.check()?;
        let grid = Grid { prefix, sizes: config.grid_size.clone(), k_best: config.k_best };
        let seed = Seed::new(client.seed).derive("prefixes").derive(&config.uid_prefix);
        let prefixes = PrefixCache::new(MAX_REMEMBERED, seed);
        let memory = Memory { prefixes, refreshed: false, schemas: BTreeMap::new(), layout: None };
        let (permits, news) = (Semaphore::new(MAX_CALLS_IN_FLIGHT), Arc::default());
        Ok(Self { client, config, grid, permits, late: Bans::new(), memory: Mutex::new(memory), news })
    }

    /// Monotonic now.
    pub fn now(&self) -> Moment {
        self.client.clock.now()
    }

    /// Candidates for `rows`, at most `k` each, best first. Banned peers are passed over as long as that leaves every row
    /// `k_min` experts; `avoid` is never chosen.
    pub async fn search(
        self: &Arc<Self>,
        scores: &Arc<GridScores>,
        rows: &[usize],
        k: usize,
        avoid: &BTreeSet<PeerId>,
        deadline: Deadline,
    ) -> Result<Vec<Vec<Candidate>>, MoeError> {
        let now = self.now();
        let mut banned = self.client.dht.bans().banned(now);
        banned.append(&mut self.late.banned(now));
        let excluded = banned.union(avoid).copied().collect();
        let mut found = self.search_without(scores, rows, k, excluded, deadline).await?;
        let needed = self.config.k_min.max(1);
        let poor: Vec<usize> = (0..rows.len()).filter(|&i| found[i].len() < needed).collect();
        if banned.is_empty() || poor.is_empty() {
            return Ok(found);
        }
        let poor_rows: Vec<usize> = poor.iter().map(|&i| rows[i]).collect();
        let again = self.search_without(scores, &poor_rows, k, avoid.clone(), deadline).await?;
        for (i, candidates) in poor.into_iter().zip(again) {
            found[i] = candidates;
        }
        Ok(found)
    }

    async fn search_without(
        self: &Arc<Self>,
        scores: &Arc<GridScores>,
        rows: &[usize],
        k: usize,
        excluded: BTreeSet<PeerId>,
        deadline: Deadline,
    ) -> Result<Vec<Vec<Candidate>>, MoeError> {
        let grid = Grid { k_best: k, ..self.grid.clone() };
        let mut search = BeamSearch::new(grid, scores.clone(), rows, excluded);
        loop {
            let wanted = search.wanted();
            if wanted.is_empty() {
                return Ok(search.finish());
            }
            let unknown = self.learn_what_is_known(&mut search, wanted);
            if unknown.is_empty() {
                continue;
            }
            let found = look_up(&self.client, unknown.clone(), Freshness::Valid, deadline).await?;
            self.remember(found);
            for prefix in self.learn_what_is_known(&mut search, unknown) {
                // So soon gone, or more than is remembered.
                search.learn(&prefix, &Successors::new());
            }
        }
    }

    /// Tells the search what is remembered and sees to it that this is read again in time; the other prefixes come back.
    fn learn_what_is_known(self: &Arc<Self>, search: &mut BeamSearch, wanted: Vec<ExpertPrefix>) -> Vec<ExpertPrefix> {
        let mut unknown = Vec::new();
        let (now, mut memory) = (self.now(), self.memory());
        let earlier = memory.prefixes.next_due();
        for prefix in wanted {
            match memory.prefixes.get(now, &prefix) {
                Some(successors) => search.learn(&prefix, &successors),
                None => unknown.push(prefix),
            }
        }
        let next = memory.prefixes.next_due();
        if next == earlier {
            return unknown;
        }
        let is_first = !std::mem::replace(&mut memory.refreshed, true);
        drop(memory);
        if !is_first {
            self.news.notify_one();
        } else if !refresher::start(self, self.news.clone()) {
            debug!(prefix = %self.grid.prefix, "the runtime stops: experts are not read again");
            self.memory().refreshed = false;
        }
        unknown
    }

    /// Remembers what was read just now.
    pub fn remember(&self, found: BTreeMap<ExpertPrefix, ListedSuccessors>) {
        let (now, wall, mut memory) = (self.now(), self.client.clock.wall(), self.memory());
        for (prefix, successors) in found {
            memory.prefixes.insert(now, wall, prefix, successors);
        }
    }

    /// What the refresher is to do next; nothing: it ends, unless it still has reads under way.
    pub fn take_due(&self, limit: usize, has_more: bool) -> Due {
        let (now, mut memory) = (self.now(), self.memory());
        let due = memory.prefixes.take_due(now, limit);
        memory.refreshed = has_more || due != Due::Nothing;
        due
    }

    /// Calls an expert and remembers how that went.
    pub async fn ask(&self, errand: Errand, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let (uid, peer) = (errand.uid.clone(), errand.peer);
        let outcome = self.ask_unremembered(errand, deadline).await;
        match &outcome {
            Ok(_) => self.late.succeeded(&peer),
            Err(RpcError::Deadline { .. }) => self.was_late(peer),
            // The expert may have come back as another one.
            Err(RpcError::Malformed { .. } | RpcError::Remote { .. } | RpcError::Invalid { .. }) => {
                self.memory().schemas.remove(&(uid, peer));
            }
            Err(_) => {}
        }
        outcome
    }

    async fn ask_unremembered(&self, errand: Errand, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let _permit = self.permits.acquire().await.map_err(|_closed| RpcError::Cancelled)?;
        let Errand { uid, peer, inputs, grad_outputs } = errand;
        let info = self.schema(&uid, peer, deadline).await?;
        let must_be_finite = self.config.detect_anomalies;
        let call = ExpertCall { uid, peer, info, inputs, grad_outputs, must_be_finite };
        call.send(&self.client, deadline).await
    }

    async fn schema(&self, uid: &ExpertUid, peer: PeerId, deadline: Deadline) -> Result<Arc<ExpertInfo>, RpcError> {
        let key = (uid.clone(), peer);
        if let Some(info) = self.memory().schemas.get(&key) {
            return Ok(info.clone());
        }
        let info = Arc::new(fetch_info(&self.client, uid, peer, deadline).await?);
        let mut memory = self.memory();
        if memory.schemas.len() >= MAX_REMEMBERED {
            memory.schemas.pop_first();
        }
        memory.schemas.insert(key, info.clone());
        Ok(info)
    }

    /// A call to this peer outlived its deadline.
    pub fn was_late(&self, peer: PeerId) {
        self.late.failed(self.now(), peer);
    }

    /// What experts answered last, if one ever did.
    pub fn last_layout(&self) -> Option<Layout> {
        self.memory().layout.clone()
    }

    /// Remembers what experts answer.
    pub fn remember_layout(&self, layout: &Layout) {
        self.memory().layout = Some(layout.clone());
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().expect("nothing panics while it holds the memory")
    }
}

/// Reads successors from the DHT.
pub(crate) async fn look_up(
    client: &Client,
    prefixes: Vec<ExpertPrefix>,
    freshness: Freshness,
    deadline: Deadline,
) -> Result<BTreeMap<ExpertPrefix, ListedSuccessors>, DhtError> {
    let lookup = client.dht.list_successors(prefixes, freshness, deadline);
    before(&*client.clock, deadline, lookup).await.map_err(|_| DhtError::Deadline)?
}
