//! [`Hive`]: what a mixture remembers between calls, and its way to search and to call.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use libp2p_identity::PeerId;
use skep_dht::{DhtError, Successors};
use skep_kernel::{Deadline, Moment, time::before};
use skep_rpc::{Bans, RpcError};
use skep_wire::{ExpertInfo, ExpertPrefix, ExpertUid, HostTensor};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::{
    Client, GridScores, MoeConfig, MoeError,
    beam::{BeamSearch, Candidate, Grid},
    cache::PrefixCache,
    expert_call::{ExpertCall, fetch_info},
    gather::Layout,
};

/// Calls of one mixture under way at once; as many substreams as one connection carries.
const MAX_CALLS_IN_FLIGHT: usize = 256;
/// Prefixes and schemas that a mixture remembers, each.
const MAX_REMEMBERED: usize = 16_384;
/// How long reading prefixes anew may take.
const REFRESH_PATIENCE: Duration = Duration::from_secs(15);

/// What the calls of one mixture share.
pub(crate) struct Hive {
    pub client: Client,
    pub config: MoeConfig,
    pub grid: Grid,
    permits: Semaphore,
    /// Peers too slow for this mixture's deadlines, which may be good DHT nodes and good enough for other mixtures. Those
    /// that cannot be reached are in the runtime's list.
    late: Bans,
    memory: Mutex<Memory>,
}

struct Memory {
    prefixes: PrefixCache,
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
        let memory = Memory { prefixes: PrefixCache::new(MAX_REMEMBERED), schemas: BTreeMap::new(), layout: None };
        let permits = Semaphore::new(MAX_CALLS_IN_FLIGHT);
        Ok(Self { client, config, grid, permits, late: Bans::new(), memory: Mutex::new(memory) })
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
            let (mut unknown, mut stale) = (Vec::new(), Vec::new());
            {
                let (now, mut memory) = (self.now(), self.memory());
                for prefix in wanted {
                    match memory.prefixes.get(now, &prefix) {
                        Some(cached) => {
                            search.learn(&prefix, &cached.successors);
                            stale.extend(cached.is_stale.then_some(prefix));
                        }
                        None => unknown.push(prefix),
                    }
                }
            }
            if !stale.is_empty() {
                self.refresh(stale);
            }
            if unknown.is_empty() {
                continue;
            }
            for (prefix, successors) in self.read(unknown, deadline).await? {
                search.learn(&prefix, &successors);
            }
        }
    }

    /// Reads successors from the DHT and remembers them.
    async fn read(
        &self,
        prefixes: Vec<ExpertPrefix>,
        deadline: Deadline,
    ) -> Result<Vec<(ExpertPrefix, Arc<Successors>)>, DhtError> {
        let lookup = self.client.dht.successors(prefixes.clone(), deadline);
        let mut table = before(&*self.client.clock, deadline, lookup).await.map_err(|_| DhtError::Deadline)??;
        let (now, mut memory) = (self.now(), self.memory());
        let found = prefixes.into_iter().map(|prefix| {
            let successors = Arc::new(table.remove(&prefix).unwrap_or_default());
            memory.prefixes.insert(now, prefix.clone(), successors.clone());
            (prefix, successors)
        });
        Ok(found.collect())
    }

    /// Reads these prefixes anew while the search goes on with what is known.
    fn refresh(self: &Arc<Self>, prefixes: Vec<ExpertPrefix>) {
        let (hive, deadline) = (self.clone(), self.client.deadline(REFRESH_PATIENCE));
        let started = self.client.spawner.spawn(async move {
            if let Err(error) = hive.read(prefixes, deadline).await {
                debug!(prefix = %hive.grid.prefix, %error, "experts are not read anew yet");
            }
        });
        if !started {
            debug!(prefix = %self.grid.prefix, "the runtime stops: experts are not read anew");
        }
    }

    /// Calls an expert and remembers how that went.
    pub async fn ask(&self, errand: Errand, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let (uid, peer) = (errand.uid.clone(), errand.peer);
        let outcome = self.ask_unremembered(errand, deadline).await;
        let unreachable = self.client.dht.bans();
        match &outcome {
            Ok(_) => {
                self.late.succeeded(&peer);
                unreachable.succeeded(&peer);
            }
            Err(RpcError::Unreachable { .. }) => unreachable.failed(self.now(), peer),
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
