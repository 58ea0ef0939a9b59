//! When which expert is announced next: all of them together every period, what failed sooner, and everything a few times
//! more after a start.

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_kernel::{Moment, WallTime};
use skep_wire::ExpertUid;

use crate::core::node::Outcome;

#[derive(Clone, Copy, Debug)]
struct Entry {
    due: Moment,
    failures: u32,
    last: Outcome,
    /// When the last record that was taken expires.
    until: Option<WallTime>,
    /// The last announcement was good enough.
    settled: bool,
}

/// After a start or a join nobody's table is complete yet, ours least of all: records went to nodes that were the nearest
/// known then, and others look for them at those that are. So all is announced again if the table has grown since.
#[derive(Clone, Copy, Debug)]
struct Settling {
    next: Moment,
    spacing: Duration,
    /// Nodes in the table at the last announcement.
    nodes: usize,
}

/// Experts and when each is due.
pub(super) struct Schedule {
    period: Duration,
    random: ChaCha8Rng,
    entries: BTreeMap<ExpertUid, Entry>,
    settling: Option<Settling>,
}

/// Time from a start to the first early announcement; it doubles from one to the next, up to the period.
const FIRST_EARLY: Duration = Duration::from_secs(4);
/// A table that has grown by one in so many is another table.
const GROWN: usize = 16;

/// Retries begin after so long and double up to half a period.
const FIRST_RETRY: Duration = Duration::from_millis(500);

impl Schedule {
    pub fn new(period: Duration, seed: u64) -> Self {
        Self { period, random: ChaCha8Rng::seed_from_u64(seed), entries: BTreeMap::new(), settling: None }
    }

    pub fn add(&mut self, uid: ExpertUid, now: Moment) {
        let new = Entry { due: now, failures: 0, last: Outcome::default(), until: None, settled: false };
        self.entries.entry(uid).or_insert(new);
    }

    pub fn remove(&mut self, uid: &ExpertUid) -> bool {
        self.entries.remove(uid).is_some()
    }

    pub fn clear(&mut self) -> impl Iterator<Item = ExpertUid> {
        std::mem::take(&mut self.entries).into_keys()
    }

    pub fn uids(&self) -> impl Iterator<Item = &ExpertUid> {
        self.entries.keys()
    }

    /// When there is something to do next.
    pub fn next(&self) -> Option<Moment> {
        let due = self.entries.values().map(|entry| entry.due).min()?;
        Some(self.settling.map_or(due, |settling| due.min(settling.next)))
    }

    /// We have started or joined: everything is due, and some more times soon.
    pub fn start_anew(&mut self, now: Moment) {
        self.all_due(now);
        let next = now + FIRST_EARLY.mul_f64(self.random.random_range(0.5..1.0));
        self.settling = Some(Settling { next, spacing: FIRST_EARLY, nodes: 0 });
    }

    fn all_due(&mut self, now: Moment) {
        self.entries.values_mut().for_each(|entry| entry.due = entry.due.min(now));
    }

    /// Makes everything due if the table has become another one; `nodes` are in it.
    fn settle(&mut self, now: Moment, nodes: usize) {
        let Some(settling) = self.settling.filter(|settling| settling.next <= now) else { return };
        if nodes > settling.nodes + settling.nodes / GROWN {
            self.all_due(now);
        }
        let spacing = settling.spacing * 2;
        let next = now + spacing.mul_f64(self.random.random_range(0.5..1.0));
        self.settling = (spacing < self.period).then_some(Settling { next, spacing, ..settling });
    }

    /// Those who are due, and those who soon would be: they travel together. They count as due again should nobody say
    /// what became of them.
    /// `nodes` are in the table.
    pub fn take_due(&mut self, now: Moment, nodes: usize) -> Vec<ExpertUid> {
        self.settle(now, nodes);
        if self.entries.values().all(|entry| entry.due > now) {
            return Vec::new();
        }
        self.settling.iter_mut().for_each(|settling| settling.nodes = nodes);
        let soon = now + self.period / 5;
        self.entries.iter().filter(|(_, entry)| entry.due <= soon).map(|(uid, _)| uid.clone()).collect()
    }

