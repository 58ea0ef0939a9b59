//! [`World`]: everything that runs in a simulation, driven from one future.

use std::{
    any::Any,
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use futures::{FutureExt, Stream, future::BoxFuture, stream::FuturesUnordered};
use skep_kernel::{Moment, SharedClock};
use tokio::task::LocalSet;

use crate::{
    Sim,
    process::{Driver, Process, current_node, forget_newborn, newborn},
    report::report,
    watch::Watch,
};

/// Why a test did not come to its end.
pub(crate) enum Failure {
    /// It panicked, with this.
    Panic(Panic),
    /// Its time is over, and nothing has run since then.
    TimeIsOver { last_ran: Moment },
    /// It left this behind.
    Left(Vec<String>),
}

/// A failure and how the world was then.
pub(crate) struct Failed {
    pub why: Failure,
    pub report: String,
    pub waits: Vec<String>,
}

impl Failed {
    /// Looks at the world now.
    pub fn now(sim: &Sim, why: Failure) -> Self {
        Self { why, report: report(sim), waits: sim.waits() }
    }
}

/// All processes of a simulation, and the test's own tasks.
pub(crate) struct World {
    clock: SharedClock,
    drivers: FuturesUnordered<Driver>,
    test: Process,
    tasks: LocalSet,
    /// With what a task of the test panicked.
    panic: Rc<Cell<Option<Panic>>>,
}

type Panic = Box<dyn Any + Send>;

/// Starts a task of the test; a panic of it is the test's.
fn start(tasks: &LocalSet, task: BoxFuture<'static, ()>, panic: &Rc<Cell<Option<Panic>>>) {
    let panic = panic.clone();
    tasks.spawn_local(async move {
        if let Err(payload) = AssertUnwindSafe(task).catch_unwind().await {
            panic.set(Some(payload));
        }
    });
}

impl World {
    pub fn new(clock: SharedClock) -> Self {
        Watch::begin();
        let (drivers, test, tasks) = (FuturesUnordered::new(), Process::new(0), LocalSet::new());
        Self { clock, drivers, test, tasks, panic: Rc::default() }
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
        sim: &Sim,
        test: impl FnOnce() -> F,
        limit: Moment,
    ) -> Result<R, Failed> {
        let Self { clock, drivers, test: process, tasks, panic } = self;
        let mut test = std::pin::pin!(tasks.run_until(async { test().await }));
        let mut alarm = clock.sleep_until(limit);
        let mut last_ran = clock.now();
        let outcome = std::future::poll_fn(|cx| {
            let now = clock.now();
            Watch::look(current_node());
            let turn = catch_unwind(AssertUnwindSafe(|| {
                drivers.extend(newborn(cx));
                let (_, incoming) = process.look(cx);
                incoming.into_iter().for_each(|task| start(tasks, task, panic));
                let done = Watch::over(|| test.as_mut().poll(cx));
                if done.is_pending() {
                    drive(drivers, cx);
                }
                done
            }));
            if let Some(panic) = panic.take() {
                return Poll::Ready(Err(Failure::Panic(panic)));
            }
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
        // What the test waits for must be told before the test is dropped.
        outcome.await.map_err(|failure| Failed::now(sim, failure))
    }

    /// Whether a task of the test's own lives, among them actors that it started outside of all nodes. It is polled
    /// once.
    pub async fn test_is_busy(&mut self) -> bool {
        std::future::poll_fn(|cx| {
            let (_, incoming) = self.test.look(cx);
            incoming.into_iter().for_each(|task| start(&self.tasks, task, &self.panic));
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
