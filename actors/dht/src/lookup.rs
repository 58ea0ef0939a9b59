//! Finding, declaring, withdrawing and listing experts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use skep_kernel::{Deadline, WallTime};
use skep_wire::{ExpertPrefix, ExpertUid, msgpack::Value};

use crate::{
    Dht, DhtError, DhtId, Freshness, Hosted, StoreItem, SuccessorTable, Successors,
    core::node::Outcome,
    experts::{self, Exemplar, FLAT, Place},
};

/// An expert as it is announced.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Its uid.
    pub uid: ExpertUid,
    /// Who hosts it, and until when the record holds.
    pub hosted: Hosted,
}

/// The next coordinates that exist under a prefix, each with an expert that proves it.
pub type ListedSuccessors = BTreeMap<u64, Listed>;

/// How far a listing looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListLimits {
    /// Under a bare name nothing tells which first coordinates exist: they are tried one after the other up to here.
    pub max_first_coordinate: u64,
    /// First coordinates in a row that are absent before the listing gives up.
    pub max_gap: u64,
    /// Experts listed.
    pub max_experts: usize,
}

impl Default for ListLimits {
    fn default() -> Self {
        Self { max_first_coordinate: 65_536, max_gap: 512, max_experts: 16_384 }
    }
}

impl Dht {
    /// Who hosts these experts, in order (docs/wire.md §7.2).
    pub async fn find_experts(
        &self,
        uids: Vec<ExpertUid>,
        freshness: Freshness,
        deadline: Deadline,
    ) -> Result<Vec<Option<Hosted>>, DhtError> {
        let keys = uids.iter().map(|uid| experts::key(uid.as_str())).collect();
        let found = self.get_many(keys, freshness, deadline).await?;
        Ok(found.iter().map(|stored| experts::read_host(stored.as_ref()?)).collect())
    }

    /// Next coordinates under each prefix (docs/wire.md §7.2, §7.3), all prefixes in one batched search. Entries whose
    /// peer is banned are among them: a ban may end while they are remembered. Malformed records are ignored.
    pub async fn successors(
        &self,
        prefixes: Vec<ExpertPrefix>,
        deadline: Deadline,
    ) -> Result<SuccessorTable, DhtError> {
        let listed = self.list_successors(prefixes, Freshness::Valid, deadline).await?;
        let plain = |listed: ListedSuccessors| -> Successors {
            listed.into_iter().map(|(coordinate, Listed { uid, hosted })| (coordinate, (uid, hosted.value))).collect()
        };
        Ok(listed.into_iter().map(|(prefix, listed)| (prefix, plain(listed))).collect())
    }

    /// As [`successors`](Self::successors), with how long each entry holds, for those who remember them.
    pub async fn list_successors(
        &self,
        prefixes: Vec<ExpertPrefix>,
        freshness: Freshness,
        deadline: Deadline,
    ) -> Result<BTreeMap<ExpertPrefix, ListedSuccessors>, DhtError> {
        let found = self.entries(&prefixes, freshness, deadline).await?;
        Ok(prefixes.into_iter().zip(found.into_iter().map(successors)).collect())
    }

    /// Announces experts hosted by this node until `expiration`: one store of all their records (docs/wire.md §7.2).
    /// Tells for each uid whether its record was taken.
    pub async fn declare_experts(
        &self,
        uids: Vec<ExpertUid>,
        expiration: WallTime,
        deadline: Deadline,
    ) -> Result<BTreeMap<ExpertUid, bool>, DhtError> {
        let outcomes = self.declare(&uids, expiration, deadline).await?;
        Ok(outcomes.into_iter().map(|(uid, outcome)| (uid, outcome.stored)).collect())
    }

    /// As [`declare_experts`](Self::declare_experts), with where the record went.
    pub(crate) async fn declare(
        &self,
        uids: &[ExpertUid],
        expiration: WallTime,
        deadline: Deadline,
    ) -> Result<BTreeMap<ExpertUid, Outcome>, DhtError> {
        {
            // Noted before it is done: what is abandoned half way must be withdrawn, too.
            let mut declared = self.shared.declared.lock().expect("nothing panics while it holds the list");
            declared.extend(uids.iter().map(|uid| (uid.clone(), expiration)));
        }
        let records = experts::records(uids, self.local_peer(), expiration);
        let places: BTreeMap<DhtId, usize> = records
            .keys()
            .enumerate()
            .filter(|(_, (_, entry))| entry.is_none())
            .map(|(i, (key, _))| (*key, i))
            .collect();
        let outcomes = self.put_many(records.into_values().collect(), deadline).await?;
        Ok(uids.iter().map(|uid| (uid.clone(), outcomes[places[&experts::key(uid.as_str())]])).collect())
    }

