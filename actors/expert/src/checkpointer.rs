//! [`CheckpointActor`]: saves a server's experts again and again.

use std::time::Duration;

use actix::{Actor, ActorContext, AsyncContext, Context, Handler, WrapFuture};
use skep_kernel::{Deadline, SharedClock, Stop, Tombstone};
use tracing::warn;

use crate::{ExpertHandle, ExpertState, saving::Saving};

/// How long one expert's checkpoint may take. A slower disk keeps the older ones.
pub(crate) const SAVE_WITHIN: Duration = Duration::from_secs(300);

/// Saves, one after the other, first the experts that have no checkpoint yet, then after every period those that have
/// trained since their last one.
pub(crate) struct CheckpointActor {
    experts: Vec<ExpertHandle>,
    saving: Saving,
    clock: SharedClock,
    period: Duration,
    /// Reports a panic; the actor ends in no other way than by being stopped.
    _tombstone: Tombstone,
}

impl CheckpointActor {
    pub fn new(
        experts: Vec<ExpertHandle>,
        saving: Saving,
        clock: SharedClock,
        period: Duration,
        tombstone: Tombstone,
    ) -> Self {
        Self { experts, saving, clock, period, _tombstone: tombstone }
    }
}

impl Actor for CheckpointActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        let (experts, saving, clock, period) =
            (self.experts.clone(), self.saving.clone(), self.clock.clone(), self.period);
        let rounds = async move {
            let unsaved = experts.iter().filter(|expert| expert.saved_step().is_none());
            round(unsaved, &saving, &clock).await;
            loop {
                clock.sleep_until(clock.now() + period).await;
                round(experts.iter(), &saving, &clock).await;
            }
        };
        ctx.spawn(rounds.into_actor(self));
    }
}

impl Handler<Stop> for CheckpointActor {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}

async fn round(experts: impl Iterator<Item = &ExpertHandle>, saving: &Saving, clock: &SharedClock) {
    for expert in experts {
        let saved = saving.save(expert, Deadline::after(clock.now(), SAVE_WITHIN)).await;
        // While it stops its last checkpoint is taken elsewhere.
        if let (Err(error), ExpertState::Serving) = (saved, expert.state()) {
            warn!(uid = %expert.uid(), %error, "no checkpoint was written; the next period tries again");
        }
    }
}
