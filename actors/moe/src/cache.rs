//! [`PrefixCache`]: what this mixture lately read under each prefix. Local: what was missing is never stored in the DHT,
//! where hivemind's own negative records mask one-dimensional experts (wire document §12).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use skep_dht::Successors;
use skep_kernel::Moment;
use skep_wire::ExpertPrefix;

/// How long successors are taken as read: half of hivemind's announcement period.
const FOUND: Duration = Duration::from_secs(15);
/// How long a prefix without successors is taken as empty.
const MISSING: Duration = Duration::from_secs(3);

/// Successors by prefix, at most `capacity` of them; the earliest to expire goes first.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    capacity: usize,
    entries: BTreeMap<ExpertPrefix, (Moment, Arc<Successors>)>,
    by_expiry: BTreeSet<(Moment, ExpertPrefix)>,
}

impl PrefixCache {
    /// An empty cache for so many prefixes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, entries: BTreeMap::new(), by_expiry: BTreeSet::new() }
    }

    /// What was read under a prefix, if that still counts; an empty table says that nothing is there.
    pub fn get(&self, now: Moment, prefix: &ExpertPrefix) -> Option<Arc<Successors>> {
        let (until, successors) = self.entries.get(prefix)?;
        (*until > now).then(|| successors.clone())
    }

    /// Remembers what was read just now.
    pub fn insert(&mut self, now: Moment, prefix: ExpertPrefix, successors: Arc<Successors>) {
        let until = now + if successors.is_empty() { MISSING } else { FOUND };
        if let Some((earlier, _)) = self.entries.insert(prefix.clone(), (until, successors)) {
            self.by_expiry.remove(&(earlier, prefix.clone()));
        }
        self.by_expiry.insert((until, prefix));
        while self.entries.len() > self.capacity {
            let (_, first) = self.by_expiry.pop_first().expect("every entry has its expiry");
            self.entries.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(uid: &str) -> Arc<Successors> {
        let peer = libp2p_identity::PeerId::random();
        Arc::new(Successors::from([(0, (uid.parse().unwrap(), peer))]))
    }

    #[test]
    fn what_is_there_counts_longer_than_what_is_missing() {
        let mut cache = PrefixCache::new(8);
        let (here, gone): (ExpertPrefix, ExpertPrefix) = ("m.0.".parse().unwrap(), "m.1.".parse().unwrap());
        cache.insert(Moment::START, here.clone(), table("m.0.0"));
        cache.insert(Moment::START, gone.clone(), Arc::default());
        assert!(cache.get(Moment::START, &gone).is_some_and(|found| found.is_empty()));
        let later = Moment::START + MISSING;
        assert!(cache.get(later, &gone).is_none() && cache.get(later, &here).is_some());
        assert!(cache.get(Moment::START + FOUND, &here).is_none());
    }

    #[test]
    fn a_full_cache_forgets_what_expires_first() {
        let mut cache = PrefixCache::new(2);
        let prefixes: Vec<ExpertPrefix> = (0..3).map(|i| format!("m.{i}.").parse().unwrap()).collect();
        for (i, prefix) in prefixes.iter().enumerate() {
            cache.insert(Moment::from_nanos(i as u64), prefix.clone(), table("m.0.0"));
        }
        let now = Moment::from_nanos(3);
        let kept: Vec<bool> = prefixes.iter().map(|prefix| cache.get(now, prefix).is_some()).collect();
        assert_eq!(kept, [false, true, true]);
    }
}