    /// Overwrites our own records of these experts so that they vanish at once (docs/wire.md §12): value `None`,
    /// expiring a millisecond after the last announcement. Records that name other peers or other experts stay. An entry
    /// that one of our remaining experts shares names that one from now on.
    pub async fn withdraw_experts(&self, uids: Vec<ExpertUid>, deadline: Deadline) -> Result<(), DhtError> {
        let (announced, remaining) = {
            let mut declared = self.shared.declared.lock().expect("nothing panics while it holds the list");
            let announced: BTreeMap<ExpertUid, WallTime> =
                uids.iter().filter_map(|uid| declared.remove_entry(uid)).collect();
            if announced.is_empty() {
                return Ok(());
            }
            (announced, declared.keys().cloned().collect::<Vec<_>>())
        };
        let heirs = experts::records(&remaining, self.local_peer(), WallTime(0.0));
        let mut tombstones = self.own_hosts(&announced, deadline).await?;
        tombstones.extend(self.own_entries(&announced, &heirs, deadline).await?);
        self.put_many(tombstones, deadline).await.map(drop)
    }

    async fn own_hosts(
        &self,
        announced: &BTreeMap<ExpertUid, WallTime>,
        deadline: Deadline,
    ) -> Result<Vec<StoreItem>, DhtError> {
        let uids = announced.keys().cloned().collect();
        let found = self.find_experts(uids, Freshness::Latest, deadline).await?;
        let tombstones = announced.iter().zip(found).filter_map(|((uid, expiration), hosted)| {
            let latest = match hosted {
                Some(hosted) if hosted.value != self.local_peer() => return None,
                Some(hosted) => later(*expiration, hosted.expiration),
                None => *expiration,
            };
            Some(experts::item((experts::key(uid.as_str()), None), &Value::Nil, just_after(latest)))
        });
        Ok(tombstones.collect())
    }

    async fn own_entries(
        &self,
        announced: &BTreeMap<ExpertUid, WallTime>,
        heirs: &BTreeMap<Place, StoreItem>,
        deadline: Deadline,
    ) -> Result<Vec<StoreItem>, DhtError> {
        let prefixes: BTreeSet<String> =
            announced.keys().flat_map(experts::entries).map(|(prefix, _)| prefix).collect();
        let prefixes: Vec<ExpertPrefix> = prefixes.iter().filter_map(|prefix| prefix.parse().ok()).collect();
        let keys = prefixes.iter().map(|prefix| experts::key(prefix.as_str())).collect();
        let found = self.get_many(keys, Freshness::Latest, deadline).await?;
        let mut tombstones = Vec::new();
        for (prefix, stored) in prefixes.iter().zip(found) {
            let Some(stored) = stored else { continue };
            for (coordinate, exemplar) in experts::read_entries(prefix.as_str(), &stored) {
                let Some(expiration) = announced.get(&exemplar.uid).filter(|_| exemplar.peer == self.local_peer())
                else {
                    continue;
                };
                let place = (experts::key(prefix.as_str()), Some(coordinate));
                let expiration = just_after(later(*expiration, exemplar.expiration));
                tombstones.push(match heirs.get(&place) {
                    Some(heir) => StoreItem { expiration, ..heir.clone() },
                    None => experts::item(place, &Value::Nil, expiration),
                });
            }
        }
        Ok(tombstones)
    }

