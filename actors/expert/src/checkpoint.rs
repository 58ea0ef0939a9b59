//! Checkpoints of experts: the port to wherever they are kept.

mod directory;
mod format;
mod memory;

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use skep_wire::{ExpertInfo, ExpertUid};

pub use directory::DirectoryCheckpoints;
pub use memory::MemoryCheckpoints;

use crate::{Backend, BackendError, Snapshot, schema::Schema};

/// One checkpoint of an expert; a later one has a higher number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CheckpointId(pub u64);

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}", self.0)
    }
}

/// What a checkpoint is of. Readable, so that a person can tell checkpoints apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The expert's name in the grid.
    pub uid: String,
    /// The class under which it was hosted, as in `ffn`.
    pub class: String,
    /// Optimizer steps made.
    pub step: u64,
    /// Name of the optimizer whose state is in it, as in `adam`.
    pub optimizer: String,
    /// How it was trained, as [`Backend::settings`] said.
    #[serde(default)]
    pub settings: BTreeMap<String, f64>,
    /// The flat inputs, as in `input 0: float32 [batch, 512]`.
    pub inputs: Vec<String>,
    /// The flat outputs, likewise.
    pub outputs: Vec<String>,
}

impl Manifest {
    /// Describes an expert of this name after so many steps of `backend`.
    pub fn of(uid: &ExpertUid, step: u64, backend: &dyn Backend) -> Result<Self, BackendError> {
        let (inputs, outputs) = schema_lines(backend.info())?;
        Ok(Self {
            uid: uid.to_string(),
            class: backend.class().to_owned(),
            step,
            optimizer: backend.optimizer().to_owned(),
            settings: backend.settings(),
            inputs,
            outputs,
        })
    }

    /// Why a checkpoint with this manifest is none of an expert that would be saved with `own`; `None` if it fits.
    pub fn misfit(&self, own: &Manifest) -> Option<String> {
        let texts = [("class", &self.class, &own.class), ("optimizer", &self.optimizer, &own.optimizer)];
        if let Some((what, saved, hosted)) = texts.into_iter().find(|(_, saved, hosted)| saved != hosted) {
            return Some(format!("it was saved with {what} {saved:?} and is hosted with {hosted:?}"));
        }
        let lists = [("inputs", &self.inputs, &own.inputs), ("outputs", &self.outputs, &own.outputs)];
        let (what, saved, hosted) = lists.into_iter().find(|(_, saved, hosted)| saved != hosted)?;
        Some(format!("it was saved with {what} {} and is hosted with {}", saved.join(", "), hosted.join(", ")))
    }
}

fn schema_lines(info: &ExpertInfo) -> Result<(Vec<String>, Vec<String>), BackendError> {
    let schema = Schema::of(info, &[])?;
    let line = |slot: &crate::schema::Slot| format!("{}: {}", slot.name, slot.expectation());
    Ok((schema.inputs.iter().map(line).collect(), schema.outputs.iter().map(line).collect()))
}

/// The state of an expert and what it is of.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// What it is of.
    pub manifest: Manifest,
    /// Parameters, buffers, optimizer and schedule.
    pub snapshot: Snapshot,
}

/// Why a store failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system refused something.
    #[error("cannot {what}: {reason}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// What the system said.
        reason: String,
    },
    /// What is there is not what was written.
    #[error("checkpoint {id} is damaged: {reason}")]
    Damaged {
        /// Which one.
        id: CheckpointId,
        /// How it shows.
        reason: String,
    },
    /// A state that cannot be written down.
    #[error("the state cannot be written: {0}")]
    Unwritable(String),
    /// Another process writes there.
    #[error("checkpoint folder {0} is in use by another process; give each server a folder of its own")]
    InUse(String),
}

/// Where checkpoints are kept. Calls block, so a server makes them on a thread of its own, one at a time.
pub trait CheckpointStore: Send + Sync {
    /// The experts that have a checkpoint, in the order of their names.
    fn experts(&self) -> Result<Vec<ExpertUid>, StoreError>;

    /// The checkpoints of an expert, the newest first; none when it has none. Whether they are whole shows when they
    /// are read.
    fn list(&self, uid: &ExpertUid) -> Result<Vec<CheckpointId>, StoreError>;

    /// A checkpoint as it was written, or an error: never another state.
    fn read(&self, uid: &ExpertUid, id: CheckpointId) -> Result<Checkpoint, StoreError>;

    /// Writes a checkpoint that is newer than all others of the expert. Durable once it returns; when it fails or the
    /// process dies meanwhile, the others are as before.
    fn write(&self, uid: &ExpertUid, checkpoint: &Checkpoint) -> Result<CheckpointId, StoreError>;

    /// Removes all checkpoints of an expert but the newest `keep`, and what unfinished writes left.
    fn prune(&self, uid: &ExpertUid, keep: usize) -> Result<(), StoreError>;
}

/// A store that several parts hold.
pub type SharedStore = Arc<dyn CheckpointStore>;
