//! Parts of a fan-out alone, without calls: for benchmarks that ask what each costs.

use std::time::Duration;

use libp2p_identity::PeerId;
use skep_kernel::{Deadline, Moment};
use skep_wire::ExpertUid;

use crate::{
    join::{Join, JoinPolicy, Progress},
    plan::{Choice, Place, Plan, Slot},
};

/// A batch of `rows` rows that chose `k` of `experts` experts each, all of them at one peer.
pub struct Fan {
    plan: Plan,
}

impl Fan {
    /// Plans its calls.
    pub fn plan(peer: PeerId, rows: usize, k: usize, experts: usize) -> Self {
        let uids: Vec<ExpertUid> =
            (0..experts).map(|number| format!("e.{number}").parse().expect("a name and a number")).collect();
        let choice = |at: usize| {
            let (row, rank) = (at / k, at % k);
            let coordinate = (row + rank * (experts / k).max(1)) % experts;
            Choice { place: Place { row, rank }, uid: uids[coordinate].clone(), peer, coordinates: vec![coordinate] }
        };
        let mut plan = Plan::new(rows, k);
        plan.add((0..rows * k).map(choice));
        Self { plan }
    }

    /// Joins an answer to each call; gives the number of places that were won.
    ///
    /// # Panics
    /// When the join waits for more than these answers.
    pub fn join(&self) -> usize {
        let policy = JoinPolicy {
            k_min: self.plan.k,
            deadline: Deadline::after(Moment::START, Duration::from_secs(1)),
            timeout_after_k_min: None,
            replan_at: None,
            needs_every_row: false,
        };
        let mut join = Join::new(&self.plan, policy);
        let mut progress = join.on_time(Moment::START);
        for slot in (0..self.plan.calls().len()).map(Slot) {
            progress = join.on_reply(Moment::START, slot, Ok(()));
        }
        assert_eq!(progress, Progress::Done, "every call was answered");
        join.finish().winners.into_iter().flatten().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_a_fan_is_won() {
        let fan = Fan::plan(PeerId::random(), 32, 4, 16);
        assert_eq!((fan.plan.calls().len(), fan.join()), (16, 128));
    }
}
