//! [`PrefixCache`]: what this mixture lately read under each prefix. Local: what was missing is never stored in the DHT,
//! where hivemind's own negative records mask one-dimensional experts (docs/wire.md §12).

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
/// How long they serve while they are read anew: as long as hivemind's announcements hold. So a slow DHT costs a fan-out
/// nothing once it has run.
const STALE: Duration = Duration::from_secs(60);
/// How long a prefix without successors is taken as empty.
const MISSING: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Entry {
    fresh_until: Moment,
    until: Moment,
    successors: Arc<Successors>,
}

/// What the cache knows of a prefix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cached {
    /// An empty table says that nothing is there.
    pub successors: Arc<Successors>,
    /// Whether the asker should read it anew; nobody else is told so for a while.
    pub is_stale: bool,
}

/// Successors by prefix, at most `capacity` of them; the earliest to expire goes first.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    capacity: usize,
    entries: BTreeMap<ExpertPrefix, Entry>,
    by_expiry: BTreeSet<(Moment, ExpertPrefix)>,
}

impl PrefixCache {
    /// An empty cache for so many prefixes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, entries: BTreeMap::new(), by_expiry: BTreeSet::new() }
    }

    /// What was read under a prefix, if that still counts.
    pub fn get(&mut self, now: Moment, prefix: &ExpertPrefix) -> Option<Cached> {
        let entry = self.entries.get_mut(prefix).filter(|entry| entry.until > now)?;
        let is_stale = entry.fresh_until <= now;
        if is_stale {
            entry.fresh_until = now + MISSING;
        }
        Some(Cached { successors: entry.successors.clone(), is_stale })
    }

    /// Remembers what was read just now.
    pub fn insert(&mut self, now: Moment, prefix: ExpertPrefix, successors: Arc<Successors>) {
        let (fresh, all) = if successors.is_empty() { (MISSING, MISSING) } else { (FOUND, STALE) };
        let until = now + all;
        let entry = Entry { fresh_until: now + fresh, until, successors };
        if let Some(earlier) = self.entries.insert(prefix.clone(), entry) {
            self.by_expiry.remove(&(earlier.until, prefix.clone()));
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
        assert!(cache.get(Moment::START, &gone).is_some_and(|found| found.successors.is_empty()));
        let later = Moment::START + MISSING;
        assert!(cache.get(later, &gone).is_none());
        assert!(cache.get(later, &here).is_some_and(|found| !found.is_stale));
        assert!(cache.get(Moment::START + STALE, &here).is_none());
    }

    #[test]
    fn only_one_asker_is_told_to_read_anew() {
        let mut cache = PrefixCache::new(8);
        let prefix: ExpertPrefix = "m.0.".parse().unwrap();
        cache.insert(Moment::START, prefix.clone(), table("m.0.0"));
        let later = Moment::START + FOUND;
        let told: Vec<bool> = (0..3).map(|_| cache.get(later, &prefix).unwrap().is_stale).collect();
        assert_eq!(told, [true, false, false]);
        assert!(cache.get(later + MISSING, &prefix).unwrap().is_stale, "in case the first one failed");
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
