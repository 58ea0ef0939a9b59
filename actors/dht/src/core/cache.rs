//! The local cache: what we or others found elsewhere, and which of it is read often enough to be fetched anew before it
//! expires (§6.10).

use std::collections::{BTreeMap, BTreeSet};

use skep_kernel::WallTime;

use super::{
    storage::{Limits, Storage, WhenFull},
    timed::Expiry,
};
use crate::{DhtId, Stored, Timed};

/// Cached records. Those that were read are refreshed so many seconds before they are dropped.
#[derive(Debug)]
pub(crate) struct Cache {
    records: Storage,
    refresh_before: f64,
    max_marks: usize,
    /// Keys that were read since they were fetched, and when to fetch them again.
    marks: BTreeMap<DhtId, Expiry>,
    /// The same, the next one first.
    due: BTreeSet<(Expiry, DhtId)>,
}

impl Cache {
    pub fn new(limits: Limits, refresh_before: f64) -> Self {
        let records = Storage::new(WhenFull::EvictEarliest, limits);
        Self { records, refresh_before, max_marks: limits.records, marks: BTreeMap::new(), due: BTreeSet::new() }
    }

    pub fn records(&mut self) -> &mut Storage {
        &mut self.records
    }

    /// Reads a value for ourselves: it is wanted, so it will be refreshed.
    pub fn read(&mut self, now: WallTime, key: &DhtId) -> Option<Timed<Stored>> {
        let found = self.records.get(now, key)?;
        if self.marks.len() < self.max_marks {
            let until = self.records.until(key).unwrap_or(found.expiration);
            let at = Expiry(until.0 - self.refresh_before);
            if let Some(before) = self.marks.insert(*key, at) {
                self.due.remove(&(before, *key));
            }
            self.due.insert((at, *key));
        }
        Some(found)
    }

    /// When the next refresh is due.
    pub fn next_refresh(&self) -> Option<WallTime> {
        self.due.first().map(|(at, _)| WallTime(at.0))
    }

    /// Keys whose refresh is due, at most `most` of them. A value that was replaced meanwhile is due later.
    pub fn take_due(&mut self, now: WallTime, most: usize) -> Vec<DhtId> {
        let mut due = Vec::new();
        while let Some((_, key)) = self.due.first().copied().filter(|(at, _)| at.0 <= now.0 && due.len() < most) {
            self.due.pop_first();
            self.marks.remove(&key);
            let until = self.records.until(&key);
            if until.is_some_and(|until| until.0 - self.refresh_before <= now.0) {
                due.push(key);
            }
        }
        due
    }
}
