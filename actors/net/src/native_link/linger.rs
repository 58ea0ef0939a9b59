//! How long a connection counts as used after a call.

use std::{task::Context, time::Duration};

use skep_kernel::{Moment, SharedClock};

use super::alarm::Alarm;

/// The swarm sets its timer for idle connections each time one falls idle, which between two calls is too often.
const LINGER: Duration = Duration::from_secs(60);

/// Whether a connection has carried a call within the last minute.
pub(crate) struct Linger {
    clock: SharedClock,
    alarm: Alarm,
    until: Option<Moment>,
}

impl Linger {
    pub(crate) fn new(clock: SharedClock) -> Self {
        Self { alarm: Alarm::new(clock.clone()), clock, until: None }
    }

    /// Notes whether calls are under way now.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, is_busy: bool) {
        if is_busy {
            self.until = Some(self.clock.now() + LINGER);
        }
        while let Some(now) = self.alarm.poll(cx, self.until) {
            self.until = self.until.filter(|until| *until > now);
        }
    }

    /// Whether the minute is not over.
    pub(crate) fn is_used(&self) -> bool {
        self.until.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Arc, task::Poll};

    use skep_kernel::{TokioClock, WallTime};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_counts_as_used_for_a_minute_after_its_last_call() {
        let clock: SharedClock = Arc::new(TokioClock::starting_at(WallTime(0.0)));
        let mut linger = Linger::new(clock.clone());
        let mut at = async |seconds: u64, is_busy: bool| {
            clock.sleep_until(Moment::START + Duration::from_secs(seconds)).await;
            poll_fn(|cx| {
                linger.poll(cx, is_busy);
                Poll::Ready(())
            })
            .await;
            linger.is_used()
        };
        assert!(!at(0, false).await);
        assert!(at(10, true).await && at(20, false).await && at(50, true).await);
        assert!(at(71, false).await && at(109, false).await);
        assert!(!at(111, false).await);
        assert!(at(200, true).await);
    }
}
