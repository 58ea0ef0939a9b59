//! Executors: threads that own experts one batch at a time. A batch is what queued up while they were busy.

mod inline;
mod niceness;
mod queue;
mod run;
mod streams;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use skep_kernel::{
    Deadline, Elapsed, Moment, Parking, SharedClock, ask::mark_runtime_thread, panics::contain, time::before,
};
use tokio::sync::oneshot;
use tracing::{debug, error};

pub use inline::Cost;
pub use streams::{Seat, Streams};

use crate::{
    expert::Expert,
    task::{InFlight, Ticket},
};
use niceness::stand_behind;
use queue::{ReadyQueue, Work};
use run::{Errand, Next};

/// Some executors and the queue they share; any of them may take any expert of the group.
#[derive(Clone)]
pub(crate) struct ExecutorGroup(Arc<Group>);

struct Group {
    queue: Arc<ReadyQueue>,
    clock: SharedClock,
    running: Arc<InFlight>,
    next_id: AtomicU64,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

/// Executors end with whoever could give them work.
impl Drop for Group {
    fn drop(&mut self) {
        self.queue.stop();
    }
}

/// The executors take no more jobs: too many wait, or they are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoExecutor;

impl ExecutorGroup {
    fn new(clock: SharedClock) -> Self {
        Self(Arc::new(Group {
            queue: Arc::default(),
            clock,
            running: Arc::default(),
            next_id: AtomicU64::new(0),
            threads: Mutex::default(),
        }))
    }

    /// Starts `n` threads `skep-exec-<device>-<i>`, so many steps nicer than the process.
    pub fn threads(clock: SharedClock, device: &str, n: usize, niceness: u8) -> std::io::Result<Self> {
        let group = Self::new(clock);
        for i in 0..n.max(1) {
            let (queue, clock, ticket) = (group.0.queue.clone(), group.0.clock.clone(), group.0.running.enter());
            let started = thread::Builder::new()
                .name(format!("skep-exec-{device}-{i}"))
                .spawn(move || serve(&queue, &clock, niceness, ticket));
            match started {
                Ok(thread) => group.keep(thread),
                Err(error) => {
                    group.0.queue.stop();
                    return Err(error);
                }
            }
        }
        Ok(group)
    }

    fn keep(&self, thread: thread::JoinHandle<()>) {
        self.0.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
    }

    /// The number of the next expert.
    pub fn next_id(&self) -> u64 {
        self.0.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub fn clock(&self) -> &SharedClock {
        &self.0.clock
    }

    pub fn now(&self) -> Moment {
        self.0.clock.now()
    }

    /// After work was put in line for an expert.
    pub fn announce(&self, expert: &Arc<Expert>) {
        if expert.token.on_push() {
            self.0.queue.push(expert.clone());
        }
    }

    /// Runs `work` on an executor; the receiver fails if it panics.
    pub fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Result<oneshot::Receiver<R>, NoExecutor> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            if !done.is_closed() {
                let _caller_left = done.send(work());
            }
        });
        self.0.queue.push_job(job).map_err(|_| NoExecutor)?;
        Ok(result)
    }

    /// Ends the executors once their queue is empty; waits for them until the deadline. A thread that is still busy then
    /// ends by itself after its batch.
    pub async fn stop(&self, deadline: Deadline) -> Result<(), Elapsed> {
        self.0.queue.stop();
        before(&*self.0.clock, deadline, self.0.running.idle()).await?;
        let threads = std::mem::take(&mut *self.0.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                error!("an executor thread panicked");
            }
        }
        Ok(())
    }
}

/// An executor thread's life.
fn serve(queue: &ReadyQueue, clock: &SharedClock, niceness: u8, ticket: Ticket) {
    mark_runtime_thread();
    stand_behind(niceness);
    loop {
        match queue.wait(&**clock) {
            Work::Expert(expert) => {
                if let Some(errand) = begin(queue, &expert, clock.now()) {
                    run_errand(queue, expert, errand);
                }
            }
            Work::Job(job) => run_job(job),
            Work::Wait(_) => {}
            Work::Ended => break,
        }
    }
    debug!("executor ends");
    drop(ticket);
}

fn run_job(job: queue::Job) {
    if let Err(panic) = contain(job) {
        error!(panic, "a job on an executor panicked");
    }
}

/// Runs what an expert needs and lets it go. Whatever panics on the way costs that expert and not the executor.
fn run_errand(queue: &ReadyQueue, expert: Arc<Expert>, errand: Errand) {
    if let Err(panic) = contain(|| errand.run(&expert)) {
        run::poison(&expert, format!("panicked beside its batches: {panic}"));
    }
    finish(queue, expert);
}

/// The owner's first half of a turn: what to run. `None`: the expert was parked or let go.
fn begin(queue: &ReadyQueue, expert: &Arc<Expert>, now: Moment) -> Option<Errand> {
    loop {
        match run::next(expert, now) {
            Next::Errand(errand) => return Some(errand),
            Next::Park { until } => match expert.token.on_park() {
                Parking::Parked => {
                    queue.park(expert.clone(), until);
                    return None;
                }
                Parking::LookAgain => {}
                Parking::Closed => return None,
            },
            Next::Nothing => {
                finish(queue, expert.clone());
                return None;
            }
        }
    }
}

/// The owner's second half: lets the expert go, to the tail of the queue if more is in line.
fn finish(queue: &ReadyQueue, expert: Arc<Expert>) {
    if expert.token.on_finish(expert.has_work()) {
        queue.push(expert);
    }
}
