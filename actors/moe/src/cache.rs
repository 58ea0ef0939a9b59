//! [`PrefixCache`]: what this mixture lately read under each prefix, and which of it is to be read again before it is
//! too old. Local: what was missing is never stored in the DHT, where hivemind's own negative records mask
//! one-dimensional experts (docs/wire.md §12).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use skep_dht::{ListedSuccessors, Successors};
use skep_kernel::{Moment, Seed, WallTime};
use skep_wire::ExpertPrefix;

/// Successors in use are read again after so long: half of hivemind's announcement period.
const REREAD: Duration = Duration::from_secs(15);
/// How long successors serve while they are read again, unless their records expire before: as long as hivemind's
/// announcements hold. So a slow DHT costs a fan-out nothing once it has run.
const FOUND: Duration = Duration::from_secs(60);
/// A prefix without successors is read again after so long, and so is what could not be read.
const REREAD_MISSING: Duration = Duration::from_secs(3);
/// How long a prefix without successors is taken as empty.
const MISSING: Duration = Duration::from_secs(6);
/// No prefix is read again sooner, however soon its records expire.
const MIN_REREAD: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Entry {
    until: Moment,
    due: Moment,
    /// Since it was read.
    used: bool,
    successors: Arc<Successors>,
    /// When which successor's record expires, the last one first.
    expirations: Vec<(Moment, u64)>,
}

/// What to do for the prefixes in use.
#[derive(Debug, PartialEq)]
pub(crate) enum Due {
    /// Read these.
    Now(Vec<ExpertPrefix>),
    /// Nothing before this moment.
    At(Moment),
    /// Nothing was used since it was read.
    Nothing,
}

/// Successors by prefix, at most `capacity` of them; the earliest to expire goes first.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    capacity: usize,
    entries: BTreeMap<ExpertPrefix, Entry>,
    by_expiry: BTreeSet<(Moment, ExpertPrefix)>,
    /// Of entries that were used since they were read: when they are to be read again.
    by_due: BTreeSet<(Moment, ExpertPrefix)>,
    seed: Seed,
    drawn: u64,
}

impl PrefixCache {
    /// An empty cache for so many prefixes; the seed spreads the moments at which they are read again.
    pub fn new(capacity: usize, seed: Seed) -> Self {
        let (entries, by_expiry, by_due) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { capacity, entries, by_expiry, by_due, seed, drawn: 0 }
    }

    /// What was read under a prefix, as far as it still counts; an empty table says that nothing is there. From now on
    /// the prefix is in use.
    pub fn get(&mut self, now: Moment, prefix: &ExpertPrefix) -> Option<Arc<Successors>> {
        let entry = self.entries.get_mut(prefix).filter(|entry| entry.until > now)?;
        while let Some((_, coordinate)) = entry.expirations.pop_if(|(expires, _)| *expires <= now) {
            Arc::make_mut(&mut entry.successors).remove(&coordinate);
        }
        if !entry.used {
            entry.used = true;
            self.by_due.insert((entry.due, prefix.clone()));
        }
        Some(entry.successors.clone())
    }

    /// Remembers what was read just now.
    pub fn insert(&mut self, now: Moment, wall: WallTime, prefix: ExpertPrefix, listed: ListedSuccessors) {
        let mut expirations = Vec::with_capacity(listed.len());
        let mut successors = Successors::new();
        for (coordinate, found) in listed {
            let left = Duration::try_from_secs_f64(found.hosted.expiration.0 - wall.0).unwrap_or_default();
            expirations.push((now + left.min(FOUND), coordinate));
            successors.insert(coordinate, (found.uid, found.hosted.value));
        }
        expirations.sort_unstable_by(|a, b| b.cmp(a));
        let (until, reread) = match (expirations.first(), expirations.last()) {
            // Half way to the first expiration, so that another try has time, too.
            (Some((last, _)), Some((first, _))) => (*last, REREAD.min((*first - now) / 2).max(MIN_REREAD)),
            _ => (now + MISSING, REREAD_MISSING),
        };
        let used = self.remove(&prefix).is_some_and(|earlier| earlier.used);
        let due = now + self.jittered(reread);
        if used {
            self.by_due.insert((due, prefix.clone()));
        }
        self.by_expiry.insert((until, prefix.clone()));
        self.entries.insert(prefix, Entry { until, due, used, successors: Arc::new(successors), expirations });
        while self.entries.len() > self.capacity {
            let (_, first) = self.by_expiry.first().cloned().expect("every entry has its expiry");
            self.remove(&first);
        }
    }

