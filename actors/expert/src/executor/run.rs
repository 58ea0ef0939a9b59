//! What the owner of an expert does with it: picks the next batch, runs it, answers. No threads, no clock.

use std::sync::atomic::Ordering;

use skep_kernel::{BatchMailbox, Moment, Rows, panics::contain};
use skep_rpc::ServeError;
use skep_wire::HostTensor;
use tracing::{debug, error};

use crate::{
    BackendError, Batch, Kind,
    batch::{check_results, join, split},
    controls::Control,
    device::{Outcome, run_on_cpu},
    expert::{Counters, Expert, ExpertState, Slot},
    task::Task,
};

/// What an expert needs next.
pub(crate) enum Next {
    /// Run this, then look again.
    Errand(Errand),
    /// Less than the least batch is in line: look again then, or when more has come.
    Park { until: Moment },
    /// Nothing is in line.
    Nothing,
}

/// One piece of work for the owner of an expert.
pub(crate) enum Errand {
    Control(Control),
    Batch { kind: Kind, tasks: Vec<Task> },
}

/// Picks what the expert does next and takes it out of its line. The caller owns the expert.
pub(crate) fn next(expert: &Expert, now: Moment) -> Next {
    if let Some(control) = expert.controls.take() {
        return Next::Errand(Errand::Control(control));
    }
    if let Some(refusal) = expert.abandons_line() {
        drain(expert, &refusal);
        return Next::Nothing;
    }
    loop {
        match due(expert, now) {
            Due::Now(kind) => {
                let tasks = take(expert, kind, now);
                if !tasks.is_empty() {
                    return Next::Errand(Errand::Batch { kind, tasks });
                }
            }
            Due::At(until) => return Next::Park { until },
            Due::Never => return Next::Nothing,
        }
    }
}

enum Due {
    Now(Kind),
    At(Moment),
    Never,
}

/// The mailbox whose head waited longest, among those whose next batch is large enough or waited long enough.
fn due(expert: &Expert, now: Moment) -> Due {
    let heads = [Kind::Forward, Kind::Backward].map(|kind| (expert.mailbox(kind).oldest(), kind));
    let mut heads: Vec<(Moment, Kind)> = heads.into_iter().filter_map(|(at, kind)| Some((at?, kind))).collect();
    heads.sort();
    let limits = &expert.limits;
    for (oldest, kind) in &heads {
        if expert.mailbox(*kind).head_rows() >= limits.min_rows || now >= *oldest + limits.max_wait {
            return Due::Now(*kind);
        }
    }
    heads.first().map_or(Due::Never, |(oldest, _)| Due::At(*oldest + limits.max_wait))
}

/// A batch of tasks that are still wanted; the others are answered.
fn take(expert: &Expert, kind: Kind, now: Moment) -> Vec<Task> {
    let taken = expert.mailbox(kind).take(expert.limits.max_rows, |task| task.is_wanted(now));
    Counters::add(&expert.counters.skipped, taken.dropped.len());
    for task in taken.dropped {
        task.answer(Err(ServeError::Deadline));
    }
    for task in &taken.batch {
        let waited = now.since(task.entered).as_micros();
        expert.counters.queue_wait_us.count(u64::try_from(waited).unwrap_or(u64::MAX));
    }
    taken.batch
}

fn drain(expert: &Expert, refusal: &ServeError) {
    let everything = |mailbox: &BatchMailbox<Task>| mailbox.take(Rows(0), |_| false).dropped;
    for kind in [Kind::Forward, Kind::Backward] {
        // Room that is made lets others in, so once is not enough.
        while !expert.mailbox(kind).is_empty() {
            for task in everything(expert.mailbox(kind)) {
                task.answer(Err(refusal.clone()));
            }
        }
    }
}

impl Errand {
    /// Does the work and answers everybody who waits for it. Panics of the backend end here.
    pub fn run(self, expert: &Expert) {
        match self {
            Errand::Control(control) => {
                let mut slot = expert.slot();
                if let Err(panic) = contain(|| control(&mut slot)) {
                    poison(expert, format!("panicked while it was saved or loaded: {panic}"));
                }
                count_steps(expert, &slot);
            }
            Errand::Batch { kind, tasks } => run_batch(expert, kind, tasks),
        }
    }

    /// Rows of the batch; 0 for control work.
    pub fn rows(&self) -> Rows {
        match self {
            Errand::Control(_) => Rows(0),
            Errand::Batch { tasks, .. } => Rows(tasks.iter().map(|task| task.rows.0).sum()),
        }
    }

    /// What kind of batch it is; `None` for control work.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Errand::Control(_) => None,
            Errand::Batch { kind, .. } => Some(*kind),
        }
    }
}

fn run_batch(expert: &Expert, kind: Kind, tasks: Vec<Task>) {
    count_tasks(expert, kind, &tasks);
    let mut slot = expert.slot();
    let parts = attempt(expert, &mut slot, kind, &tasks);
    settle(expert, &mut slot, kind, tasks, parts);
}

pub(super) fn count_tasks(expert: &Expert, kind: Kind, tasks: &[Task]) {
    let counter = match kind {
        Kind::Forward => &expert.counters.forward_tasks,
        Kind::Backward => &expert.counters.backward_tasks,
    };
    Counters::add(counter, tasks.len());
}

/// What a batch gave, by task.
pub(super) type Parts = Vec<Vec<HostTensor>>;

