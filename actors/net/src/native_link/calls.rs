//! The calls of one side of a link.

use std::{
    collections::{BTreeMap, BTreeSet},
    task::Context,
};

use skep_kernel::{Moment, SharedClock};

use super::alarm::Alarm;

/// Calls by their numbers, each with the moment at which it ends.
pub(super) struct Calls<C> {
    by_id: BTreeMap<u64, (Moment, C)>,
    ends: BTreeSet<(Moment, u64)>,
    alarm: Alarm,
}

impl<C> Calls<C> {
    pub(super) fn new(clock: SharedClock) -> Self {
        Self { by_id: BTreeMap::new(), ends: BTreeSet::new(), alarm: Alarm::new(clock) }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut C> {
        self.by_id.get_mut(&id).map(|(_, call)| call)
    }

    /// Adds a call under a number that is not in use.
    pub(super) fn insert(&mut self, id: u64, end: Moment, call: C) {
        self.ends.insert((end, id));
        self.by_id.insert(id, (end, call));
    }

    pub(super) fn remove(&mut self, id: u64) -> Option<C> {
        let (end, call) = self.by_id.remove(&id)?;
        self.ends.remove(&(end, id));
        Some(call)
    }

    pub(super) fn take_all(&mut self) -> impl Iterator<Item = C> + use<C> {
        self.ends.clear();
        std::mem::take(&mut self.by_id).into_values().map(|(_, call)| call)
    }

    /// A call whose end has come.
    pub(super) fn due(&self, now: Moment) -> Option<u64> {
        self.ends.first().filter(|(end, _)| *end <= now).map(|(_, id)| *id)
    }

    /// Now, if a call's end or `other` may have come; else the task is woken when it has.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, other: Option<Moment>) -> Option<Moment> {
        let first = self.ends.first().map(|(end, _)| *end);
        self.alarm.poll(cx, first.into_iter().chain(other).min())
    }
}
