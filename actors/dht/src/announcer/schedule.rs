//! When which expert is announced next: all of them together every period, what failed sooner.

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

/// Experts and when each is due.
pub(super) struct Schedule {
    period: Duration,
    random: ChaCha8Rng,
    entries: BTreeMap<ExpertUid, Entry>,
}

/// Retries begin after so long and double up to half a period.
const FIRST_RETRY: Duration = Duration::from_millis(500);

impl Schedule {
    pub fn new(period: Duration, seed: u64) -> Self {
        Self { period, random: ChaCha8Rng::seed_from_u64(seed), entries: BTreeMap::new() }
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

    /// When the next one is due.
    pub fn next(&self) -> Option<Moment> {
        self.entries.values().map(|entry| entry.due).min()
    }

    pub fn all_due(&mut self, now: Moment) {
        self.entries.values_mut().for_each(|entry| entry.due = entry.due.min(now));
    }

    /// Those who are due, and those who soon would be: they travel together. They count as due again should nobody say
    /// what became of them.
    pub fn take_due(&mut self, now: Moment) -> Vec<ExpertUid> {
        if self.next().is_none_or(|next| next > now) {
            return Vec::new();
        }
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
