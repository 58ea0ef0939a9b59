//! When a supervised actor is started again: no actors, no timers, only the decision.

use std::{collections::VecDeque, time::Duration};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::{Exit, Moment, random::Seed};

/// Which ends of a child call for a restart (as in OTP).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Every end.
    Permanent,
    /// A failure or a panic.
    Transient,
    /// None.
    Temporary,
}

impl Restart {
    fn calls_for(self, exit: &Exit) -> bool {
        match self {
            Restart::Permanent => true,
            Restart::Transient => matches!(exit, Exit::Failed(_) | Exit::Panicked),
            Restart::Temporary => false,
        }
    }
}

/// How many restarts are borne: one more within the window escalates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intensity {
    /// Restarts that are borne within the window.
    pub restarts: usize,
    /// The sliding window.
    pub within: Duration,
}

impl Default for Intensity {
    /// 5 in 60 s.
    fn default() -> Self {
        Self { restarts: 5, within: Duration::from_secs(60) }
    }
}

/// Shortest wait before a restart.
pub const LEAST_BACKOFF: Duration = Duration::from_millis(200);
/// Longest wait before a restart.
pub const MOST_BACKOFF: Duration = Duration::from_secs(30);

/// What to do about an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start again after a wait.
    Restart {
        /// The wait: jittered, doubling with every failure that follows closely on another.
        after: Duration,
    },
    /// Too many restarts: give up and tell whoever supervises the supervisor.
    Escalate,
    /// It ended as it should.
    Forget,
}

/// One child's past.
#[derive(Clone, Debug)]
pub struct History {
    policy: Restart,
    started: Moment,
    streak: u32,
    restarts: u64,
}

impl History {
    /// Of a child that has not run yet.
    pub fn new(policy: Restart) -> Self {
        Self { policy, started: Moment::START, streak: 0, restarts: 0 }
    }

    /// The child runs (again) from now.
    pub fn on_start(&mut self, now: Moment) {
        self.started = now;
    }

    /// Restarts so far.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }
}

/// The restarts of one supervisor's children, which share an intensity.
#[derive(Debug)]
pub struct RestartLog {
    intensity: Intensity,
    recent: VecDeque<Moment>,
    rng: ChaCha8Rng,
}

impl RestartLog {
    /// An empty log; `seed` decides the jitter.
    pub fn new(intensity: Intensity, seed: Seed) -> Self {
        Self { intensity, recent: VecDeque::new(), rng: seed.rng() }
    }

    /// Decides about a child that ended at `now`, and remembers the restart if there is one.
    pub fn on_exit(&mut self, now: Moment, child: &mut History, exit: &Exit) -> Decision {
        if !child.policy.calls_for(exit) {
            return Decision::Forget;
        }
        while self.recent.front().is_some_and(|oldest| now - *oldest >= self.intensity.within) {
            self.recent.pop_front();
        }
        if self.recent.len() >= self.intensity.restarts {
            return Decision::Escalate;
        }
        self.recent.push_back(now);
        let ran_well = now - child.started >= self.intensity.within;
        child.streak = if ran_well { 0 } else { child.streak };
        let after = self.backoff(child.streak);
        child.streak = child.streak.saturating_add(1);
        child.restarts += 1;
        Decision::Restart { after }
    }

    /// Between half and all of 0.4 s × 2ⁿ, at most [`MOST_BACKOFF`]: never below [`LEAST_BACKOFF`].
    fn backoff(&mut self, streak: u32) -> Duration {
        let doublings = 2u32.saturating_pow(streak.saturating_add(1));
        let ceiling = LEAST_BACKOFF.saturating_mul(doublings).min(MOST_BACKOFF);
        self.rng.random_range(ceiling / 2..=ceiling)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn log() -> RestartLog {
        RestartLog::new(Intensity::default(), Seed::new(1))
    }

    fn after(decision: Decision) -> Duration {
        match decision {
            Decision::Restart { after } => after,
            other => panic!("{other:?} instead of a restart"),
        }
    }

    #[test]
    fn policies_look_at_the_exit() {
        let exits = [Exit::Finished, Exit::Stopped, Exit::Failed("why".into()), Exit::Panicked];
        let restarts = |policy| {
            let decide = |exit| log().on_exit(Moment::START, &mut History::new(policy), exit) != Decision::Forget;
            exits.iter().map(decide).collect::<Vec<_>>()
        };
        assert_eq!(restarts(Restart::Permanent), [true, true, true, true]);
        assert_eq!(restarts(Restart::Transient), [false, false, true, true]);
        assert_eq!(restarts(Restart::Temporary), [false, false, false, false]);
    }

    #[test]
    fn the_sixth_restart_within_a_minute_escalates() {
        let (mut log, mut child) = (log(), History::new(Restart::Permanent));
        for n in 0..5 {
            after(log.on_exit(Moment::START + n * 11 * SECOND, &mut child, &Exit::Panicked));
        }
        let last = Moment::START + 59 * SECOND;
        assert_eq!(log.on_exit(last, &mut child, &Exit::Panicked), Decision::Escalate);
        after(log.on_exit(last + SECOND, &mut child, &Exit::Panicked));
        assert_eq!(child.restarts(), 6);
    }

    #[test]
    fn children_share_the_intensity() {
        let mut log = log();
        for _ in 0..5 {
            after(log.on_exit(Moment::START, &mut History::new(Restart::Permanent), &Exit::Panicked));
        }
        let mut another = History::new(Restart::Transient);
        assert_eq!(log.on_exit(Moment::START, &mut another, &Exit::Panicked), Decision::Escalate);
    }

    #[test]
    fn the_wait_doubles_while_failures_follow_closely_and_starts_over_after_a_good_run() {
        let (mut log, mut child) = (log(), History::new(Restart::Permanent));
        let mut now = Moment::START;
        for ceiling in [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0] {
            let wait = after(log.on_exit(now, &mut child, &Exit::Panicked)).as_secs_f64();
            assert!((ceiling / 2.0..=ceiling).contains(&wait), "{wait} s where at most {ceiling} s are due");
            now = now + 13 * SECOND;
            child.on_start(now);
        }
        now = now + 60 * SECOND;
        assert!(after(log.on_exit(now, &mut child, &Exit::Panicked)) <= Duration::from_millis(400));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_window_sees_more_restarts_than_are_borne(gaps in prop::collection::vec(0u64..40_000, 1..200)) {
            let (mut log, mut child) = (log(), History::new(Restart::Permanent));
            let (mut now, mut restarts) = (Moment::START, Vec::<Moment>::new());
            for gap in gaps {
                now = now + Duration::from_millis(gap);
                child.on_start(now);
                let in_window = restarts.iter().filter(|at| now - **at < 60 * SECOND).count();
                match log.on_exit(now, &mut child, &Exit::Panicked) {
                    Decision::Restart { after } => {
                        prop_assert!(in_window < 5);
                        prop_assert!((LEAST_BACKOFF..=MOST_BACKOFF).contains(&after));
                        restarts.push(now);
                    }
                    Decision::Escalate => prop_assert!(in_window >= 5),
                    Decision::Forget => prop_assert!(false, "a permanent child is never forgotten"),
                }
            }
        }
    }
}
