//! [`ExpertActor`]: owns one expert's life.

use actix::{Actor, ActorContext, AsyncContext, Context, WrapFuture, fut::ActorFutureExt};
use skep_kernel::{Deadline, Exit, Inbox, Reply, Tombstone};
use skep_wire::ExpertInfo;
use tracing::{debug, warn};

use crate::{BackendError, ExpertHandle, ExpertState, ExpertStatus, Snapshot};

/// Questions to one expert's actor that may wait.
const INBOX: usize = 64;

/// What an [`ExpertActor`] is asked.
pub enum ExpertMessage {
    /// Schemas of inputs and outputs.
    Info(Reply<ExpertInfo>),
    /// What it did so far.
    Stats(Reply<ExpertStatus>),
    /// A copy of its state, taken between two batches.
    Save(Deadline, Reply<Result<Snapshot, BackendError>>),
    /// Makes a new backend with this state; revives a poisoned expert.
    Reload(Snapshot, Deadline, Reply<Result<(), BackendError>>),
    /// Takes nothing new, finishes what is in line until the deadline, then ends. The answer tells whether everything
    /// was finished.
    Stop(Deadline, Reply<bool>),
}

/// The inbox of an expert's actor.
pub type ExpertInbox = Inbox<ExpertMessage>;

/// An empty inbox for one expert.
pub fn expert_inbox() -> ExpertInbox {
    Inbox::bounded(INBOX)
}

/// Answers questions about one expert and ends with it. Work does not pass through it: tasks go to the mailboxes of its
/// [`ExpertHandle`], which outlive it.
pub struct ExpertActor {
    expert: ExpertHandle,
    inbox: ExpertInbox,
    tombstone: Tombstone,
}

impl ExpertActor {
    /// An actor that reads `inbox` and reports its end on `tombstone`.
    pub fn new(expert: ExpertHandle, inbox: ExpertInbox, tombstone: Tombstone) -> Self {
        Self { expert, inbox, tombstone }
    }
}

impl Actor for ExpertActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.spawn(serve(self.expert.clone(), self.inbox.clone()).into_actor(self));
        let ended = ended(self.expert.clone()).into_actor(self);
        ctx.spawn(ended.map(|(), actor, ctx| {
            actor.tombstone.write(Exit::Finished);
            ctx.stop();
        }));
    }
}

/// Answers messages one after the other.
async fn serve(expert: ExpertHandle, inbox: ExpertInbox) {
    while let Some(message) = inbox.next().await {
        match message {
            ExpertMessage::Info(reply) => reply.send(expert.info().clone()),
            ExpertMessage::Stats(reply) => reply.send(expert.status()),
            ExpertMessage::Save(deadline, reply) => reply.send(expert.save(deadline).await),
            ExpertMessage::Reload(snapshot, deadline, reply) => {
                let outcome = expert.reload(snapshot, deadline).await;
                if let Err(error) = &outcome {
                    warn!(uid = %expert.uid(), %error, "expert is not reloaded");
                }
                reply.send(outcome);
            }
            ExpertMessage::Stop(deadline, reply) => reply.send(expert.stop(deadline).await),
        }
    }
}

/// Completes when the expert has stopped.
async fn ended(expert: ExpertHandle) {
    let mut state = expert.watch_state();
    if state.wait_for(|state| *state == ExpertState::Stopped).await.is_ok() {
        debug!(uid = %expert.uid(), "expert ends");
    }
}