    /// When the first of the prefixes in use is to be read again.
    pub fn next_due(&self) -> Option<Moment> {
        self.by_due.first().map(|(due, _)| *due)
    }

    /// Which of the prefixes in use are to be read again now, at most `limit`: those that are due, and with them those
    /// that soon will be. They count as unused from now on, and as due a little later, in case they cannot be read.
    pub fn take_due(&mut self, now: Moment, limit: usize) -> Due {
        match self.by_due.first() {
            None => return Due::Nothing,
            Some((due, _)) if *due > now || limit == 0 => return Due::At(*due),
            Some(_) => {}
        }
        let mut taken = Vec::new();
        while taken.len() < limit {
            let Some((_, prefix)) = self.by_due.first().filter(|(due, _)| *due <= now + MIN_REREAD).cloned() else {
                break;
            };
            let due = now + self.jittered(REREAD_MISSING);
            let entry = self.entries.get_mut(&prefix).expect("what is due is remembered");
            self.by_due.remove(&(entry.due, prefix.clone()));
            (entry.used, entry.due) = (false, due);
            taken.push(prefix);
        }
        Due::Now(taken)
    }

    fn remove(&mut self, prefix: &ExpertPrefix) -> Option<Entry> {
        let entry = self.entries.remove(prefix)?;
        self.by_expiry.remove(&(entry.until, prefix.clone()));
        self.by_due.remove(&(entry.due, prefix.clone()));
        Some(entry)
    }

    /// At least four fifths of a wait.
    fn jittered(&mut self, wait: Duration) -> Duration {
        self.drawn += 1;
        let share = self.seed.derive_nth(self.drawn).number() as f64 / u64::MAX as f64;
        wait.mul_f64(0.8 + 0.2 * share)
    }
}

#[cfg(test)]
mod tests {
    use skep_dht::{Hosted, Listed};

    use super::*;

    const WALL: WallTime = WallTime(1000.0);

    fn cache(capacity: usize) -> PrefixCache {
        PrefixCache::new(capacity, Seed::new(7))
    }

    fn prefix(text: &str) -> ExpertPrefix {
        text.parse().unwrap()
    }

    /// Experts under `m.0.`, each with the seconds for which its record holds.
    fn table<const N: usize>(seconds: [f64; N]) -> ListedSuccessors {
        let peer = libp2p_identity::PeerId::random();
        let listed = seconds.iter().zip(0..).map(|(seconds, coordinate)| {
            let hosted = Hosted { value: peer, expiration: WALL + *seconds };
            (coordinate, Listed { uid: format!("m.0.{coordinate}").parse().unwrap(), hosted })
        });
        listed.collect()
    }

