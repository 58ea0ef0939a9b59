//! Supervision by factory: children are started by closures, watched through tombstones, and started again with backoff
//! until the restart intensity is exceeded.
//!
//! actix's own `Supervisor` dies silently with an actor that panics; here a panic is an [`Exit`] like any other, be it
//! in a handler, in `started()`, in a `Drop` or in the factory. One limit is the language's: a second panic while the
//! first unwinds ends the process, so `stopped()`, which also runs then, must not panic.

use std::time::Duration;

use actix::{Actor, Addr, Context, Handler, Message, dev::ToEnvelope};
use tokio::sync::{mpsc, oneshot};

use crate::{
    Deadline, Exit, Follower, Moment, Seed, SharedClock, Signal, Tombstone,
    restart::{Intensity, Restart},
};

mod children;
mod watchman;

use watchman::Watchman;

/// How long a child that is stopped for a neighbour's sake may take.
pub const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// Children that may wait for being started.
const COMMANDS: usize = 64;

/// Whom a restart concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The child that ended.
    OneForOne,
    /// The child that ended and those started after it.
    RestForOne,
}

/// What a guardian is like.
#[derive(Clone, Debug)]
pub struct GuardianSpec {
    /// Its name in logs.
    pub name: String,
    /// Whom a restart concerns.
    pub strategy: Strategy,
    /// Restarts that are borne, of all children together.
    pub intensity: Intensity,
    /// Decides the jitter of the backoff.
    pub seed: Seed,
}

/// What a child is like.
#[derive(Clone, Debug)]
pub struct ChildSpec {
    /// Its name, unique among the living children of a guardian.
    pub name: String,
    /// Which ends call for a restart.
    pub restart: Restart,
}

impl ChildSpec {
    /// A child of this name.
    pub fn new(name: impl Into<String>, restart: Restart) -> Self {
        Self { name: name.into(), restart }
    }
}

/// Asks an actor to stop; the answer to it is usually `ctx.stop()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

impl Message for Stop {
    type Result = ();
}

/// A running child, as the guardian needs it: how to ask it to stop.
pub struct Started {
    ask_to_stop: Box<dyn Fn()>,
}

impl Started {
    /// A child that `ask_to_stop` asks to stop. It may be called more than once; it must not wait.
    pub fn new(ask_to_stop: impl Fn() + 'static) -> Self {
        Self { ask_to_stop: Box::new(ask_to_stop) }
    }

    /// An actix actor, which is sent [`Stop`] and keeps running as long as the guardian holds this.
    pub fn actor<A>(addr: Addr<A>) -> Self
    where
        A: Actor<Context = Context<A>> + Handler<Stop>,
        A::Context: ToEnvelope<A, Stop>,
    {
        Self::new(move || {
            if addr.try_send(Stop).is_err() && addr.connected() {
                // Its mailbox is full: wait in line.
                let stopping = addr.send(Stop);
                actix_rt::spawn(async move {
                    let _gone_meanwhile = stopping.await;
                });
            }
        })
    }

    /// A guardian below this one, started by [`Guardian::start_under`].
    pub fn guardian(handle: GuardianHandle) -> Self {
        Self::new(move || handle.ask_to_stop())
    }
}

/// What a child is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// It runs.
    Running,
    /// It ended and is started again then.
    Backoff {
        /// When.
        until: Moment,
    },
    /// It was stopped because one started before it ended, and is started again after that one.
    Waiting,
    /// It ended as it should, or with its guardian.
    Stopped,
    /// It ended once too often.
    Escalated,
}

/// A child at a glance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildStatus {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: ChildState,
    /// How often it was started again.
    pub restarts: u64,
    /// How it ended last.
    pub last_exit: Option<Exit>,
}

/// A guardian at a glance; children in the order of their start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardianStatus {
    /// The children. Temporary ones are listed while they run.
    pub children: Vec<ChildStatus>,
    /// Set for good when restarts are given up.
    pub escalation: Option<Escalation>,
    /// Whether all is over: by [`GuardianHandle::stop`], after an escalation, or because its system ended.
    pub ended: bool,
    /// Children that had not ended when it did.
    pub still_running: Vec<String>,
}

