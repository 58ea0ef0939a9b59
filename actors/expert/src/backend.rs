//! The port to whatever computes: torch, a script, a closure.

use std::{any::Any, collections::BTreeMap};

use skep_kernel::Rows;
use skep_wire::{ExpertInfo, HostTensor};

/// Tasks joined along the first dimension.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Rows of the first input.
    pub rows: Rows,
    /// One tensor per flat input, in schema order.
    pub inputs: Vec<HostTensor>,
    /// Backward only: one gradient per flat output, in schema order; empty for forward.
    pub grad_outputs: Vec<HostTensor>,
}

/// Why a batch failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The batch's fault: shapes, values. The expert's state is as before.
    #[error("{0}")]
    Invalid(String),
    /// The module failed before anything was changed.
    #[error("{0}")]
    Failed(String),
    /// Failed while state was being changed: the expert must not answer any more until it is reloaded.
    #[error("failed during the optimizer step: {0}")]
    Torn(String),
}

/// State of an expert as named blobs: parameters, buffers, optimizer and schedule.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Optimizer steps made.
    pub step: u64,
    /// Tensors by name.
    pub tensors: Vec<(String, HostTensor)>,
}

/// An expert's module with its optimizer. Lives on one executor thread at a time; calls never overlap.
pub trait Backend: Send {
    /// Schemas of inputs and outputs.
    fn info(&self) -> &ExpertInfo;

    /// Dimensions, beside the first, of which requests may have another length than the schema says, as that of a
    /// sequence. They hold for every tensor that has so many dimensions.
    fn free_dimensions(&self) -> &[usize] {
        &[]
    }

    /// The class name under which it is hosted, as in `ffn`.
    fn class(&self) -> &str;

    /// Number of trainable parameters.
    fn parameter_count(&self) -> u64;

    /// Optimizer steps made so far.
    fn steps(&self) -> u64;

    /// Name of the optimizer whose state is saved, as in `adam`. A checkpoint with another one's state is not loaded.
    fn optimizer(&self) -> &str {
        "none"
    }

    /// Numbers that say how it trains, for whoever reads a checkpoint: learning rate, momentum and the like. A checkpoint
    /// with other ones is loaded all the same.
    fn settings(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// One output per flat output of the schema, each with the batch's rows. Changes no parameter.
    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError>;

    /// Recomputes forward, makes one optimizer step, returns one gradient per flat input (zeros for inputs that have
    /// none), taken before the step (docs/wire.md §9.1).
    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError>;

    /// Copies the whole state.
    fn save(&mut self) -> Result<Snapshot, BackendError>;

    /// Replaces the whole state; names, shapes and dtypes must agree.
    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError>;

    /// The backend as what it is, for a [`Device`](crate::Device) that works on more than host tensors; by default hidden.
    /// A backend around another one gives that one's.
    fn as_any_mut(&mut self) -> Option<&mut dyn Any> {
        None
    }
}

/// Makes a backend on an executor thread; called again when the expert is restarted.
pub type BackendFactory = Box<dyn FnMut() -> Result<Box<dyn Backend>, BackendError> + Send>;
