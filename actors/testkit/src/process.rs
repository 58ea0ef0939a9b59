//! What a simulated process is made of: its own set of tasks, which can stand still or vanish as a whole.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use futures::{Stream, future::BoxFuture, stream::FuturesUnordered};
use skep_kernel::Spawner;
use tokio::task::LocalSet;

thread_local! {
    /// Processes that were started since the world was polled last, and who polls the world.
    static NEWBORN: RefCell<Option<(Vec<Driver>, Waker)>> = const { RefCell::new(None) };
    /// The node whose tasks run now; 0 is the test itself.
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

/// The number of the node whose code runs on this thread now.
pub(crate) fn current_node() -> u32 {
    CURRENT.get()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pulse {
    Beating,
    Standing,
    Gone,
}

/// A handle of a process, from any thread.
#[derive(Clone)]
pub(crate) struct Process(Arc<Shared>);

struct Shared {
    node: u32,
    inner: Mutex<Inner>,
}

struct Inner {
    pulse: Pulse,
    incoming: VecDeque<BoxFuture<'static, ()>>,
    waker: Option<Waker>,
    /// Whether a task of it lives.
    busy: bool,
}

impl Process {
    fn new(node: u32) -> Self {
        let inner = Inner { pulse: Pulse::Beating, incoming: VecDeque::new(), waker: None, busy: true };
        Self(Arc::new(Shared { node, inner: Mutex::new(inner) }))
    }

    /// Starts a process by running `boot` in it: what that spawns belongs to the process.
    ///
    /// # Panics
    /// Outside the thread of a running simulation.
    pub fn start<R>(node: u32, boot: impl FnOnce(&Process) -> R) -> (Self, R) {
        let process = Self::new(node);
        let tasks = LocalSet::new();
        let booted = {
            let _entered = tasks.enter();
            as_node(node, || boot(&process))
        };
        let driver = Driver { process: process.clone(), tasks: Some(tasks) };
        NEWBORN.with_borrow_mut(|newborn| {
            let (drivers, world) = newborn.as_mut().expect("nodes are started on the thread of their simulation");
            drivers.push(driver);
            world.wake_by_ref();
        });
        (process, booted)
    }

    /// Starts futures in the process. It takes none once it is gone.
    pub fn spawner(&self) -> Spawner {
        let process = self.clone();
        Spawner::new(move |future| process.spawn(future))
    }

    fn spawn(&self, future: BoxFuture<'static, ()>) -> bool {
        let mut inner = self.lock();
        if inner.pulse == Pulse::Gone {
            return false;
        }
        inner.incoming.push_back(future);
        inner.busy = true;
        inner.wake();
        true
    }

    /// Drops all its tasks where they stand.
    pub fn kill(&self) {
        self.set(Pulse::Gone);
    }

    /// Nothing of it runs until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.set(Pulse::Standing);
    }

    /// Goes on where it stood.
    pub fn thaw(&self) {
        self.set(Pulse::Beating);
    }

    fn set(&self, pulse: Pulse) {
        let mut inner = self.lock();
        if inner.pulse != Pulse::Gone {
            inner.pulse = pulse;
            inner.wake();
        }
    }

    /// Whether a task of it lives.
    pub fn is_busy(&self) -> bool {
        self.lock().busy
    }

    /// For whoever drives it: how it is, and what it is to run now. It is told of the next change.
    fn look(&self, cx: &Context<'_>) -> (Pulse, VecDeque<BoxFuture<'static, ()>>) {
        let mut inner = self.lock();
        inner.waker = Some(cx.waker().clone());
        let incoming = if inner.pulse == Pulse::Standing { VecDeque::new() } else { mem::take(&mut inner.incoming) };
        (inner.pulse, incoming)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().expect("nothing panics while it holds a process")
    }
}

impl Inner {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Runs `work` as the code of a node.
fn as_node<R>(node: u32, work: impl FnOnce() -> R) -> R {
    /// Also when it panics.
    struct Back(u32);
    impl Drop for Back {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _back = Back(CURRENT.replace(node));
    work()
}

/// Polls the tasks of a process; ends when it is killed.
struct Driver {
    process: Process,
    tasks: Option<LocalSet>,
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let (pulse, incoming) = self.process.look(cx);
        let node = self.process.0.node;
        match pulse {
            Pulse::Standing => Poll::Pending,
            Pulse::Gone => {
                let tasks = self.tasks.take();
                as_node(node, || drop((incoming, tasks)));
                self.process.lock().busy = false;
                Poll::Ready(())
            }
            Pulse::Beating => {
                let tasks = self.tasks.as_mut().expect("a driver is not polled after its end");
                let idle = as_node(node, || {
                    for future in incoming {
                        tasks.spawn_local(future);
                    }
                    Pin::new(tasks).poll(cx).is_ready()
                });
                let mut inner = self.process.lock();
                inner.busy = !idle || !inner.incoming.is_empty();
                Poll::Pending
            }
        }
    }
}

impl Drop for Driver {
    /// A simulation that ends takes its processes along.
    fn drop(&mut self) {
        let node = self.process.0.node;
        let incoming = {
            let mut inner = self.process.lock();
            (inner.pulse, inner.busy) = (Pulse::Gone, false);
            mem::take(&mut inner.incoming)
        };
        let tasks = self.tasks.take();
        as_node(node, || drop((incoming, tasks)));
    }
}

/// All processes of a simulation, and the test.
pub(crate) struct World {
    drivers: FuturesUnordered<Driver>,
    test: Process,
    /// Tasks of the test's own.
    tasks: LocalSet,
}

impl World {
    pub fn new() -> Self {
        Self { drivers: FuturesUnordered::new(), test: Process::new(0), tasks: LocalSet::new() }
    }

    /// The test itself as a process.
    pub fn test(&self) -> &Process {
        &self.test
    }

    /// Runs the processes beside the test until that ends. They stay as they are then.
    pub async fn run<R, F: Future<Output = R>>(&mut self, test: impl FnOnce() -> F) -> R {
        let Self { drivers, test: process, tasks } = self;
        let mut test = std::pin::pin!(tasks.run_until(async { test().await }));
        let result = std::future::poll_fn(|cx| {
            NEWBORN.with_borrow_mut(|newborn| match newborn {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => *newborn = Some((Vec::new(), cx.waker().clone())),
            });
            let (_, incoming) = process.look(cx);
            for future in incoming {
                tasks.spawn_local(future);
            }
            if let Poll::Ready(result) = test.as_mut().poll(cx) {
                return Poll::Ready(result);
            }
            loop {
                let newborn = NEWBORN.with_borrow_mut(|newborn| mem::take(&mut newborn.as_mut().expect("set above").0));
                drivers.extend(newborn);
                match Pin::new(&mut *drivers).poll_next(cx) {
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) | Poll::Pending => return Poll::Pending,
                }
            }
        });
        result.await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        NEWBORN.with_borrow_mut(|newborn| drop(newborn.take()));
    }
}
