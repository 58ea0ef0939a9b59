//! [`Saving`]: takes checkpoints of a server's experts and puts experts back to them. Copies are made by the executors
//! between two batches; files are written and read by a thread of their own.

use std::{sync::Arc, time::Duration};

use skep_kernel::{Deadline, time::before};
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};

use crate::{BackendError, Checkpoint, CheckpointId, ExpertHandle, SharedStore, StoreError, executor::ExecutorGroup};

/// See the module's documentation. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Saving(Arc<Inner>);

struct Inner {
    store: SharedStore,
    keep: usize,
    disk: ExecutorGroup,
    /// One state at a time is held in memory beside the experts' own.
    turn: Semaphore,
}

/// Why there is no checkpoint of an expert, or none that it could be put back to.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum SavingError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("not done before the deadline")]
    Late,
    #[error("reading or writing checkpoints panicked, or has ended")]
    Gone,
    #[error("none of its {0} checkpoints can be read; move them away to begin anew")]
    AllDamaged(usize),
    #[error("checkpoint {id} does not fit: {reason}; move it away to begin anew")]
    Misfit { id: CheckpointId, reason: String },
}

/// How long the last checkpoint of an expert that ends may take after everything else. Queues behind those of others
/// count.
pub const LAST_CHECKPOINT: Duration = Duration::from_secs(20);

/// How an expert ended.
pub(crate) struct Ended {
    /// Whether everything in its line was finished.
    pub finished: bool,
    /// How many accepted tasks got an error instead.
    pub abandoned: usize,
    /// Whether its last checkpoint was taken, where there is a place for it.
    pub saved: Result<(), SavingError>,
}

/// Ends an expert: takes nothing new, finishes what is in line until the deadline and answers the rest with an error,
/// then takes a last checkpoint, which may go on for [`LAST_CHECKPOINT`] more.
pub(crate) async fn end(expert: &ExpertHandle, saving: Option<&Saving>, deadline: Deadline) -> Ended {
    let finished = expert.finish(deadline).await;
    let mut abandoned = 0;
    let saved = match saving {
        Some(saving) => {
            abandoned = expert.abandon_line();
            let now = saving.0.disk.now();
            saving.save(expert, Deadline::at(deadline.moment().max(now) + LAST_CHECKPOINT)).await
        }
        None => Ok(()),
    };
    abandoned += expert.close();
    Ended { finished, abandoned, saved }
}

impl Saving {
    /// Saves to `store`, of each expert the newest `keep`, on the executors of `disk`.
    pub fn new(store: SharedStore, keep: usize, disk: ExecutorGroup) -> Self {
        Self(Arc::new(Inner { store, keep, disk, turn: Semaphore::new(1) }))
    }

    /// Writes the expert's state as it is between two batches, unless it is what was written last. A poisoned expert's
    /// is not written.
    pub async fn save(&self, expert: &ExpertHandle, deadline: Deadline) -> Result<(), SavingError> {
        let _turn = self.turn(deadline).await?;
        let Some(checkpoint) = expert.checkpoint(deadline).await? else { return Ok(()) };
        let step = checkpoint.snapshot.step;
        let (uid, keep) = (expert.uid().clone(), self.0.keep);
        let id = self
            .on_disk(deadline, move |store| {
                let id = store.write(&uid, &checkpoint)?;
                store.prune(&uid, keep)?;
                Ok(id)
            })
            .await?;
        expert.note_saved(step);
        debug!(uid = %expert.uid(), %id, step, "checkpoint written");
        Ok(())
    }

    /// Puts a new expert to its newest checkpoint that can be read; `false` when it has none at all.
    pub async fn restore(&self, expert: &ExpertHandle, deadline: Deadline) -> Result<bool, SavingError> {
        self.put_back(expert, deadline, async |checkpoint| expert.load_state(checkpoint, deadline).await).await
    }

    /// Revives a poisoned expert from its newest checkpoint that can be read; `false` when it has none at all.
    pub async fn revive(&self, expert: &ExpertHandle, deadline: Deadline) -> Result<bool, SavingError> {
        self.put_back(expert, deadline, async |checkpoint| expert.reload(checkpoint.snapshot, deadline).await).await
    }

    async fn put_back(
        &self,
        expert: &ExpertHandle,
        deadline: Deadline,
        load: impl AsyncFnOnce(Checkpoint) -> Result<(), BackendError>,
    ) -> Result<bool, SavingError> {
        let _turn = self.turn(deadline).await?;
        let Some((id, checkpoint)) = self.newest(expert, deadline).await? else { return Ok(false) };
        if let Some(reason) = checkpoint.manifest.misfit(expert.manifest()) {
            return Err(SavingError::Misfit { id, reason });
        }
        let step = checkpoint.snapshot.step;
        match load(checkpoint).await {
            Ok(()) => {
                expert.note_saved(step);
                info!(uid = %expert.uid(), %id, step, "expert continues from its checkpoint");
                Ok(true)
            }
            Err(BackendError::Invalid(reason)) => Err(SavingError::Misfit { id, reason }),
            Err(error) => Err(error.into()),
        }
    }

    async fn newest(
        &self,
        expert: &ExpertHandle,
        deadline: Deadline,
    ) -> Result<Option<(CheckpointId, Checkpoint)>, SavingError> {
        let uid = expert.uid().clone();
        let ids = self.on_disk(deadline, move |store| store.list(&uid)).await?;
        for id in &ids {
            let (uid, id) = (expert.uid().clone(), *id);
            match self.on_disk(deadline, move |store| store.read(&uid, id)).await {
                Ok(checkpoint) => return Ok(Some((id, checkpoint))),
                Err(SavingError::Store(error)) => {
                    warn!(uid = %expert.uid(), %error, "checkpoint cannot be read; trying the one before");
                }
                Err(error) => return Err(error),
            }
        }
        if ids.is_empty() { Ok(None) } else { Err(SavingError::AllDamaged(ids.len())) }
    }

    async fn turn(&self, deadline: Deadline) -> Result<tokio::sync::SemaphorePermit<'_>, SavingError> {
        let turn = before(&**self.0.disk.clock(), deadline, self.0.turn.acquire()).await;
        Ok(turn.map_err(|_| SavingError::Late)?.expect("the semaphore is never closed"))
    }

    async fn on_disk<R: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce(&dyn crate::CheckpointStore) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, SavingError> {
        let store = self.0.store.clone();
        let done = self.0.disk.run(move || work(&*store)).map_err(|_| SavingError::Gone)?;
        match before(&**self.0.disk.clock(), deadline, done).await {
            Ok(Ok(outcome)) => Ok(outcome?),
            Ok(Err(_)) => Err(SavingError::Gone),
            Err(_) => Err(SavingError::Late),
        }
    }

    /// Ends the thread once what it writes is written; waits for it until the deadline.
    pub async fn stop(&self, deadline: Deadline) -> Result<(), SavingError> {
        self.0.disk.stop(deadline).await.map_err(|_| SavingError::Late)
    }
}
