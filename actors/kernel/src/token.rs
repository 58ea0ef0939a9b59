//! Who may run an expert: the ready token's state machine, without executors, queues or tensors.
//!
//! One atomic an expert. Work goes into the mailbox first, then [`ReadyToken::on_push`] says whether a token has to be
//! queued for the executors. So at any time, with work in line,
//!
//! * there is exactly one token in the queue ([`State::Ready`]), or
//! * one executor owns the expert and looks at the mailbox again before it lets go ([`State::Running`]), or
//! * the expert is parked below its least batch size and its alarm is set ([`State::Parked`]), or
//! * it is closed, and whoever closed it drains the mailbox.
//!
//! The executor that got `true` from [`ReadyToken::on_take`] or [`ReadyToken::on_alarm`] owns the expert until it calls
//! [`ReadyToken::on_finish`], or [`ReadyToken::on_park`] parks it. `tests/loom_token.rs` runs this file
//! through loom.

use crate::sync::{AtomicU8, Ordering};

/// What an expert is up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// No work, no token.
    Idle = 0,
    /// One token is in the executors' queue.
    Ready = 1,
    /// An executor owns the expert.
    Running = 2,
    /// An executor owns the expert, and work has come since it began.
    RunningDirty = 3,
    /// Work is in line, but less than the least batch: it waits for more or for its alarm.
    Parked = 4,
    /// Removed for good.
    Closed = 5,
}

impl State {
    const ALL: [State; 6] =
        [State::Idle, State::Ready, State::Running, State::RunningDirty, State::Parked, State::Closed];
}

/// What became of an owner's wish to park.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parking {
    /// Parked; the next push or the alarm wakes it.
    Parked,
    /// Work has come meanwhile; the expert is still owned.
    LookAgain,
    /// The expert was closed; there is nothing left to do.
    Closed,
}

/// One expert's token; starts [`State::Idle`].
#[derive(Debug)]
pub struct ReadyToken(AtomicU8);

impl Default for ReadyToken {
    fn default() -> Self {
        Self::new()
    }
}

impl ReadyToken {
    /// An idle expert's.
    pub fn new() -> Self {
        Self(AtomicU8::new(State::Idle as u8))
    }

    /// After work was put into the mailbox. `true`: the caller must queue a token.
    #[must_use = "a token that is not queued leaves the expert asleep for good"]
    pub fn on_push(&self) -> bool {
        let (from, _) = self.step(|state| match state {
            State::Idle | State::Parked => State::Ready,
            State::Running => State::RunningDirty,
            State::Ready | State::RunningDirty | State::Closed => state,
        });
        matches!(from, State::Idle | State::Parked)
    }

    /// An executor took the token from the queue. `true`: it owns the expert; `false`: the expert was closed, and the
    /// token is void.
    #[must_use = "whoever owns the expert must finish or park it"]
    pub fn on_take(&self) -> bool {
        self.own(State::Ready)
    }

    /// The owner found less than the least batch. Once parked the expert is no longer owned, and the caller sets an
    /// alarm for it.
    #[must_use = "a parked expert needs an alarm, another one its owner"]
    pub fn on_park(&self) -> Parking {
        let (_, to) = self.step(|state| match state {
            State::Running => State::Parked,
            State::RunningDirty => State::Running,
            State::Idle | State::Ready | State::Parked | State::Closed => state,
        });
        match to {
            State::Parked => Parking::Parked,
            State::Closed => Parking::Closed,
            State::Idle | State::Ready | State::Running | State::RunningDirty => Parking::LookAgain,
        }
    }

    /// The alarm of a parked expert went off. `true`: the caller owns the expert; `false`: it was woken by work
    /// meanwhile or is closed, and the alarm is void.
    #[must_use = "whoever owns the expert must finish or park it"]
    pub fn on_alarm(&self) -> bool {
        self.own(State::Parked)
    }

    /// The owner is done with its batch and lets go. `still_has_work` says that the mailbox was not empty when last
    /// seen. `true`: the caller must queue the token again, at the tail.
    #[must_use = "a token that is not queued leaves the expert asleep for good"]
    pub fn on_finish(&self, still_has_work: bool) -> bool {
        let (_, to) = self.step(|state| match state {
            State::Running if !still_has_work => State::Idle,
            State::Running | State::RunningDirty => State::Ready,
            State::Idle | State::Ready | State::Parked | State::Closed => state,
        });
        to == State::Ready
    }

    /// Ends it for good. `true` for the first caller, who closes the mailbox and answers what was in line; an executor
    /// that owns the expert finishes its batch.
    #[must_use = "who closes first drains the mailbox"]
    pub fn close(&self) -> bool {
        let (from, _) = self.step(|_| State::Closed);
        from != State::Closed
    }

    /// What the expert is up to; may be outdated at once.
    pub fn state(&self) -> State {
        State::ALL[usize::from(self.0.load(Ordering::Acquire))]
    }

    fn own(&self, from: State) -> bool {
        let (old, new) = (from as u8, State::Running as u8);
        self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Moves from the present state to `next` of it, and says which ones these were. Writes even when nothing changes:
    /// a push that finds Running-dirty must still be seen by the owner that lets go.
    fn step(&self, next: impl Fn(State) -> State) -> (State, State) {
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            let from = State::ALL[usize::from(seen)];
            let to = next(from);
            match self.0.compare_exchange_weak(seen, to as u8, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (from, to),
                Err(now) => seen = now,
            }
        }
    }
}
