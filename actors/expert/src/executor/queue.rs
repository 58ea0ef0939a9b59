//! What the executors of a group take from: ready experts in order, jobs, and the alarms of parked experts.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use skep_kernel::{Clock, Moment};
use tokio::sync::Notify;

use crate::expert::Expert;

/// Work on an executor that belongs to no expert yet or any more: building a backend, decoding a large body.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Jobs that may wait.
const MAX_JOBS: usize = 4096;

/// What an executor does next.
pub(crate) enum Work {
    /// Look at this expert, which the caller owns now.
    Expert(Arc<Expert>),
    /// Run this.
    Job(Job),
    /// Wait for a change, at most until the next alarm.
    Wait(Option<Moment>),
    /// The group is stopped and nothing is left to do.
    Ended,
}

enum Item {
    Token(Arc<Expert>),
    Job(Job),
}

/// Shared by the executors of a group. Tokens in it are bounded by the number of experts: each has one at the most.
#[derive(Default)]
pub(crate) struct ReadyQueue {
    inner: Mutex<Inner>,
    changed: Condvar,
    notify: Notify,
}

#[derive(Default)]
struct Inner {
    items: VecDeque<Item>,
    jobs: usize,
    alarms: Alarms,
    stopped: bool,
}

/// One alarm an expert at the most.
#[derive(Default)]
struct Alarms {
    by_time: BTreeMap<(Moment, u64), Arc<Expert>>,
    by_expert: BTreeMap<u64, Moment>,
}

impl Alarms {
    fn set(&mut self, at: Moment, expert: Arc<Expert>) {
        if let Some(earlier) = self.by_expert.insert(expert.id, at) {
            self.by_time.remove(&(earlier, expert.id));
        }
        self.by_time.insert((at, expert.id), expert);
    }

    fn next(&self) -> Option<Moment> {
        self.by_time.first_key_value().map(|((at, _), _)| *at)
    }

    fn take_due(&mut self, now: Moment) -> Option<Arc<Expert>> {
        if self.next()? > now {
            return None;
        }
        let ((_, id), expert) = self.by_time.pop_first()?;
        self.by_expert.remove(&id);
        Some(expert)
    }
}

impl ReadyQueue {
    /// Queues the token of a ready expert at the tail.
    pub fn push(&self, expert: Arc<Expert>) {
        self.lock().items.push_back(Item::Token(expert));
        self.wake_one();
    }

    /// Queues a job at the tail; it comes back when too many wait or the group is stopped.
    pub fn push_job(&self, job: Job) -> Result<(), Job> {
        let mut inner = self.lock();
        if inner.jobs >= MAX_JOBS || inner.stopped {
            return Err(job);
        }
        inner.jobs += 1;
        inner.items.push_back(Item::Job(job));
        drop(inner);
        self.wake_one();
        Ok(())
    }

    /// Sets the alarm of a parked expert.
    pub fn park(&self, expert: Arc<Expert>, until: Moment) {
        self.lock().alarms.set(until, expert);
        self.wake_one();
    }

    /// Executors end once nothing is left to do.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
        self.notify.notify_waiters();
        self.notify.notify_one();
    }

    /// What to do now.
    pub fn pop(&self, now: Moment) -> Work {
        let mut inner = self.lock();
        let work = inner.pop(now);
        self.hand_out(inner, work)
    }

    /// Blocks this thread for something to do; never returns [`Work::Wait`].
    pub fn wait(&self, clock: &dyn Clock) -> Work {
        let mut inner = self.lock();
        loop {
            let now = clock.now();
            match inner.pop(now) {
                Work::Wait(alarm) => {
                    let patience = alarm.map_or(IDLE, |at| at.since(now)).min(IDLE);
                    let waited = self.changed.wait_timeout(inner, patience);
                    inner = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                work => return self.hand_out(inner, work),
            }
        }
    }

    /// Blocks this thread a little, less if something comes.
    pub fn nap(&self, time: Duration) {
        drop(self.changed.wait_timeout(self.lock(), time));
    }

    fn hand_out(&self, inner: MutexGuard<'_, Inner>, work: Work) -> Work {
        let alarms = inner.alarms.next().is_some();
        drop(inner);
        if alarms && !matches!(work, Work::Wait(_)) {
            // This executor will be busy; another one must watch the alarms.
            self.wake_one();
        }
        work
    }

    /// Completes when something may have changed.
    pub async fn changed(&self) {
        self.notify.notified().await;
    }

    fn wake_one(&self) {
        self.changed.notify_one();
        self.notify.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long an executor sleeps when nothing is announced.
const IDLE: Duration = Duration::from_secs(60);

impl Inner {
    fn pop(&mut self, now: Moment) -> Work {
        while let Some(expert) = self.alarms.take_due(now) {
            if expert.token.on_alarm() {
                return Work::Expert(expert);
            }
        }
        while let Some(item) = self.items.pop_front() {
            match item {
                Item::Token(expert) => {
                    if expert.token.on_take() {
                        return Work::Expert(expert);
                    }
                }
                Item::Job(job) => {
                    self.jobs -= 1;
                    return Work::Job(job);
                }
            }
        }
        if self.stopped { Work::Ended } else { Work::Wait(self.alarms.next()) }
    }
}
