//! [`SimDisk`]: a node's checkpoint store, which survives its process and can be made to fail.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use skep_expert::{Checkpoint, CheckpointId, CheckpointStore, MemoryCheckpoints, StoreError};
use skep_wire::ExpertUid;

/// The disk of one server, from [`SimServer::disk`](crate::SimServer::disk). Cheap to clone; clones share it.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{ScriptedBackend, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let backend = ScriptedBackend::affine(1.0, 0.1);
///     let hive = sim.servers(1).experts("ffn.[0:2]").backend(backend).with_checkpoints().start().await;
///     let disk = hive.servers()[0].disk().expect("it has checkpoints");
///     disk.fill();
///     sim.advance(Duration::from_secs(600)).await; // checkpoints that are due are not written
///     disk.mend();
/// });
/// ```
#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    kept: MemoryCheckpoints,
    faults: Arc<Mutex<Faults>>,
}

#[derive(Debug, Default)]
struct Faults {
    broken: bool,
    full: bool,
    tear: bool,
}

impl SimDisk {
    /// Everything that is tried fails from now on.
    pub fn fail(&self) {
        self.faults().broken = true;
    }

    /// There is no room for another checkpoint from now on; what is there can be read.
    pub fn fill(&self) {
        self.faults().full = true;
    }

    /// The next checkpoint is written only in part although the disk says that all is well, as when the power fails.
    pub fn tear(&self) {
        self.faults().tear = true;
    }

    /// Works again. What is damaged stays so.
    pub fn mend(&self) {
        *self.faults() = Faults::default();
    }

    /// What lies on it, damaged or not, the newest first.
    pub fn checkpoints(&self, uid: &ExpertUid) -> Vec<CheckpointId> {
        self.kept.list(uid).expect("memory can be read")
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn works(&self, what: &str) -> Result<(), StoreError> {
        if self.faults().broken { Err(refused(what, "input/output error")) } else { Ok(()) }
    }
}

fn refused(what: &str, reason: &str) -> StoreError {
    StoreError::Io { what: what.to_owned(), reason: reason.to_owned() }
}

impl CheckpointStore for SimDisk {
    fn experts(&self) -> Result<Vec<ExpertUid>, StoreError> {
        self.works("list experts")?;
        self.kept.experts()
    }

    fn list(&self, uid: &ExpertUid) -> Result<Vec<CheckpointId>, StoreError> {
        self.works("list checkpoints")?;
        self.kept.list(uid)
    }

    fn read(&self, uid: &ExpertUid, id: CheckpointId) -> Result<Checkpoint, StoreError> {
        self.works("read a checkpoint")?;
        self.kept.read(uid, id)
    }

    fn write(&self, uid: &ExpertUid, checkpoint: &Checkpoint) -> Result<CheckpointId, StoreError> {
        self.works("write a checkpoint")?;
        if self.faults().full {
            return Err(refused("write a checkpoint", "no space left on device"));
        }
        let id = self.kept.write(uid, checkpoint)?;
        if std::mem::take(&mut self.faults().tear) {
            self.kept.damage(uid, id);
        }
        Ok(id)
    }

    fn prune(&self, uid: &ExpertUid, keep: usize) -> Result<(), StoreError> {
        self.works("remove checkpoints")?;
        self.kept.prune(uid, keep)
    }
}