/// Why a guardian gave up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{guardian} gave up: {child} ended once too often ({exit:?})")]
pub struct Escalation {
    /// The guardian's name.
    pub guardian: String,
    /// The child's name.
    pub child: String,
    /// How it ended last.
    pub exit: Exit,
}

/// Why a child was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperviseError {
    /// A living child has this name.
    #[error("{guardian} already has a child {name}")]
    NameTaken {
        /// The guardian's name.
        guardian: String,
        /// The child's name.
        name: String,
    },
    /// The guardian has stopped or given up.
    #[error("the guardian has ended")]
    Ended,
}

/// Children that had not ended at the deadline of a stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("still running at the deadline: {}", .0.join(", "))]
pub struct StillRunning(pub Vec<String>);

type Factory = Box<dyn FnMut(Tombstone) -> Started + Send>;

enum Command {
    Supervise { spec: ChildSpec, factory: Factory, taken: oneshot::Sender<Result<(), SuperviseError>> },
    Stop { deadline: Deadline },
}

/// Starts guardians.
pub struct Guardian;

impl Guardian {
    /// Starts a guardian without children on the current actix system. It ends with its system, by
    /// [`GuardianHandle::stop`], or when every handle of it is gone: then it stops its children.
    pub fn start(spec: GuardianSpec, clock: SharedClock) -> GuardianHandle {
        Self::start_under(spec, clock, Tombstone::unread())
    }

    /// As [`Guardian::start`], for a guardian that is itself a child: its escalation is its failure.
    pub fn start_under(spec: GuardianSpec, clock: SharedClock, tombstone: Tombstone) -> GuardianHandle {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (status, please_stop) = (Signal::new(GuardianStatus::default()), Signal::new(false));
        let watchman = Watchman::new(spec, clock, status.clone(), tombstone);
        actix_rt::spawn(watchman.watch(inbox, please_stop.follow()));
        GuardianHandle { commands, status, please_stop }
    }
}

/// Talks to a guardian, from any thread.
#[derive(Clone)]
pub struct GuardianHandle {
    commands: mpsc::Sender<Command>,
    status: Signal<GuardianStatus>,
    please_stop: Signal<bool>,
}

impl GuardianHandle {
    /// Starts a child and keeps it running. Returns when it has been started for the first time.
    ///
    /// The factory runs on the guardian's thread at each start. It starts an actor that holds the tombstone (declared
    /// last among its fields, so that a panic while it is dropped counts). Dropping the future may or may not start the
    /// child.
    pub async fn supervise(
        &self,
        spec: ChildSpec,
        factory: impl FnMut(Tombstone) -> Started + Send + 'static,
    ) -> Result<(), SuperviseError> {
        let (taken, answer) = oneshot::channel();
        let command = Command::Supervise { spec, factory: Box::new(factory), taken };
        self.commands.send(command).await.map_err(|_| SuperviseError::Ended)?;
        answer.await.unwrap_or(Err(SuperviseError::Ended))
    }

    /// The guardian and its children, now.
    pub fn status(&self) -> GuardianStatus {
        self.status.get()
    }

    /// Follows the status.
    pub fn watch(&self) -> Follower<GuardianStatus> {
        self.status.follow()
    }

    /// Waits until restarts are given up; `None` when the guardian ends without that.
    pub async fn escalated(&self) -> Option<Escalation> {
        let over =
            |status: &GuardianStatus| (status.escalation.is_some() || status.ended).then(|| status.escalation.clone());
        self.status.until(over).await
    }

    /// Stops the children, the last one first, each after the one started after it has ended; then the guardian. After
    /// the deadline those that remain are asked to stop all at once and named in the error. Dropping the future does not
    /// take the stop back. Whoever asks again, or after an escalation, hears of the same end: the first deadline counts.
    pub async fn stop(&self, deadline: Deadline) -> Result<(), StillRunning> {
        // One that has ended, or is about to, takes no command.
        let _ended = self.commands.send(Command::Stop { deadline }).await;
        let ended = |status: &GuardianStatus| status.ended.then(|| status.still_running.clone());
        let still_running = self.status.until(ended).await;
        if still_running.is_empty() { Ok(()) } else { Err(StillRunning(still_running)) }
    }

    /// Has the guardian stop its children within [`STOP_PATIENCE`] and end; does not wait.
    pub fn ask_to_stop(&self) {
        self.please_stop.set(true);
    }
}
