//! One notion of time for everything that decides: [`Moment`] and [`Deadline`] come from a [`Clock`], so tests can move it.

#![allow(clippy::disallowed_methods, reason = "this is the clock")]

use std::{
    fmt,
    ops::{Add, Sub},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;

/// A point of monotonic time in nanoseconds since its clock started. Moments of different clocks do not compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Moment(u64);

/// The moment at which a wait ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Deadline(Moment);

/// Seconds since the Unix epoch as hivemind's DHT counts them; may be skewed against other machines.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct WallTime(pub f64);

impl Moment {
    /// The moment at which the clock started.
    pub const START: Moment = Moment(0);

    /// A moment so many nanoseconds after its clock's start.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock started.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time passed since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;
    fn add(self, by: Duration) -> Moment {
        Moment(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Moment> for Moment {
    type Output = Duration;
    fn sub(self, earlier: Moment) -> Duration {
        self.since(earlier)
    }
}

impl Deadline {
    /// Ends at this moment.
    pub const fn at(moment: Moment) -> Self {
        Self(moment)
    }

    /// Ends so long after `now`.
    pub fn after(now: Moment, wait: Duration) -> Self {
        Self(now + wait)
    }

    /// The moment at which it ends.
    pub const fn moment(self) -> Moment {
        self.0
    }

    /// What is left; zero when it has passed.
    pub fn remaining(self, now: Moment) -> Duration {
        self.0.since(now)
    }

    /// Whether it has passed.
    pub fn has_passed(self, now: Moment) -> bool {
        now >= self.0
    }

    /// The earlier of two.
    pub fn min(self, other: Deadline) -> Deadline {
        Ord::min(self, other)
    }
}

impl Add<f64> for WallTime {
    type Output = WallTime;
    fn add(self, seconds: f64) -> WallTime {
        WallTime(self.0 + seconds)
    }
}

impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

/// Where time comes from. All parts of one runtime share one clock.
pub trait Clock: Send + Sync {
    /// Monotonic now.
    fn now(&self) -> Moment;
    /// Wall-clock now, for DHT records.
    fn wall(&self) -> WallTime;
    /// Completes at `at`, at once when that has passed. Dropping the future forgets the timer.
    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()>;
}

/// A clock that is shared by the parts of one runtime.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock, counted by tokio: under a paused runtime it is virtual.
#[derive(Clone, Debug)]
pub struct TokioClock {
    start: tokio::time::Instant,
    /// Wall time at `start` under virtual time; `None` reads the system's clock.
    epoch: Option<WallTime>,
}

impl TokioClock {
    /// Starts counting now; wall time is the system's.
    pub fn system() -> Self {
        Self { start: tokio::time::Instant::now(), epoch: None }
    }

    /// Starts counting now; wall time runs from `epoch` at the pace of tokio's clock.
    pub fn starting_at(epoch: WallTime) -> Self {
        Self { start: tokio::time::Instant::now(), epoch: Some(epoch) }
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Moment {
        Moment::START + self.start.elapsed()
    }

    fn wall(&self) -> WallTime {
        match self.epoch {
            Some(epoch) => epoch + self.start.elapsed().as_secs_f64(),
            None => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                WallTime(now.unwrap_or_default().as_secs_f64())
            }
        }
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        let wake = self.start + at.since(Moment::START);
        Box::pin(async move { tokio::time::sleep_until(wake).await })
    }
}

/// Ends `work` at the deadline: `Err(Elapsed)` and `work` is dropped.
pub async fn before<T>(clock: &dyn Clock, deadline: Deadline, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let alarm = clock.sleep_until(deadline.moment());
    tokio::select! {
        biased;
        done = work => Ok(done),
        () = alarm => Err(Elapsed),
    }
}

/// The deadline passed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("deadline passed")]
pub struct Elapsed;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_that_outlives_its_deadline_is_dropped() {
        let clock = TokioClock::starting_at(WallTime(1000.0));
        let deadline = Deadline::after(clock.now(), Duration::from_secs(3));
        let never = std::future::pending::<()>();
        assert_eq!(before(&clock, deadline, never).await, Err(Elapsed));
        assert!(deadline.has_passed(clock.now()));
        assert_eq!(clock.wall(), WallTime(1003.0));
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_done_wins_over_a_deadline_that_passed() {
        let clock = TokioClock::starting_at(WallTime(0.0));
        let deadline = Deadline::at(clock.now());
        assert_eq!(before(&clock, deadline, async { 7 }).await, Ok(7));
    }
}
