//! One hosted expert as executors and handles share it: its line of work, its backend, its state.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use skep_kernel::{BatchMailbox, Follower, Moment, ReadyToken, Rows, Signal, panics::Contained};
use skep_rpc::ServeError;
use skep_wire::{ExpertInfo, ExpertUid};
use tokio::sync::Notify;

use crate::{
    Backend, BackendError, BackendFactory, ExpertInbox, Kind, Manifest, ServerConfig, actor,
    controls::Controls,
    distribution::Distribution,
    schema::{Checks, Schema},
    task::{InFlight, Task},
};

/// A backend and what makes a new one. Both are foreign code, dropped on whatever thread lets the expert go.
pub(crate) struct Slot {
    pub backend: Contained<Box<dyn Backend>>,
    pub factory: Contained<BackendFactory>,
}

/// How an expert batches; from the server's configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub min_rows: Rows,
    pub max_rows: Rows,
    pub max_wait: Duration,
    pub check_finite: bool,
}

impl From<&ServerConfig> for Limits {
    fn from(config: &ServerConfig) -> Self {
        Self {
            min_rows: Rows(config.min_batch_size),
            max_rows: Rows(config.max_batch_size),
            max_wait: config.max_wait,
            check_finite: config.check_finite,
        }
    }
}

/// Whether an expert takes work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ExpertState {
    /// Takes work.
    Serving,
    /// An optimizer step failed half way: takes nothing until it is reloaded.
    Poisoned {
        /// What happened.
        reason: String,
    },
    /// Finishes what is in line and takes nothing new.
    Stopping,
    /// Gone.
    Stopped,
}

/// See the module's documentation. Whoever owns the token owns the slot.
pub(crate) struct Expert {
    /// Order of creation within its executors: breaks ties the same way in every run.
    pub id: u64,
    pub uid: ExpertUid,
    pub class: String,
    pub parameters: u64,
    pub info: ExpertInfo,
    pub schema: Schema,
    pub limits: Limits,
    pub token: ReadyToken,
    pub forward: BatchMailbox<Task>,
    pub backward: BatchMailbox<Task>,
    pub counters: Counters,
    /// Questions to its actor.
    pub inbox: ExpertInbox,
    /// What its checkpoints are of; `step` is that of its making.
    pub manifest: Manifest,
    /// The step of the newest checkpoint that it wrote or was put back to.
    saved_step: Mutex<Option<u64>>,
    /// Tasks that were accepted and not yet answered.
    pub in_flight: Arc<InFlight>,
    /// Told whenever the state of any of the server's experts changes.
    changed: Arc<Notify>,
    slot: Mutex<Slot>,
    pub controls: Controls,
    state: Signal<ExpertState>,
}

/// What an expert did so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub steps: AtomicU64,
    pub forward_tasks: AtomicU64,
    pub backward_tasks: AtomicU64,
    pub batches: AtomicU64,
    pub rows: AtomicU64,
    pub failures: AtomicU64,
    pub skipped: AtomicU64,
    pub batch_rows: Distribution,
    pub queue_wait_us: Distribution,
}