/// Answers the tasks of a batch that has run. One that failed before its step runs again task by task.
pub(super) fn settle(expert: &Expert, slot: &mut Slot, kind: Kind, tasks: Vec<Task>, parts: Result<Parts, Failure>) {
    // Before the answers: who has one sees its step counted.
    count_steps(expert, slot);
    match parts {
        Ok(parts) => {
            for (task, part) in tasks.into_iter().zip(parts) {
                task.answer(Ok(part));
            }
        }
        Err(Failure::BeforeStep(_)) if tasks.len() > 1 => {
            debug!(uid = %expert.uid, tasks = tasks.len(), "batch failed; its tasks run one by one");
            for task in tasks {
                let outcome = alone(expert, slot, kind, &task);
                count_steps(expert, slot);
                match outcome {
                    Ok(part) => task.answer(Ok(part)),
                    Err(failure) => failure.answer(expert, [task]),
                }
            }
        }
        Err(failure) => failure.answer(expert, tasks),
    }
}

fn count_steps(expert: &Expert, slot: &Slot) {
    match contain(|| slot.backend.steps()) {
        Ok(steps) => expert.counters.steps.store(steps, Ordering::Relaxed),
        Err(panic) => poison(expert, format!("panicked when its steps were counted: {panic}")),
    }
}

/// Runs one task of a batch that failed as a whole.
fn alone(expert: &Expert, slot: &mut Slot, kind: Kind, task: &Task) -> Result<Vec<HostTensor>, Failure> {
    if let Some(refusal) = expert.abandons_line() {
        return Err(Failure::BeforeStep(refusal));
    }
    let mut parts = attempt(expert, slot, kind, std::slice::from_ref(task))?;
    Ok(parts.pop().expect("one task has one part"))
}

/// How a batch failed.
pub(super) enum Failure {
    /// Nothing was changed: its tasks may run again.
    BeforeStep(ServeError),
    /// The work was done but cannot be handed out.
    AfterStep(ServeError),
    /// State is half changed.
    Torn(String),
}

impl Failure {
    /// Tells everybody; a torn expert is poisoned.
    fn answer(self, expert: &Expert, tasks: impl IntoIterator<Item = Task>) {
        let (error, stepped) = match self {
            Failure::BeforeStep(error) => (error, false),
            Failure::AfterStep(error) => (error, true),
            Failure::Torn(reason) => {
                poison(expert, reason.clone());
                (ServeError::Poisoned { uid: expert.uid.to_string(), reason }, true)
            }
        };
        for task in tasks {
            Counters::add(&expert.counters.failures, 1);
            debug!(uid = %expert.uid, %error, "task failed");
            if stepped { task.answer_stepped(error.clone()) } else { task.answer(Err(error.clone())) }
        }
    }
}

/// Runs tasks as one batch; the results by task. Panics end here, also of what the backend leaves to be dropped.
fn attempt(expert: &Expert, slot: &mut Slot, kind: Kind, tasks: &[Task]) -> Result<Parts, Failure> {
    let tried = contain(|| try_batch(expert, slot, kind, tasks));
    tried.unwrap_or_else(|panic| Err(panicked(kind, panic)))
}

/// What a panic while a batch ran means.
pub(super) fn panicked(kind: Kind, panic: String) -> Failure {
    match kind {
        // Forward changes no parameter, so nothing can be half done.
        Kind::Forward => Failure::BeforeStep(ServeError::Internal(format!("forward panicked: {panic}"))),
        Kind::Backward => Failure::Torn(format!("backward panicked: {panic}")),
    }
}

/// What became of a batch that was launched behind one that tore its expert's state.
pub(super) fn ran_on_torn_state(expert: &Expert, kind: Kind) -> Failure {
    let refusal = expert.abandons_line().unwrap_or(ServeError::Stopping);
    match kind {
        Kind::Forward => Failure::BeforeStep(refusal),
        Kind::Backward => Failure::AfterStep(refusal),
    }
}

fn try_batch(expert: &Expert, slot: &mut Slot, kind: Kind, tasks: &[Task]) -> Result<Parts, Failure> {
    let batch = form_batch(expert, tasks)?;
    let outcome = run_on_cpu(kind, batch.clone(), &mut **slot.backend);
    parts_of(expert, kind, tasks, &batch, outcome)
}

/// One batch of the tasks.
pub(super) fn form_batch(expert: &Expert, tasks: &[Task]) -> Result<Batch, Failure> {
    let batch = join(tasks).map_err(|error| Failure::BeforeStep(ServeError::Invalid(error.to_string())))?;
    Counters::add(&expert.counters.batches, 1);
    Counters::add(&expert.counters.rows, batch.rows.0 as usize);
    expert.counters.batch_rows.count(batch.rows.0.into());
    Ok(batch)
}

/// Checks what a batch gave and cuts it into the parts of its tasks.
pub(super) fn parts_of(
    expert: &Expert,
    kind: Kind,
    tasks: &[Task],
    batch: &Batch,
    outcome: Outcome,
) -> Result<Parts, Failure> {
    let results = outcome.map_err(|error| match error {
        BackendError::Invalid(text) => Failure::BeforeStep(ServeError::Invalid(text)),
        BackendError::Failed(text) => Failure::BeforeStep(ServeError::Internal(text)),
        torn @ BackendError::Torn(_) => Failure::Torn(torn.to_string()),
    })?;
    let broken_promise = |text| {
        error!(uid = %expert.uid, text, "backend broke its promise");
        Failure::AfterStep(ServeError::Internal(text))
    };
    check_results(&expert.schema, kind, batch, &results).map_err(broken_promise)?;
    let rows: Vec<Rows> = tasks.iter().map(|task| task.rows).collect();
    split(&results, &rows).map_err(|error| broken_promise(error.to_string()))
}

/// Takes the expert out of service; what is in line is answered when its owner looks again.
pub(crate) fn poison(expert: &Expert, reason: String) {
    error!(uid = %expert.uid, reason, "expert is poisoned and withdrawn");
    expert.set_state(ExpertState::Poisoned { reason });
}
