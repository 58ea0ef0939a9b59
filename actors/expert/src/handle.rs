//! [`ExpertHandle`]: the way into an expert, from any thread.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use serde::Serialize;
use skep_kernel::{Deadline, Follower, Full, Key, PushError, Reply, panics::Contained, time::before};
use skep_rpc::{ServeError, ServerLoad};
use skep_wire::{ExpertInfo, ExpertUid, HostTensor};
use tokio::sync::{Notify, oneshot};

use crate::{
    BackendError, Checkpoint, ExpertInbox, ExpertState, Kind, Manifest, Snapshot, TaskResult,
    batch::key,
    controls::{MAX_CONTROLS, NoControl},
    executor::ExecutorGroup,
    expert::{Expert, Slot},
    task::{Task, Verdict, Wanted},
};

/// Puts work in line for one hosted expert. Cheap to clone; outlives the expert, whose end it tells.
#[derive(Clone)]
pub struct ExpertHandle {
    expert: Arc<Expert>,
    executors: ExecutorGroup,
}

/// An accepted task. Dropping it tells the executors that nobody waits any more; unless its batch has begun, the task
/// never runs.
pub struct Accepted {
    verdict: oneshot::Receiver<Verdict>,
    deadline: Deadline,
    executors: ExecutorGroup,
}

impl Accepted {
    /// The answer, at the latest by the task's deadline.
    pub async fn answer(self) -> TaskResult {
        let (executors, deadline) = (self.executors.clone(), self.deadline);
        match before(&**executors.clock(), deadline, self.verdict()).await {
            Ok(verdict) => verdict.result,
            Err(_) => Err(ServeError::Deadline),
        }
    }

    /// How the task ends, whenever that is.
    pub(crate) async fn verdict(self) -> Verdict {
        let lost = |_| Verdict { result: Err(ServeError::Internal("the task was lost".to_owned())), stepped: true };
        self.verdict.await.unwrap_or_else(lost)
    }
}

/// What one expert is and did; feeds status pages, tests and exporters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertStatus {
    /// Name in the grid.
    pub uid: String,
    /// Class name of the backend.
    pub class: String,
    /// Trainable parameters.
    pub parameters: u64,
    /// Optimizer steps made.
    pub steps: u64,
    /// The step of its newest checkpoint, if it has one.
    pub saved_step: Option<u64>,
    /// Forward tasks begun.
    pub forward_tasks: u64,
    /// Backward tasks begun.
    pub backward_tasks: u64,
    /// Batches run, those of tasks that ran again alone included.
    pub batches: u64,
    /// Rows of those batches.
    pub rows: u64,
    /// Tasks answered with an error of the expert.
    pub failures: u64,
    /// Tasks that never ran because their caller left or their deadline passed.
    pub skipped: u64,
    /// Batches by their rows: up to how many (powers of two), how often.
    pub batch_rows: Vec<(u64, u64)>,
    /// Tasks by their wait in line before they ran, in microseconds: up to how many (powers of two), how often.
    pub queue_wait_us: Vec<(u64, u64)>,
    /// The sum of those waits, in microseconds.
    pub queue_wait_us_total: u64,
    /// Rows in line.
    pub waiting_rows: u32,
    /// How long the oldest of them has waited, in seconds.
    pub oldest_wait_seconds: f64,
    /// Seconds since the epoch until which its last announcement in the DHT holds; `None` when it is not announced.
    pub announced_until: Option<f64>,
    /// Whether it takes work.
    #[serde(flatten)]
    pub state: ExpertState,
}

impl ExpertHandle {
    pub(crate) fn new(expert: Arc<Expert>, executors: ExecutorGroup) -> Self {
        Self { expert, executors }
    }

    pub(crate) fn expert(&self) -> &Arc<Expert> {
        &self.expert
    }

    /// Name in the grid.
    pub fn uid(&self) -> &ExpertUid {
        &self.expert.uid
    }

    /// Schemas of inputs and outputs.
    pub fn info(&self) -> &ExpertInfo {
        &self.expert.info
    }

    /// Whether it takes work.
    pub fn state(&self) -> ExpertState {
        self.expert.state()
    }

    /// Questions to its actor.
    pub fn inbox(&self) -> ExpertInbox {
        self.expert.inbox.clone()
    }

    /// Follows whether it takes work.
    pub fn watch_state(&self) -> Follower<ExpertState> {
        self.expert.watch_state()
    }

    /// Takes nothing new, finishes what is in line until the deadline, answers the rest with
    /// [`ServeError::Stopping`], and ends. Tells whether everything was finished. Takes no checkpoint.
    pub async fn stop(&self, deadline: Deadline) -> bool {
        let finished = self.finish(deadline).await;
        self.close();
        finished
    }

    /// Answers what is in line with an error; how many tasks that were.
    pub(crate) fn abandon_line(&self) -> usize {
        self.expert.abandon_line()
    }

    /// Ends it; how many tasks got an error by that.
    pub(crate) fn close(&self) -> usize {
        self.expert.close()
    }

