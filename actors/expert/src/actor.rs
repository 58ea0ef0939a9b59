//! [`ExpertActor`]: owns one expert's life.

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, WrapFuture};
use skep_kernel::{Deadline, Exit, Inbox, Reply, Stop, Tombstone, pump};
use skep_wire::ExpertInfo;
use tracing::{debug, warn};

use crate::{BackendError, ExpertHandle, ExpertState, ExpertStatus, Snapshot, reviver::Reviver, saving::Saving};

/// Questions to one expert's actor that may wait.
pub(crate) const INBOX: usize = 64;

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
    /// Takes nothing new, finishes what is in line until the deadline, takes a last checkpoint where its server keeps
    /// them, then ends. The answer tells whether everything was finished.
    Stop(Deadline, Reply<bool>),
}

/// Questions to an expert's actor, in line. It outlives the actor.
pub type ExpertInbox = Inbox<ExpertMessage>;

/// Answers questions about one expert, one after the other, and ends with it. Work does not pass through it: tasks go to
/// the mailboxes behind the [`ExpertHandle`], which outlive it.
pub struct ExpertActor {
    expert: ExpertHandle,
    reviver: Option<Reviver>,
    tombstone: Tombstone,
}

impl ExpertActor {
    /// An actor that reads the expert's inbox and reports its end on `tombstone`.
    pub fn new(expert: ExpertHandle, tombstone: Tombstone) -> Self {
        Self { expert, reviver: None, tombstone }
    }

    /// Takes checkpoints, and revives the expert from them when it is poisoned.
    pub(crate) fn reviving(self, reviver: Reviver) -> Self {
        Self { reviver: Some(reviver), ..self }
    }
}

impl Actor for ExpertActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        pump(ctx, self.expert.inbox(), |actor, message, ctx| {
            let saving = actor.reviver.as_ref().map(|reviver| reviver.saving.clone());
            ctx.wait(answer(actor.expert.clone(), saving, message).into_actor(actor));
        });
        if let Some(reviver) = self.reviver.clone() {
            ctx.spawn(reviver.run(self.expert.clone()).into_actor(self));
        }
        ctx.spawn(ended(self.expert.clone()).into_actor(self).map(|(), actor, ctx| {
            actor.tombstone.write(Exit::Finished);
            ctx.stop();
        }));
    }
}

impl Handler<Stop> for ExpertActor {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}

async fn answer(expert: ExpertHandle, saving: Option<Saving>, message: ExpertMessage) {
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
        ExpertMessage::Stop(deadline, reply) => {
            let ended = crate::saving::end(&expert, saving.as_ref(), deadline).await;
            if let Err(error) = ended.saved {
                warn!(uid = %expert.uid(), %error, "the last steps are in no checkpoint");
            }
            reply.send(ended.finished);
        }
    }
}

/// Completes when the expert has stopped.
async fn ended(expert: ExpertHandle) {
    expert.watch_state().until(|state| (*state == ExpertState::Stopped).then_some(())).await;
    debug!(uid = %expert.uid(), "expert ends");
}
