//! The local cache: what we or others found elsewhere, and which of it is read often enough to be fetched anew before it
//! expires (§6.10).

use std::collections::BTreeMap;

use skep_kernel::WallTime;

use super::storage::{Limits, Storage, WhenFull};
use crate::{DhtId, Stored, Timed};

/// Cached records. Those that were read are refreshed so many seconds before they expire.
#[derive(Debug)]
pub(crate) struct Cache {
    records: Storage,
    refresh_before: f64,
    max_marks: usize,
    /// Keys that were read since they were fetched, by when to fetch them again.
    marks: BTreeMap<DhtId, WallTime>,
}

impl Cache {
    pub fn new(limits: Limits, refresh_before: f64) -> Self {
        let records = Storage::new(WhenFull::EvictEarliest, limits);
        Self { records, refresh_before, max_marks: limits.records, marks: BTreeMap::new() }
    }

    pub fn records(&mut self) -> &mut Storage {
        &mut self.records
    }

    /// Reads a value for ourselves: it is wanted, so it will be refreshed.
    pub fn read(&mut self, now: WallTime, key: &DhtId) -> Option<Timed<Stored>> {
        let found = self.records.get(now, key)?;
        if self.marks.len() < self.max_marks {
            self.marks.insert(*key, found.expiration + -self.refresh_before);
        }
        Some(found)
    }

    /// When the next refresh is due.
    pub fn next_refresh(&self) -> Option<WallTime> {
        self.marks.values().copied().min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Keys whose refresh is due, at most `most` of them. A value that was replaced meanwhile is due later.
    pub fn take_due(&mut self, now: WallTime, most: usize) -> Vec<DhtId> {
        let due: Vec<DhtId> =
            self.marks.iter().filter(|(_, at)| at.0 <= now.0).map(|(key, _)| *key).take(most).collect();
        for key in &due {
            self.marks.remove(key);
        }
        due.into_iter()
            .filter(|key| {
                let expiration = self.records.expiration(key);
                expiration.is_some_and(|expiration| expiration.0 - self.refresh_before <= now.0)
            })
            .collect()
    }
}