    /// Takes nothing new and finishes what is in line until the deadline. Tells whether everything was finished.
    pub(crate) async fn finish(&self, deadline: Deadline) -> bool {
        self.expert.set_state(ExpertState::Stopping);
        before(&**self.executors.clock(), deadline, self.expert.in_flight.idle()).await.is_ok()
    }

    /// Checks tensors against the schema and puts them in line: flat inputs, then for backward flat output gradients.
    /// A full line refuses at once with [`ServeError::Overloaded`].
    pub fn submit(&self, kind: Kind, tensors: Vec<HostTensor>, deadline: Deadline) -> Result<Accepted, ServeError> {
        self.submit_now(kind, tensors, deadline, None)
    }

    /// Like [`submit`](Self::submit), for a task that is skipped as soon as `wanted` says no.
    pub(crate) fn submit_wanted(
        &self,
        kind: Kind,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
        wanted: Wanted,
    ) -> Result<Accepted, ServeError> {
        self.submit_now(kind, tensors, deadline, Some(wanted))
    }

    fn submit_now(
        &self,
        kind: Kind,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
        wanted: Option<Wanted>,
    ) -> Result<Accepted, ServeError> {
        let (order, accepted) = self.prepare(kind, tensors, deadline, wanted)?;
        let mailbox = self.expert.mailbox(kind);
        let (rows, bytes) = (order.task.rows, order.bytes);
        let pushed = mailbox.try_push(self.executors.now(), order.task, rows, bytes, order.key);
        self.after_push(pushed)?;
        Ok(accepted)
    }

    /// Like [`submit`](Self::submit), but waits for room until the deadline, behind those who already wait. Dropping the
    /// future gives up the place.
    pub async fn submit_when_room(
        &self,
        kind: Kind,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Result<Accepted, ServeError> {
        let (order, accepted) = self.prepare(kind, tensors, deadline, None)?;
        let mailbox = self.expert.mailbox(kind);
        let (rows, bytes) = (order.task.rows, order.bytes);
        let clock = &**self.executors.clock();
        let pushed = mailbox.push_when_room(clock, deadline, order.task, rows, bytes, order.key).await;
        self.after_push(pushed)?;
        Ok(accepted)
    }

    fn prepare(
        &self,
        kind: Kind,
        mut tensors: Vec<HostTensor>,
        deadline: Deadline,
        wanted: Option<Wanted>,
    ) -> Result<(Order, Accepted), ServeError> {
        if let Some(refusal) = self.expert.refusal() {
            return Err(refusal);
        }
        let entered = self.executors.now();
        if deadline.has_passed(entered) {
            return Err(ServeError::Deadline);
        }
        let rows = self.expert.schema.check_request(kind, &tensors, self.expert.checks())?;
        let key = key(&tensors);
        let bytes = tensors.iter().map(|tensor| tensor.data().len()).sum();
        let grad_outputs = Contained::new(tensors.split_off(self.expert.schema.inputs.len()));
        let (reply, verdict) = Reply::channel();
        let ticket = self.expert.in_flight.enter();
        let task =
            Task { inputs: Contained::new(tensors), grad_outputs, rows, deadline, entered, reply, wanted, ticket };
        let accepted = Accepted { verdict, deadline, executors: self.executors.clone() };
        Ok((Order { task, key, bytes }, accepted))
    }

    fn after_push(&self, pushed: Result<(), PushError<Task>>) -> Result<(), ServeError> {
        match pushed {
            Ok(()) => {
                self.executors.announce(&self.expert);
                Ok(())
            }
            Err(PushError::Full(full)) => Err(overloaded(&full)),
            Err(PushError::Closed(_)) => Err(self.expert.refusal().unwrap_or(ServeError::Stopping)),
        }
    }

    /// Copies the backend's state, between two batches.
    pub async fn save(&self, deadline: Deadline) -> Result<Snapshot, BackendError> {
        self.control(deadline, |slot| slot.backend.save()).await
    }

    /// Makes a new backend, loads a state into it and serves again, also after poisoning.
    pub async fn reload(&self, snapshot: Snapshot, deadline: Deadline) -> Result<(), BackendError> {
        let expert = self.expert.clone();
        let reload = move |slot: &mut Slot| {
            let mut fresh = (slot.factory)()?;
            if fresh.info() != &expert.info {
                return Err(BackendError::Invalid("the new backend has another schema".to_owned()));
            }
            fresh.load(&snapshot)?;
            slot.backend = Contained::new(fresh);
            expert.forget_saved();
            expert.set_state(ExpertState::Serving);
            Ok(())
        };
        self.control(deadline, reload).await
    }

    /// Loads a state into the backend as it is.
    pub(crate) async fn load_state(&self, checkpoint: Checkpoint, deadline: Deadline) -> Result<(), BackendError> {
        self.control(deadline, move |slot| slot.backend.load(&checkpoint.snapshot)).await
    }

    /// Copies the state for a checkpoint, between two batches; `None` when the newest one has it, and when there is
    /// nothing worth to be kept because a step failed half way.
    pub(crate) async fn checkpoint(&self, deadline: Deadline) -> Result<Option<Checkpoint>, BackendError> {
        let expert = self.expert.clone();
        let copy = move |slot: &mut Slot| {
            let poisoned = matches!(expert.state(), ExpertState::Poisoned { .. });
            if poisoned || expert.saved_step() == Some(slot.backend.steps()) {
                return Ok(None);
            }
            let snapshot = slot.backend.save()?;
            Ok(Some(Checkpoint { manifest: Manifest::of(&expert.uid, snapshot.step, &**slot.backend)?, snapshot }))
        };
        self.control(deadline, copy).await
    }

    /// What its checkpoints are of; `step` is that of its making.
    pub(crate) fn manifest(&self) -> &Manifest {
        &self.expert.manifest
    }

    /// The step of the newest checkpoint that it wrote or was put back to.
    pub(crate) fn saved_step(&self) -> Option<u64> {
        self.expert.saved_step()
    }

    pub(crate) fn note_saved(&self, step: u64) {
        self.expert.note_saved(step);
    }

    async fn control<R: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce(&mut Slot) -> Result<R, BackendError> + Send + 'static,
    ) -> Result<R, BackendError> {
        let (done, result) = oneshot::channel();
        let control = Box::new(move |slot: &mut Slot| {
            if !done.is_closed() {
                let _caller_left = done.send(work(slot));
            }
        });
        self.expert.controls.push(control).map_err(|refusal| {
            let uid = self.uid();
            BackendError::Failed(match refusal {
                NoControl::Full => format!("{MAX_CONTROLS} saves and reloads of expert {uid} are waiting"),
                NoControl::Closed => format!("expert {uid} has stopped"),
            })
        })?;
        self.executors.announce(&self.expert);
        match before(&**self.executors.clock(), deadline, result).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(BackendError::Failed("the expert was stopped or panicked meanwhile".to_owned())),
            Err(_) => Err(BackendError::Failed("not done before the deadline".to_owned())),
        }
    }

    /// Load as answers carry it.
    pub fn load(&self) -> ServerLoad {
        let oldest_wait = self.expert.oldest_wait(self.executors.now());
        ServerLoad { waiting_rows: self.expert.waiting_rows(), oldest_wait }
    }

    /// A snapshot of what it is and did. Only its [`Server`](crate::Server) knows until when it is announced.
    pub fn status(&self) -> ExpertStatus {
        let (expert, counters) = (&self.expert, &self.expert.counters);
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let load = self.load();
        ExpertStatus {
            uid: expert.uid.to_string(),
            class: expert.class.clone(),
            parameters: expert.parameters,
            steps: read(&counters.steps),
            saved_step: expert.saved_step(),
            forward_tasks: read(&counters.forward_tasks),
            backward_tasks: read(&counters.backward_tasks),
            batches: read(&counters.batches),
            rows: read(&counters.rows),
            failures: read(&counters.failures),
            skipped: read(&counters.skipped),
            batch_rows: counters.batch_rows.read(),
            queue_wait_us: counters.queue_wait_us.read(),
            queue_wait_us_total: counters.queue_wait_us.sum(),
            waiting_rows: load.waiting_rows,
            oldest_wait_seconds: load.oldest_wait.as_secs_f64(),
            announced_until: None,
            state: expert.state(),
        }
    }
}

