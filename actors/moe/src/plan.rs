//! [`Plan`]: which call carries which rows. Rows that chose the same expert travel together, where hivemind makes one call
//! per row and expert (docs/wire.md §10.2).

use std::collections::{BTreeMap, BTreeSet};

use libp2p_identity::PeerId;
use skep_wire::{ExpertUid, limits::MAX_CALL_ROWS};

use crate::beam::Candidate;

/// A call of a plan, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub usize);

/// One of the k places of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub row: usize,
    /// 0 to k − 1.
    pub rank: usize,
}

/// An expert for a place.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub place: Place,
    pub uid: ExpertUid,
    pub peer: PeerId,
    pub coordinates: Vec<usize>,
}

impl Choice {
    /// Puts a candidate on a place.
    pub fn new(place: Place, candidate: Candidate) -> Self {
        Self { place, uid: candidate.uid, peer: candidate.peer, coordinates: candidate.coordinates }
    }
}

/// One call: an expert and the places that it is to fill, in the order of its rows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedCall {
    pub uid: ExpertUid,
    pub peer: PeerId,
    pub coordinates: Vec<usize>,
    pub places: Vec<Place>,
}

/// The calls of a batch of `rows` rows with `k` places each.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub rows: usize,
    pub k: usize,
    calls: Vec<PlannedCall>,
}

impl Plan {
    /// A plan without calls.
    pub fn new(rows: usize, k: usize) -> Self {
        Self { rows, k, calls: Vec::new() }
    }

    /// Adds calls for these choices and tells which: one per expert, more where it has more rows than a call carries.
    pub fn add(&mut self, choices: impl IntoIterator<Item = Choice>) -> Vec<Slot> {
        let mut groups: BTreeMap<(ExpertUid, PeerId), PlannedCall> = BTreeMap::new();
        for Choice { place, uid, peer, coordinates } in choices {
            let call = || PlannedCall { uid: uid.clone(), peer, coordinates, places: Vec::new() };
            groups.entry((uid.clone(), peer)).or_insert_with(call).places.push(place);
        }
        let first = self.calls.len();
        for mut group in groups.into_values() {
            group.places.sort_unstable();
            for places in group.places.chunks(MAX_CALL_ROWS) {
                self.calls.push(PlannedCall { places: places.to_vec(), ..group.clone() });
            }
        }
        (first..self.calls.len()).map(Slot).collect()
    }

    /// All calls, in order of their slots.
    pub fn calls(&self) -> &[PlannedCall] {
        &self.calls
    }

    /// The call of a slot of this plan.
    pub fn call(&self, slot: Slot) -> &PlannedCall {
        &self.calls[slot.0]
    }

    /// The experts that each of these rows has been planned for.
    pub fn asked(&self, rows: &[usize]) -> BTreeMap<usize, BTreeSet<ExpertUid>> {
        let mut asked: BTreeMap<usize, BTreeSet<ExpertUid>> = rows.iter().map(|row| (*row, BTreeSet::new())).collect();
        for call in &self.calls {
            for place in &call.places {
                if let Some(uids) = asked.get_mut(&place.row) {
                    uids.insert(call.uid.clone());
                }
            }
        }
        asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(row: usize, rank: usize, uid: &str, peer: PeerId) -> Choice {
        Choice { place: Place { row, rank }, uid: uid.parse().unwrap(), peer, coordinates: vec![0] }
    }

    #[test]
    fn rows_of_one_expert_share_a_call() {
        let peer = PeerId::random();
        let mut plan = Plan::new(3, 2);
        let choices = [choice(2, 0, "m.0", peer), choice(0, 1, "m.0", peer), choice(1, 0, "m.1", peer)];
        assert_eq!(plan.add(choices), [Slot(0), Slot(1)]);
        assert_eq!(plan.call(Slot(0)).places, [Place { row: 0, rank: 1 }, Place { row: 2, rank: 0 }]);
        assert_eq!(plan.asked(&[0, 1])[&1], BTreeSet::from(["m.1".parse().unwrap()]));
        assert_eq!(plan.add([choice(1, 1, "m.2", peer)]), [Slot(2)]);
    }

    #[test]
    fn a_call_carries_no_more_rows_than_the_wire_allows() {
        let peer = PeerId::random();
        let mut plan = Plan::new(5000, 1);
        plan.add((0..5000).map(|row| choice(row, 0, "m.0", peer)));
        let sizes: Vec<usize> = plan.calls().iter().map(|call| call.places.len()).collect();
        assert_eq!(sizes, [2048, 2048, 904]);
    }
}
