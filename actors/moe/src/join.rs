//! [`Join`]: when a fan-out is complete, without I/O. It is told of answers and of time and says what to do.
//!
//! A place of a row is won by the first answer to arrive for it. Waiting ends when nothing more can come, at the deadline,
//! or `timeout_after_k_min` after every row that can still have `k_min` answers has them. A row that failures left short,
//! or that still is when `replan_at` passes, is planned once more with other experts; both answers count, the first wins.

use std::{collections::BTreeMap, time::Duration};

use skep_kernel::{Deadline, Moment};
use skep_rpc::RpcError;

use crate::plan::{Place, Plan, Slot};

/// When a fan-out is complete.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JoinPolicy {
    /// Answers that each row needs.
    pub k_min: usize,
    /// When all waiting ends.
    pub deadline: Deadline,
    /// Longest wait once every row has `k_min` answers.
    pub timeout_after_k_min: Option<Duration>,
    /// When rows that are still short get other experts; `None` never plans again.
    pub replan_at: Option<Moment>,
    /// A row that cannot have `k_min` answers any more makes the others worthless.
    pub needs_every_row: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Wait for answers; call [`Join::on_time`] at `until` at the latest.
    Waiting { until: Moment },
    /// Find other experts for these rows, then call [`Join::extend`]. Each row is named once at the most.
    Replan { rows: Vec<usize> },
    /// Nothing more is waited for: call [`Join::finish`].
    Done,
}

/// A completed fan-out.
#[derive(Debug)]
pub(crate) struct Joined<T> {
    /// Per place (`rows × k`) the call that won it and the place's index in that call.
    pub winners: Vec<Option<(Slot, usize)>>,
    /// Answers that came in time.
    pub answers: BTreeMap<Slot, T>,
    /// Calls that failed.
    pub failures: Vec<(Slot, RpcError)>,
    /// Calls without an outcome.
    pub unanswered: Vec<Slot>,
    /// Rows with fewer than `k_min` answers.
    pub short: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// The row may be planned once more.
    Possible,
    /// Other experts are being looked for.
    Running,
    /// It has been, or there is no point.
    Over,
}

struct PendingCall {
    places: Vec<Place>,
    waiting: bool,
}

/// What is known of a row's places.
struct RowState {
    won: usize,
    /// Places that a pending call may still win.
    open: usize,
}

/// See the module's documentation.
pub(crate) struct Join<T> {
    policy: JoinPolicy,
    k: usize,
    calls: Vec<PendingCall>,
    /// Per place the number of pending calls for it.
    pending: Vec<u32>,
    winners: Vec<Option<(Slot, usize)>>,
    again: Vec<Again>,
    answers: BTreeMap<Slot, T>,
    failures: Vec<(Slot, RpcError)>,
    /// Since when every row that can has `k_min` answers.
    quorum_at: Option<Moment>,
    done: bool,
}

impl<T> Join<T> {
    /// Waits for all calls of a plan.
    pub fn new(plan: &Plan, policy: JoinPolicy) -> Self {
        let mut join = Self {
            policy,
            k: plan.k,
            calls: Vec::new(),
            pending: vec![0; plan.rows * plan.k],
            winners: vec![None; plan.rows * plan.k],
            again: vec![Again::Over; plan.rows],
            answers: BTreeMap::new(),
            failures: Vec::new(),
            quorum_at: None,
            done: false,
        };
        join.extend(plan, &[]);
        if policy.replan_at.is_some() {
            for row in 0..plan.rows {
                // A search that found too few the first time has nobody else to offer.
                let planned = join.row(row).open;
                if planned > 0 && planned >= policy.k_min {
                    join.again[row] = Again::Possible;
                }
            }
        }
        join
    }

    /// Waits for the calls that were added to the plan as well; the search for `rows` is over.
    pub fn extend(&mut self, plan: &Plan, rows: &[usize]) {
        for call in &plan.calls()[self.calls.len()..] {
            for place in &call.places {
                self.pending[place.row * self.k + place.rank] += 1;
            }
            self.calls.push(PendingCall { places: call.places.clone(), waiting: true });
        }
        for &row in rows {
            self.again[row] = Again::Over;
        }
    }

