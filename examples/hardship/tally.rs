//! How calls ended.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use skep::{
    kernel::{Deadline, Moment},
    rpc::{RpcError, Step},
    wire::HostTensor,
};

/// A call that ends later than this after its deadline counts as late.
const LATE: Duration = Duration::from_millis(50);

/// Who waited.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caller {
    /// A task on an async runtime.
    Task,
    /// A thread that blocks.
    Thread,
    /// A bare timer beside them.
    Timer,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Tally {
    /// From the deadline to the end in microseconds, negative for calls that ended before it.
    ends: BTreeMap<Caller, Vec<i64>>,
    outcomes: BTreeMap<String, u64>,
    late_by_outcome: BTreeMap<String, u64>,
    /// Calls that ended late.
    pub late: u64,
    /// Calls that were given up.
    pub hung: u64,
}

impl Tally {
    /// Counts a wait that ended; `None` for a timer.
    pub fn count(
        &mut self,
        caller: Caller,
        end: Moment,
        deadline: Deadline,
        outcome: Option<&Result<Vec<HostTensor>, RpcError>>,
    ) {
        let (after, before) = (end.since(deadline.moment()), deadline.remaining(end));
        let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        self.ends.entry(caller).or_default().push(micros(after) - micros(before));
        let Some(outcome) = outcome else { return };
        *self.outcomes.entry(name(outcome)).or_default() += 1;
        if after > LATE {
            self.late += 1;
            *self.late_by_outcome.entry(name(outcome)).or_default() += 1;
        }
    }

    /// Takes in what another caller counted.
    pub fn add(&mut self, other: Tally) {
        for (caller, ends) in other.ends {
            self.ends.entry(caller).or_default().extend(ends);
        }
        for (all, more) in [(&mut self.outcomes, other.outcomes), (&mut self.late_by_outcome, other.late_by_outcome)] {
            for (name, count) in more {
                *all.entry(name).or_default() += count;
            }
        }
        self.late += other.late;
        self.hung += other.hung;
    }

    /// What is printed.
    pub fn report(&self, missing: usize) -> Value {
        let of = |callers: &[Caller]| -> Vec<i64> {
            let mut ends: Vec<i64> = callers.iter().filter_map(|c| self.ends.get(c)).flatten().copied().collect();
            ends.sort_unstable();
            ends
        };
        let calls = of(&[Caller::Task, Caller::Thread]);
        json!({
            "calls": calls.len(),
            "outcomes": self.outcomes,
            "end_minus_deadline_ms": percentiles(&calls),
            "of_calls_that_reached_their_deadline": {
                "by_tasks": percentiles(&reached(of(&[Caller::Task]))),
                "by_threads": percentiles(&reached(of(&[Caller::Thread]))),
            },
            "of_bare_timers": percentiles(&of(&[Caller::Timer])),
            "later_than_50_ms": self.late,
            "late_by_outcome": self.late_by_outcome,
            "hung": self.hung + missing as u64,
        })
    }
}

fn reached(mut ends: Vec<i64>) -> Vec<i64> {
    ends.retain(|end| *end >= 0);
    ends
}

/// Of sorted microseconds, in milliseconds.
fn percentiles(ends: &[i64]) -> Value {
    let at = |share: f64| {
        let last = ends.len().saturating_sub(1);
        ends.get((share * last as f64).round() as usize).map_or(0.0, |&us| us as f64 / 1000.0)
    };
    json!({ "count": ends.len(), "p50": at(0.5), "p99.9": at(0.999), "max": at(1.0) })
}

fn name(outcome: &Result<Vec<HostTensor>, RpcError>) -> String {
    match outcome {
        Ok(_) => "answered",
        Err(RpcError::Deadline { step: Step::Schedule, .. }) => "deadline, told by the caller's side",
        Err(RpcError::Deadline { step: Step::Dial, .. }) => "deadline while dialling",
        Err(RpcError::Deadline { .. }) => "deadline",
        Err(RpcError::Unreachable { .. }) => "unreachable",
        Err(RpcError::Remote { .. }) => "remote error",
        Err(RpcError::Refused { .. }) => "refused",
        Err(RpcError::Malformed { .. }) => "malformed",
        Err(RpcError::Cancelled) => "cancelled",
        Err(_) => "other error",
    }
    .to_owned()
}
