//! The port to whatever runs batches one behind the other, and [`Lane`]: the order in which an executor uses it.

use std::collections::VecDeque;

use skep_wire::HostTensor;

use crate::{Backend, BackendError, Batch, Kind};

/// Batches launched and not yet collected, at the most: one runs, the next one is behind it.
const DEPTH: usize = 2;

/// What a batch gave: outputs or input gradients in schema order.
pub type Outcome = Result<Vec<HostTensor>, BackendError>;

/// One stream of a device. What is launched runs in its order; copies to the device may overlap with it.
pub trait Device {
    /// A batch on its way to the device.
    type Staged;
    /// A batch in the stream.
    type Launched;
    /// A place in the stream.
    type Mark;

    /// Begins to bring a batch to the device. Does not wait.
    fn stage(&mut self, batch: Batch) -> Self::Staged;

    /// Puts a batch into the stream, behind all that were launched before. Does not wait, unless the device is the CPU.
    fn launch(&mut self, kind: Kind, staged: Self::Staged, backend: &mut dyn Backend) -> Self::Launched;

    /// Marks the place behind what was launched last.
    fn record(&mut self) -> Self::Mark;

    /// Whether the stream has come to a mark. Does not wait.
    fn query(&mut self, mark: &Self::Mark) -> bool;

    /// What a batch gave whose mark the stream has reached.
    fn collect(&mut self, launched: Self::Launched) -> Outcome;
}

/// The CPU as a device: a batch has run when its launch returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Device for Cpu {
    type Staged = Batch;
    type Launched = Outcome;
    type Mark = ();

    fn stage(&mut self, batch: Batch) -> Batch {
        batch
    }

    fn launch(&mut self, kind: Kind, staged: Batch, backend: &mut dyn Backend) -> Outcome {
        match kind {
            Kind::Forward => backend.forward(&staged),
            Kind::Backward => backend.backward(&staged),
        }
    }

    fn record(&mut self) {}

    fn query(&mut self, _mark: &()) -> bool {
        true
    }

    fn collect(&mut self, launched: Outcome) -> Outcome {
        launched
    }
}

/// The order in which batches pass through a device: while one runs the next one is launched behind it and one more is
/// staged; answers leave in the order of the launches, each when the stream has passed it. Decides only, waits for
/// nothing. `T` says what a batch is of.
pub struct Lane<D: Device, T> {
    device: D,
    staged: Option<(Kind, D::Staged, T)>,
    launched: VecDeque<(D::Mark, D::Launched, T)>,
}

impl<D: Device, T> Lane<D, T> {
    /// An empty lane.
    pub fn new(device: D) -> Self {
        Self { device, staged: None, launched: VecDeque::new() }
    }

    /// Stages a batch; it comes back while another one is staged.
    pub fn stage(&mut self, kind: Kind, batch: Batch, tag: T) -> Result<(), (Batch, T)> {
        if self.staged.is_some() {
            return Err((batch, tag));
        }
        self.staged = Some((kind, self.device.stage(batch), tag));
        Ok(())
    }

    /// Launches the staged batch, if there is one and not too many are in the stream. `backend` is that of its expert.
    pub fn launch(&mut self, backend: &mut dyn Backend) -> bool {
        if self.launched.len() >= DEPTH {
            return false;
        }
        let Some((kind, staged, tag)) = self.staged.take() else { return false };
        let launched = self.device.launch(kind, staged, backend);
        self.launched.push_back((self.device.record(), launched, tag));
        true
    }

    /// The oldest launched batch, once the stream has passed it.
    pub fn finished(&mut self) -> Option<(T, Outcome)> {
        let (mark, ..) = self.launched.front()?;
        if !self.device.query(mark) {
            return None;
        }
        let (_, launched, tag) = self.launched.pop_front().expect("a front was there");
        Some((tag, self.device.collect(launched)))
    }

    /// Forgets the oldest launched batches until so many are left, after a device that failed to answer for them.
    pub(crate) fn forget_down_to(&mut self, left: usize) {
        while self.launched.len() > left {
            drop(self.launched.pop_front());
        }
    }

    /// Whether nothing is staged or launched.
    pub fn is_empty(&self) -> bool {
        self.staged.is_none() && self.launched.is_empty()
    }
}

/// Runs one batch on the CPU, through the same port.
pub(crate) fn run_on_cpu(kind: Kind, batch: Batch, backend: &mut dyn Backend) -> Outcome {
    let mut lane = Lane::new(Cpu);
    let staged = lane.stage(kind, batch, ());
    debug_assert!(staged.is_ok(), "an empty lane takes a batch");
    lane.launch(backend);
    let ((), outcome) = lane.finished().expect("the CPU is done when a launch returns");
    outcome
}