    /// Takes an outcome in. A second outcome of one call, and any after the end, are ignored.
    pub fn on_reply(&mut self, now: Moment, slot: Slot, outcome: Result<T, RpcError>) -> Progress {
        let Some(call) = self.calls.get_mut(slot.0).filter(|call| call.waiting && !self.done) else {
            return self.on_time(now);
        };
        call.waiting = false;
        for (index, place) in call.places.iter().enumerate() {
            let at = place.row * self.k + place.rank;
            self.pending[at] -= 1;
            if outcome.is_ok() && self.winners[at].is_none() {
                self.winners[at] = Some((slot, index));
            }
        }
        match outcome {
            Ok(answer) => drop(self.answers.insert(slot, answer)),
            Err(failure) => self.failures.push((slot, failure)),
        }
        self.on_time(now)
    }

    /// Says what is due now.
    pub fn on_time(&mut self, now: Moment) -> Progress {
        if self.done || self.policy.deadline.has_passed(now) {
            return self.end();
        }
        let (mut replan, mut open) = (Vec::new(), 0);
        let (mut hopeless, mut undecided, mut may_replan) = (false, false, false);
        let is_late = self.policy.replan_at.is_some_and(|at| now >= at);
        for row in 0..self.again.len() {
            let RowState { won, open: row_open } = self.row(row);
            open += row_open;
            if won >= self.policy.k_min {
                continue;
            }
            let can_win = won + row_open >= self.policy.k_min;
            match self.again[row] {
                Again::Possible if is_late || !can_win => {
                    self.again[row] = Again::Running;
                    replan.push(row);
                }
                Again::Over if !can_win => hopeless = true,
                again => {
                    undecided = true;
                    may_replan |= again == Again::Possible;
                }
            }
        }
        if !replan.is_empty() {
            return Progress::Replan { rows: replan };
        }
        let searching = self.again.contains(&Again::Running);
        if (open == 0 && !searching) || (hopeless && self.policy.needs_every_row) {
            return self.end();
        }
        let mut until = self.policy.deadline.moment();
        if let Some(wait) = self.policy.timeout_after_k_min.filter(|_| !undecided) {
            let quorum_at = *self.quorum_at.get_or_insert(now);
            until = until.min(quorum_at + wait);
            if now >= until {
                return self.end();
            }
        }
        if let Some(at) = self.policy.replan_at.filter(|_| may_replan) {
            until = until.min(at);
        }
        Progress::Waiting { until }
    }

    /// Ranks of a row that other experts may fill: those that failed first, then those still waited for.
    pub fn vacant(&self, row: usize) -> Vec<usize> {
        let vacant = (0..self.k).filter(|rank| self.winners[row * self.k + rank].is_none());
        let mut vacant: Vec<usize> = vacant.collect();
        vacant.sort_by_key(|rank| (self.pending[row * self.k + rank] > 0, *rank));
        vacant
    }

    /// Calls that keep us waiting: without an outcome although `replan_at` has passed. Before that they are merely at work.
    pub fn late(&self, now: Moment) -> impl Iterator<Item = Slot> {
        let is_late = self.policy.replan_at.is_some_and(|at| now >= at);
        self.waiting().filter(move |_| is_late)
    }

    /// Calls that are still waited for.
    fn waiting(&self) -> impl Iterator<Item = Slot> {
        self.calls.iter().enumerate().filter(|(_, call)| call.waiting).map(|(slot, _)| Slot(slot))
    }

    /// Calls that failed so far, and how.
    pub fn failures(&self) -> &[(Slot, RpcError)] {
        &self.failures
    }

    /// What came of it.
    pub fn finish(self) -> Joined<T> {
        let short = (0..self.again.len()).filter(|&row| self.row(row).won < self.policy.k_min).collect();
        let unanswered = self.waiting().collect();
        Joined { winners: self.winners, answers: self.answers, failures: self.failures, unanswered, short }
    }

    fn end(&mut self) -> Progress {
        self.done = true;
        Progress::Done
    }

    fn row(&self, row: usize) -> RowState {
        let places = row * self.k..(row + 1) * self.k;
        let won = self.winners[places.clone()].iter().flatten().count();
        let open = places.filter(|&at| self.winners[at].is_none() && self.pending[at] > 0).count();
        RowState { won, open }
    }
}

#[cfg(test)]
mod schedules;
#[cfg(test)]
mod tests;