/// A task and what its mailbox must know of it.
struct Order {
    task: Task,
    key: Key,
    bytes: usize,
}

/// When a retry makes sense: the line moves about as fast as its head has waited.
fn overloaded<T>(full: &Full<T>) -> ServeError {
    let retry_after = full.oldest_wait.clamp(Duration::from_millis(10), Duration::from_secs(5));
    ServeError::Overloaded { waiting: full.waiting.0, limit: full.limit.0, retry_after }
}

/// Builds an expert on the executors.
pub(crate) mod build {
    use skep_kernel::panics::contain;

    use super::*;
    use crate::{BackendFactory, ServerConfig};

    /// Makes the backend on an executor and an expert around it.
    pub(crate) async fn build(
        executors: &ExecutorGroup,
        uid: ExpertUid,
        mut factory: BackendFactory,
        config: &ServerConfig,
        changed: Arc<Notify>,
    ) -> Result<ExpertHandle, BackendError> {
        let panicked = |panic: String| BackendError::Failed(format!("building panicked: {panic}"));
        let make = move || {
            let backend = contain(&mut factory).map_err(panicked)??;
            Ok(Slot { backend: Contained::new(backend), factory: Contained::new(factory) })
        };
        let gone = || BackendError::Failed("the executors are stopped or overloaded".to_owned());
        let slot = executors.run(make).map_err(|_| gone())?.await.map_err(|_| gone())??;
        let describe = || Expert::new(executors.next_id(), uid, slot, config, changed);
        let expert = contain(describe).map_err(panicked)??;
        Ok(ExpertHandle::new(Arc::new(expert), executors.clone()))
    }
}
