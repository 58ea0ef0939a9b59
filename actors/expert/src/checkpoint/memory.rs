//! [`MemoryCheckpoints`]: a store that outlives servers but not the process, for simulations.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use skep_wire::ExpertUid;

use super::{Checkpoint, CheckpointId, CheckpointStore, StoreError};

/// Checkpoints in memory. Clones share them, as processes share a disk: what one server wrote, the next one reads.
#[derive(Clone, Debug, Default)]
pub struct MemoryCheckpoints {
    experts: Arc<Mutex<BTreeMap<ExpertUid, BTreeMap<CheckpointId, Kept>>>>,
}

#[derive(Clone, Debug)]
struct Kept {
    checkpoint: Checkpoint,
    damaged: bool,
}

impl MemoryCheckpoints {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Damages a checkpoint, so that reading it fails from now on. Does nothing when it is not there.
    pub fn damage(&self, uid: &ExpertUid, id: CheckpointId) {
        if let Some(kept) = self.lock().get_mut(uid).and_then(|kept| kept.get_mut(&id)) {
            kept.damaged = true;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ExpertUid, BTreeMap<CheckpointId, Kept>>> {
        self.experts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CheckpointStore for MemoryCheckpoints {
    fn experts(&self) -> Result<Vec<ExpertUid>, StoreError> {
        Ok(self.lock().iter().filter(|(_, kept)| !kept.is_empty()).map(|(uid, _)| uid.clone()).collect())
    }

    fn list(&self, uid: &ExpertUid) -> Result<Vec<CheckpointId>, StoreError> {
        Ok(self.lock().get(uid).map(|kept| kept.keys().rev().copied().collect()).unwrap_or_default())
    }

    fn read(&self, uid: &ExpertUid, id: CheckpointId) -> Result<Checkpoint, StoreError> {
        match self.lock().get(uid).and_then(|kept| kept.get(&id)) {
            Some(Kept { checkpoint, damaged: false }) => Ok(checkpoint.clone()),
            Some(_) => Err(StoreError::Damaged { id, reason: "damage was ordered".to_owned() }),
            None => Err(StoreError::Damaged { id, reason: "it is not there".to_owned() }),
        }
    }

    fn write(&self, uid: &ExpertUid, checkpoint: &Checkpoint) -> Result<CheckpointId, StoreError> {
        let mut experts = self.lock();
        let kept = experts.entry(uid.clone()).or_default();
        let id = CheckpointId(kept.last_key_value().map_or(1, |(newest, _)| newest.0 + 1));
        kept.insert(id, Kept { checkpoint: checkpoint.clone(), damaged: false });
        Ok(id)
    }

    fn prune(&self, uid: &ExpertUid, keep: usize) -> Result<(), StoreError> {
        if let Some(kept) = self.lock().get_mut(uid) {
            while kept.len() > keep {
                kept.pop_first();
            }
        }
        Ok(())
    }
}
