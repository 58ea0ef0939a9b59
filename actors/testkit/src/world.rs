//! [`World`]: everything that runs in a simulation, driven from one future.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, stream::FuturesUnordered};
use skep_kernel::{Moment, SharedClock};
use tokio::task::LocalSet;

use crate::{
    process::{Driver, Process, current_node, forget_newborn, newborn},
    watch::Watch,
};

/// Why a test did not come to its end.
pub(crate) enum Failure {
    /// It panicked, with this.
    Panic(Box<dyn Any + Send>),
    /// Its time is over, and nothing has run since then.
    TimeIsOver { last_ran: Moment },
    /// It left this behind.
    Left(Vec<String>),
}

/// All processes of a simulation, and the test's own tasks.
pub(crate) struct World {
    clock: SharedClock,
    drivers: FuturesUnordered<Driver>,
    test: Process,
    tasks: LocalSet,
}

impl World {
    pub fn new(clock: SharedClock) -> Self {
        Watch::begin();
        Self { clock, drivers: FuturesUnordered::new(), test: Process::new(0), tasks: LocalSet::new() }
    }

    /// The time of this world.
    pub fn clock(&self) -> SharedClock {
        self.clock.clone()
    }

    /// The test itself as a process.
    pub fn test(&self) -> &Process {
        &self.test
    }

    /// Runs the processes beside the test until it ends, or until `limit`. The processes stay as they are then.
    pub async fn run<R, F: Future<Output = R>>(
        &mut self,
        test: impl FnOnce() -> F,
        limit: Moment,
    ) -> Result<R, Failure> {
        let Self { clock, drivers, test: process, tasks } = self;
        let mut test = std::pin::pin!(tasks.run_until(async { test().await }));
        let mut alarm = clock.sleep_until(limit);
        let mut last_ran = clock.now();
        let outcome = std::future::poll_fn(|cx| {
            let now = clock.now();
            Watch::look(current_node());
            let turn = catch_unwind(AssertUnwindSafe(|| {
                drivers.extend(newborn(cx));
                let (_, incoming) = process.look(cx);
                for future in incoming {
                    tasks.spawn_local(future);
                }
                let done = Watch::over(|| test.as_mut().poll(cx));
                if done.is_pending() {
                    drive(drivers, cx);
                }
                done
            }));
            match turn {
                Err(panic) => Poll::Ready(Err(Failure::Panic(panic))),
                Ok(Poll::Ready(result)) => Poll::Ready(Ok(result)),
                Ok(Poll::Pending) if alarm.as_mut().poll(cx).is_ready() => {
                    Poll::Ready(Err(Failure::TimeIsOver { last_ran }))
                }
                Ok(Poll::Pending) => {
                    last_ran = now;
                    Poll::Pending
                }
            }
        });
        outcome.await
    }

    /// Whether a task of the test's own lives, among them actors that it started outside of all nodes. It is polled
    /// once.
    pub async fn test_is_busy(&mut self) -> bool {
        std::future::poll_fn(|cx| {
            let (_, incoming) = self.test.look(cx);
            for future in incoming {
                self.tasks.spawn_local(future);
            }
            Poll::Ready(Pin::new(&mut self.tasks).poll(cx).is_pending())
        })
        .await
    }
}

/// Lets every process run that can.
fn drive(drivers: &mut FuturesUnordered<Driver>, cx: &mut Context<'_>) {
    loop {
        drivers.extend(newborn(cx));
        match Pin::new(&mut *drivers).poll_next(cx) {
            Poll::Ready(Some(())) => {}
            Poll::Ready(None) | Poll::Pending => return,
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        forget_newborn();
    }
}
