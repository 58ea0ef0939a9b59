//! One timer for many deadlines.

use std::task::{Context, Poll};

use futures::{FutureExt as _, future::BoxFuture};
use skep_kernel::{Moment, SharedClock};

/// Wakes its task when the earliest of many moments has come. Later calls have later deadlines as a rule, so the timer
/// is set anew about once per deadline's length, not once per call.
pub(super) struct Alarm {
    clock: SharedClock,
    set: Option<(Moment, BoxFuture<'static, ()>)>,
}

impl Alarm {
    pub(super) fn new(clock: SharedClock) -> Self {
        Self { clock, set: None }
    }

    /// Now, if something may be due; the task is woken at `earliest` at the latest otherwise.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, earliest: Option<Moment>) -> Option<Moment> {
        let earliest = earliest?;
        let (_, timer) = match &mut self.set {
            Some(set) if set.0 <= earliest => set,
            unset => unset.insert((earliest, self.clock.sleep_until(earliest))),
        };
        match timer.poll_unpin(cx) {
            Poll::Pending => None,
            Poll::Ready(()) => {
                self.set = None;
                Some(self.clock.now())
            }
        }
    }
}