    /// Every announced expert under a prefix, sorted by coordinates, looking breadth first through the prefix
    /// dictionaries. Caches do not count: what was withdrawn is not listed.
    ///
    /// Under a bare name (`expert.`) no dictionary exists that tells the first coordinates, so they are tried in order up
    /// to a limit and until a long gap. A prefix entry names one expert per coordinate; experts beside it are found
    /// through the deeper dictionaries.
    pub async fn experts_under(
        &self,
        prefix: &ExpertPrefix,
        limits: ListLimits,
        deadline: Deadline,
    ) -> Result<Vec<Listed>, DhtError> {
        let mut listing = Listing { limits, found: BTreeMap::new(), queue: VecDeque::new() };
        if prefix.dimensions() == 0 {
            self.probe(prefix, &mut listing, deadline).await?;
        } else {
            listing.queue.push_back(prefix.clone());
        }
        while !listing.queue.is_empty() && listing.found.len() < limits.max_experts {
            let batch: Vec<ExpertPrefix> = listing.queue.drain(..listing.queue.len().min(PREFIXES_PER_BATCH)).collect();
            let entries = self.entries(&batch, Freshness::Latest, deadline).await?;
            for (prefix, entries) in batch.iter().zip(entries) {
                listing.take(prefix, entries);
            }
        }
        let listed = listing.found.into_values().take(limits.max_experts);
        Ok(listed.collect())
    }

    /// Tries first coordinates under a bare name.
    async fn probe(&self, name: &ExpertPrefix, listing: &mut Listing, deadline: Deadline) -> Result<(), DhtError> {
        let limits = listing.limits;
        let mut last_seen = 0;
        let mut next = 0;
        while next < limits.max_first_coordinate && next <= last_seen + limits.max_gap {
            let end = limits.max_first_coordinate.min(next + PREFIXES_PER_BATCH as u64);
            let batch: Vec<ExpertPrefix> = (next..end).map(|coordinate| name.child(coordinate)).collect();
            let entries = self.entries(&batch, Freshness::Latest, deadline).await?;
            for ((coordinate, prefix), entries) in (next..end).zip(&batch).zip(entries) {
                if !entries.is_empty() {
                    last_seen = coordinate;
                    listing.take(prefix, entries);
                }
            }
            next = end;
        }
        Ok(())
    }

    /// The readable entries under each prefix, in order.
    async fn entries(
        &self,
        prefixes: &[ExpertPrefix],
        freshness: Freshness,
        deadline: Deadline,
    ) -> Result<Vec<BTreeMap<i64, Exemplar>>, DhtError> {
        let keys = prefixes.iter().map(|prefix| experts::key(prefix.as_str())).collect();
        let found = self.get_many(keys, freshness, deadline).await?;
        let entries = prefixes.iter().zip(found).map(|(prefix, stored)| match stored {
            Some(stored) => experts::read_entries(prefix.as_str(), &stored),
            None => BTreeMap::new(),
        });
        Ok(entries.collect())
    }
}

/// Prefixes that a listing looks up at once.
const PREFIXES_PER_BATCH: usize = 256;

struct Listing {
    limits: ListLimits,
    found: BTreeMap<Vec<u64>, Listed>,
    queue: VecDeque<ExpertPrefix>,
}

impl Listing {
    /// Takes in the entries under a prefix: experts at this depth are listed, deeper ones looked for.
    fn take(&mut self, prefix: &ExpertPrefix, entries: BTreeMap<i64, Exemplar>) {
        for (coordinate, exemplar) in entries {
            let is_leaf = coordinate == FLAT || exemplar.uid.dimensions() == prefix.dimensions() + 1;
            match (is_leaf, experts::child(prefix, coordinate), exemplar.uid.coordinates()) {
                (true, _, Some(place)) if self.found.len() < self.limits.max_experts => {
                    let hosted = Hosted { value: exemplar.peer, expiration: exemplar.expiration };
                    self.found.insert(place, Listed { uid: exemplar.uid, hosted });
                }
                (false, Some(child), _) if self.queue.len() < self.limits.max_experts => self.queue.push_back(child),
                _ => {}
            }
        }
    }
}

/// A one-dimensional expert stands under its own coordinate.
fn successors(entries: BTreeMap<i64, Exemplar>) -> ListedSuccessors {
    let mut successors = ListedSuccessors::new();
    for (coordinate, Exemplar { uid, peer, expiration }) in entries {
        let coordinate = match coordinate {
            FLAT => uid.coordinates().and_then(|coordinates| coordinates.last().copied()),
            other => u64::try_from(other).ok(),
        };
        if let Some(coordinate) = coordinate {
            successors.insert(coordinate, Listed { uid, hosted: Hosted { value: peer, expiration } });
        }
    }
    successors
}

fn later(a: WallTime, b: WallTime) -> WallTime {
    WallTime(a.0.max(b.0))
}

/// A record must expire strictly later to replace another.
fn just_after(expiration: WallTime) -> WallTime {
    expiration + 0.001
}
