//! What a simulated process is made of: its own set of tasks, which can stand still or vanish as a whole.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    mem,
    panic::Location,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use futures::future::BoxFuture;
use skep_kernel::Spawner;
use tokio::task::LocalSet;

use crate::watch::Watch;

thread_local! {
    /// Processes that were started since the world was polled last, and who polls the world.
    static NEWBORN: RefCell<Option<(Vec<Driver>, Waker)>> = const { RefCell::new(None) };
    /// The node whose code runs now; 0 is the test itself.
    static CURRENT: Cell<u32> = const { Cell::new(0) };
}

/// The number of the node whose code runs on this thread now.
pub(crate) fn current_node() -> u32 {
    CURRENT.get()
}

/// Runs `work` as the code of a node.
pub(crate) fn as_node<R>(node: u32, work: impl FnOnce() -> R) -> R {
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

/// Gets the processes that were started since the last call; tells the world of the next one.
pub(crate) fn newborn(cx: &Context<'_>) -> Vec<Driver> {
    NEWBORN.with_borrow_mut(|newborn| {
        let drivers = newborn.take().map(|(drivers, _)| drivers).unwrap_or_default();
        *newborn = Some((Vec::new(), cx.waker().clone()));
        drivers
    })
}

/// No simulation runs on this thread any more.
pub(crate) fn forget_newborn() {
    drop(NEWBORN.take());
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pulse {
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
    /// Where its tasks were started, as far as they came through its spawner.
    tasks: BTreeMap<u64, &'static Location<'static>>,
    next_task: u64,
}

impl Process {
    /// A process that whoever calls this drives.
    pub fn new(node: u32) -> Self {
        let inner = Inner {
            pulse: Pulse::Beating,
            incoming: VecDeque::new(),
            waker: None,
            busy: true,
            tasks: BTreeMap::new(),
            next_task: 0,
        };
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
        Spawner::located(move |future, place| process.spawn(future, place))
    }

    fn spawn(&self, future: BoxFuture<'static, ()>, place: &'static Location<'static>) -> bool {
        let mut inner = self.lock();
        if inner.pulse == Pulse::Gone {
            return false;
        }
        inner.next_task += 1;
        let id = inner.next_task;
        inner.tasks.insert(id, place);
        let listed = Listed { process: self.clone(), id };
        inner.incoming.push_back(Box::pin(async move {
            let _listed = listed;
            future.await;
        }));
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

    /// For whoever drives it.
    pub fn set_busy(&self, busy: bool) {
        let mut inner = self.lock();
        inner.busy = busy || !inner.incoming.is_empty();
    }

    /// Where its living tasks were started, as far as they came through its spawner.
    pub fn tasks(&self) -> Vec<&'static Location<'static>> {
        self.lock().tasks.values().copied().collect()
    }

    /// For whoever drives it: how it is, and what it is to run now. It is told of the next change.
    pub fn look(&self, cx: &Context<'_>) -> (Pulse, VecDeque<BoxFuture<'static, ()>>) {
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

/// A task in the list of its process.
struct Listed {
    process: Process,
    id: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.process.lock().tasks.remove(&self.id);
    }
}

/// Polls the tasks of a process; ends when it is killed.
pub(crate) struct Driver {
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
                self.process.set_busy(false);
                Poll::Ready(())
            }
            Pulse::Beating => {
                let tasks = self.tasks.as_mut().expect("a driver is not polled after its end");
                let idle = as_node(node, || {
                    Watch::over(|| {
                        for future in incoming {
                            tasks.spawn_local(future);
                        }
                        Pin::new(tasks).poll(cx).is_ready()
                    })
                });
                self.process.set_busy(!idle);
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
            inner.pulse = Pulse::Gone;
            mem::take(&mut inner.incoming)
        };
        let tasks = self.tasks.take();
        as_node(node, || drop((incoming, tasks)));
        self.process.set_busy(false);
    }
}
