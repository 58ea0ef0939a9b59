//! [`Reviver`]: puts a poisoned expert back to its newest checkpoint.

use skep_kernel::{
    Deadline, Exit, Restart, Seed, SharedClock,
    restart::{Decision, History, Intensity, RestartLog},
};
use tracing::{error, info, warn};

use crate::{ExpertHandle, ExpertState, checkpointer::SAVE_WITHIN, saving::Saving};

/// Waits a little longer each time that an expert is poisoned soon after it was revived, and leaves it withdrawn when
/// that happens too often, as supervisors do with actors.
#[derive(Clone)]
pub(crate) struct Reviver {
    pub saving: Saving,
    pub clock: SharedClock,
    pub seed: Seed,
}

impl Reviver {
    /// Watches the expert until it has stopped.
    pub async fn run(self, expert: ExpertHandle) {
        let uid = expert.uid();
        let mut log = RestartLog::new(Intensity::default(), self.seed);
        let mut history = History::new(Restart::Transient);
        history.on_start(self.clock.now());
        let state = expert.watch_state();
        loop {
            let poisoned = state.until(|state| match state {
                ExpertState::Poisoned { reason } => Some(Some(reason.clone())),
                ExpertState::Stopped => Some(None),
                ExpertState::Serving | ExpertState::Stopping => None,
            });
            let Some(reason) = poisoned.await else { return };
            let now = self.clock.now();
            let revived = match log.on_exit(now, &mut history, &Exit::Failed(reason)) {
                Decision::Restart { after } => {
                    self.clock.sleep_until(now + after).await;
                    if !is_poisoned(&expert.state()) {
                        continue;
                    }
                    self.saving.revive(&expert, Deadline::after(self.clock.now(), SAVE_WITHIN)).await
                }
                Decision::Escalate | Decision::Forget => {
                    error!(%uid, "expert is poisoned again and again and stays withdrawn");
                    Ok(false)
                }
            };
            match revived {
                Ok(true) => {
                    history.on_start(self.clock.now());
                    info!(%uid, "poisoned expert was put back to its checkpoint and serves again");
                }
                Ok(false) => {
                    warn!(%uid, "poisoned expert stays withdrawn until it is reloaded");
                    state.until(|state| (!is_poisoned(state)).then_some(())).await;
                }
                Err(error) => warn!(%uid, %error, "poisoned expert is not revived; trying again"),
            }
        }
    }
}

fn is_poisoned(state: &ExpertState) -> bool {
    matches!(state, ExpertState::Poisoned { .. })
}
