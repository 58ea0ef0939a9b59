//! [`NodeClock`]: a node's own clock, whose wall time may be off.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use futures::future::BoxFuture;
use skep_kernel::{Clock, Moment, SharedClock, WallTime};

/// Counts like the simulation's clock; tells another wall time.
pub(crate) struct NodeClock {
    base: SharedClock,
    skew: Mutex<f64>,
    timers: Arc<AtomicUsize>,
}

impl NodeClock {
    pub fn new(base: SharedClock) -> Self {
        Self { base, skew: Mutex::new(0.0), timers: Arc::default() }
    }

    /// Sets by how many seconds wall time is ahead.
    pub fn skew(&self, seconds: f64) {
        *self.skew.lock().unwrap_or_else(PoisonError::into_inner) = seconds;
    }

    /// Timers that are set.
    pub fn timers(&self) -> usize {
        self.timers.load(Ordering::Relaxed)
    }
}

impl Clock for NodeClock {
    fn now(&self) -> Moment {
        self.base.now()
    }

    fn wall(&self) -> WallTime {
        self.base.wall() + *self.skew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        let (timer, sleep) = (Timer::set(&self.timers), self.base.sleep_until(at));
        Box::pin(async move {
            let _timer = timer;
            sleep.await;
        })
    }
}

/// Counts as long as it lives.
struct Timer(Arc<AtomicUsize>);

impl Timer {
    fn set(timers: &Arc<AtomicUsize>) -> Self {
        timers.fetch_add(1, Ordering::Relaxed);
        Self(timers.clone())
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