impl Counters {
    pub fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl Expert {
    /// An expert that serves as soon as its token moves. Refuses backends whose schema has no batch dimension.
    pub fn new(
        id: u64,
        uid: ExpertUid,
        slot: Slot,
        config: &ServerConfig,
        changed: Arc<Notify>,
    ) -> Result<Self, BackendError> {
        let info = slot.backend.info().clone();
        let counters = Counters::default();
        let steps = slot.backend.steps();
        counters.steps.store(steps, Ordering::Relaxed);
        let manifest = Manifest::of(&uid, steps, &**slot.backend)?;
        Ok(Self {
            id,
            uid,
            class: slot.backend.class().to_owned(),
            parameters: slot.backend.parameter_count(),
            schema: Schema::of(&info, slot.backend.free_dimensions())?,
            info,
            limits: config.into(),
            token: ReadyToken::new(),
            forward: BatchMailbox::new(config.capacity()),
            backward: BatchMailbox::new(config.capacity()),
            counters,
            inbox: ExpertInbox::bounded(actor::INBOX),
            manifest,
            saved_step: Mutex::default(),
            in_flight: Arc::default(),
            changed,
            slot: Mutex::new(slot),
            controls: Controls::default(),
            state: Signal::new(ExpertState::Serving),
        })
    }

    pub fn mailbox(&self, kind: Kind) -> &BatchMailbox<Task> {
        match kind {
            Kind::Forward => &self.forward,
            Kind::Backward => &self.backward,
        }
    }

    pub fn checks(&self) -> Checks {
        Checks { max_rows: self.limits.max_rows, finite: self.limits.check_finite }
    }

    /// Whether anything is in line.
    pub fn has_work(&self) -> bool {
        !self.forward.is_empty() || !self.backward.is_empty() || !self.controls.is_empty()
    }

    /// The backend, for whoever owns the token.
    pub fn slot(&self) -> MutexGuard<'_, Slot> {
        // Panics of backends are caught while the lock is held, so it is never poisoned by them.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn saved_step(&self) -> Option<u64> {
        *self.saved_step.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note_saved(&self, step: u64) {
        *self.saved_step.lock().unwrap_or_else(PoisonError::into_inner) = Some(step);
    }

    /// The state is another one than any checkpoint's.
    pub fn forget_saved(&self) {
        *self.saved_step.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub fn state(&self) -> ExpertState {
        self.state.get()
    }

    /// Follows the state from now on.
    pub fn watch_state(&self) -> Follower<ExpertState> {
        self.state.follow()
    }

    /// Moves to another state. A stopped expert stays so, a stopping one serves no more, a poisoned one is only reloaded
    /// or stopped for good.
    pub fn set_state(&self, next: ExpertState) {
        use ExpertState::{Poisoned, Serving, Stopped, Stopping};
        let moved = self.state.update_if(|state| {
            let stays = matches!((&*state, &next), (Stopped, _) | (Stopping, Serving) | (Poisoned { .. }, Stopping));
            if !stays {
                *state = next;
            }
            !stays
        });
        if moved {
            self.changed.notify_one();
        }
    }

    /// Why new work is refused, if it is.
    pub fn refusal(&self) -> Option<ServeError> {
        match self.state() {
            ExpertState::Serving => None,
            state => Some(self.refusal_in(state)),
        }
    }

    /// Why work in line is answered with an error instead of being run, if it is.
    pub fn abandons_line(&self) -> Option<ServeError> {
        match self.state() {
            ExpertState::Serving | ExpertState::Stopping => None,
            state => Some(self.refusal_in(state)),
        }
    }

    fn refusal_in(&self, state: ExpertState) -> ServeError {
        match state {
            ExpertState::Poisoned { reason } => ServeError::Poisoned { uid: self.uid.to_string(), reason },
            ExpertState::Serving | ExpertState::Stopping | ExpertState::Stopped => ServeError::Stopping,
        }
    }

    /// Rows in line for forward and backward.
    pub fn waiting_rows(&self) -> u32 {
        self.forward.waiting().0.saturating_add(self.backward.waiting().0)
    }

    /// How long the head of the longer waiting line has waited.
    pub fn oldest_wait(&self, now: Moment) -> Duration {
        let heads = [self.forward.oldest(), self.backward.oldest()];
        heads.into_iter().flatten().min().map_or(Duration::ZERO, |oldest| now.since(oldest))
    }

    /// Answers what is in line with an error and lets nothing in any more; control work still runs. Tells how many tasks
    /// that were.
    pub fn abandon_line(&self) -> usize {
        let tasks = self.forward.close().into_iter().chain(self.backward.close());
        tasks.map(|task| task.answer(Err(ServeError::Stopping))).count()
    }

    /// Ends the expert: what is in line is answered with an error; an executor that owns it finishes its batch. Tells
    /// how many tasks got an error.
    pub fn close(&self) -> usize {
        self.set_state(ExpertState::Stopped);
        if !self.token.close() {
            return 0;
        }
        self.controls.close();
        self.abandon_line()
    }
}