    fn secs(seconds: u64) -> Moment {
        Moment::START + Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_there_counts_longer_than_what_is_missing() {
        let mut cache = cache(8);
        let (here, gone) = (prefix("m.0."), prefix("m.1."));
        cache.insert(Moment::START, WALL, here.clone(), table([300.0]));
        cache.insert(Moment::START, WALL, gone.clone(), table([]));
        assert!(cache.get(Moment::START, &gone).is_some_and(|found| found.is_empty()));
        let later = Moment::START + MISSING;
        assert!(cache.get(later, &gone).is_none());
        assert!(cache.get(later, &here).is_some_and(|found| found.len() == 1));
        assert!(cache.get(Moment::START + FOUND, &here).is_none(), "longer than any announcement");
    }

    #[test]
    fn an_expert_vanishes_with_its_record_and_the_others_stay() {
        let mut cache = cache(8);
        cache.insert(Moment::START, WALL, prefix("m.0."), table([20.0, 10.0, 30.0]));
        let seen =
            |cache: &mut PrefixCache, at| cache.get(secs(at), &prefix("m.0.")).map(|s| s.keys().copied().collect());
        assert_eq!(seen(&mut cache, 9), Some(vec![0, 1, 2]));
        assert_eq!(seen(&mut cache, 10), Some(vec![0, 2]));
        assert_eq!(seen(&mut cache, 25), Some(vec![2]));
        assert_eq!(seen(&mut cache, 30), None);
    }

    #[test]
    fn only_what_was_used_since_it_was_read_is_read_again_and_that_ahead_of_its_end() {
        let mut cache = cache(8);
        cache.insert(Moment::START, WALL, prefix("m.0."), table([60.0]));
        cache.insert(Moment::START, WALL, prefix("m.1."), table([60.0]));
        assert_eq!(cache.take_due(secs(30), 8), Due::Nothing);
        cache.get(secs(1), &prefix("m.0."));
        let Due::At(due) = cache.take_due(secs(1), 8) else { panic!("not due yet") };
        assert!(secs(12) <= due && due <= secs(15), "{due:?}");
        assert_eq!(cache.take_due(due, 8), Due::Now(vec![prefix("m.0.")]));
        assert_eq!(cache.take_due(secs(59), 8), Due::Nothing, "read, but not used since");
        cache.insert(secs(16), WALL, prefix("m.0."), table([60.0]));
        assert_eq!(cache.take_due(secs(59), 8), Due::Nothing);
    }

    #[test]
    fn what_is_used_while_it_is_read_stays_in_use_and_is_tried_again_if_it_cannot_be_read() {
        let mut cache = cache(8);
        cache.insert(Moment::START, WALL, prefix("m.0."), table([60.0]));
        cache.get(Moment::START, &prefix("m.0."));
        assert!(matches!(cache.take_due(secs(15), 8), Due::Now(_)));
        cache.get(secs(15), &prefix("m.0."));
        let Due::At(again) = cache.take_due(secs(15), 8) else { panic!("in use") };
        assert!(secs(16) <= again && again <= secs(18), "{again:?}");
        cache.insert(secs(16), WALL, prefix("m.0."), table([60.0]));
        let Due::At(due) = cache.take_due(secs(16), 8) else { panic!("in use") };
        assert!(secs(28) <= due && due <= secs(31), "{due:?}");
    }

    #[test]
    fn records_that_expire_soon_are_read_again_half_way_but_not_without_end() {
        for (left, earliest, latest) in [(10.0, 4.0, 5.0), (0.5, 0.8, 1.0), (-3.0, 0.8, 1.0)] {
            let mut cache = cache(8);
            cache.insert(Moment::START, WALL, prefix("m.0."), table([60.0, left]));
            cache.get(Moment::START, &prefix("m.0."));
            let Due::At(due) = cache.take_due(Moment::START, 8) else { panic!("in use") };
            let due = (due - Moment::START).as_secs_f64();
            assert!(earliest <= due && due <= latest, "{left} s left, due after {due}");
        }
    }

    #[test]
    fn what_is_due_about_now_is_taken_together_up_to_a_limit() {
        let mut cache = cache(64);
        for i in 0..20 {
            let prefix = prefix(&format!("m.{i}."));
            cache.insert(Moment::START, WALL, prefix.clone(), table([60.0]));
            cache.get(Moment::START, &prefix);
        }
        let mut taken = Vec::new();
        while let Due::Now(some) = cache.take_due(secs(15), 8) {
            assert!(!some.is_empty() && some.len() <= 8);
            taken.extend(some);
        }
        assert_eq!(taken.len(), 20);
        assert_eq!(cache.take_due(secs(15), 0), Due::Nothing);
    }

    #[test]
    fn a_full_cache_forgets_what_expires_first() {
        let mut cache = cache(2);
        let prefixes: Vec<ExpertPrefix> = (0..3).map(|i| prefix(&format!("m.{i}."))).collect();
        for (prefix, seconds) in prefixes.iter().zip([30.0, 20.0, 40.0]) {
            cache.insert(Moment::START, WALL, prefix.clone(), table([seconds]));
            cache.get(Moment::START, prefix);
        }
        let kept: Vec<bool> = prefixes.iter().map(|prefix| cache.get(secs(1), prefix).is_some()).collect();
        assert_eq!(kept, [true, false, true]);
        assert!(matches!(cache.take_due(secs(15), 8), Due::Now(due) if due.len() == 2 && !due.contains(&prefixes[1])));
    }
}