    /// A batch of records that expire at `until` was answered. Each has to be held by another node, unless there is none.
    pub fn announced(&mut self, outcomes: &BTreeMap<ExpertUid, Outcome>, until: WallTime, alone: bool, now: Moment) {
        // Drawn once, so that what travelled together stays together.
        let next = now + self.period.mul_f64(self.random.random_range(0.9..1.0));
        for (uid, outcome) in outcomes {
            let Some(entry) = self.entries.get_mut(uid) else { continue };
            entry.last = *outcome;
            if outcome.stored {
                entry.until = Some(until);
            }
            entry.settled = outcome.stored && (outcome.elsewhere || alone);
            if entry.settled {
                entry.failures = 0;
                entry.due = next;
            } else {
                self.failed(uid, now);
            }
        }
    }

    pub fn failed(&mut self, uid: &ExpertUid, now: Moment) {
        let jitter = self.random.random_range(0.5..1.0);
        let Some(entry) = self.entries.get_mut(uid) else { return };
        let backoff = FIRST_RETRY.saturating_mul(2u32.saturating_pow(entry.failures)).min(self.period / 2);
        entry.failures = entry.failures.saturating_add(1);
        entry.due = now + backoff.mul_f64(jitter);
    }

    /// When the last record of each expert that was taken expires.
    pub fn until(&self) -> BTreeMap<ExpertUid, WallTime> {
        self.entries.iter().filter_map(|(uid, entry)| Some((uid.clone(), entry.until?))).collect()
    }

    /// Experts in all, those stored, those stored elsewhere.
    pub fn counts(&self) -> (usize, usize, usize) {
        let stored = self.entries.values().filter(|entry| entry.last.stored).count();
        let elsewhere = self.entries.values().filter(|entry| entry.last.elsewhere).count();
        (self.entries.len(), stored, elsewhere)
    }

    /// Whether every expert was last announced well enough.
    pub fn is_settled(&self) -> bool {
        self.entries.values().all(|entry| entry.settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(period: u64) -> Schedule {
        let mut schedule = Schedule::new(Duration::from_secs(period), 1);
        schedule.add("e.1".parse().unwrap(), Moment::START);
        schedule.start_anew(Moment::START);
        schedule
    }

    /// When it announces, in seconds, while the table has `nodes` at each time.
    fn announcements(schedule: &mut Schedule, seconds: u64, nodes: impl Fn(u64) -> usize) -> Vec<u64> {
        let mut times = Vec::new();
        let outcome = Outcome { stored: true, elsewhere: true };
        for second in 0..seconds {
            let now = Moment::START + Duration::from_secs(second);
            let due = schedule.take_due(now, nodes(second));
            if !due.is_empty() {
                times.push(second);
                let outcomes = due.into_iter().map(|uid| (uid, outcome)).collect();
                schedule.announced(&outcomes, WallTime(0.0), false, now);
            }
        }
        times
    }

    #[test]
    fn who_has_just_started_announces_again_while_its_table_grows() {
        let times = announcements(&mut schedule(300), 240, |second| 10 + 20 * second as usize);
        assert!((4..=7).contains(&times.len()) && times[0] == 0 && times[1] <= 4, "{times:?}");
        assert!(times.windows(2).skip(1).all(|pair| pair[1] - pair[0] >= 4), "{times:?}");
    }

    #[test]
    fn a_table_that_stays_as_it_is_costs_no_announcement_before_the_period() {
        assert_eq!(announcements(&mut schedule(300), 260, |_| 100), [0]);
        assert_eq!(announcements(&mut schedule(300), 260, |second| 100 + second as usize / 60), [0]);
    }

    #[test]
    fn early_announcements_end_with_the_first_period() {
        let mut schedule = schedule(30);
        announcements(&mut schedule, 40, |second| 10 + second as usize);
        assert!(schedule.settling.is_none());
        schedule.start_anew(Moment::START + Duration::from_secs(40));
        assert!(schedule.settling.is_some(), "a new join begins them anew");
    }
}
