//! [`ScriptedBackend`]: an expert that computes almost nothing and misbehaves on request.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use skep_expert::{Backend, BackendError, Batch, Snapshot};
use skep_kernel::Rows;
use skep_wire::{DType, ExpertInfo, HostTensor, TensorDescriptor};

/// A batch as the backend saw it.
///
/// ```
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(1).experts("m.0").start().await;
///     let moe = sim.client(&hive).moe("m.", [1]).build().await;
///     let out = moe.forward(sim.rows(3, 4)).await.expect("the server lives");
///     moe.backward(&out, out.ones()).await.expect("the server lives");
///     let batches = hive.recording("m.0").batches();
///     assert_eq!(batches.iter().map(|seen| (seen.backward, seen.batch.rows.0)).collect::<Vec<_>>(), [(false, 3), (true, 3)]);
/// });
/// ```
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Whether it was a backward batch.
    pub backward: bool,
    /// The batch.
    pub batch: Batch,
}

/// The batches that a backend was given, in order. Clones share the list.
///
/// ```
/// use skep_expert::{Backend, Batch};
/// use skep_kernel::Rows;
/// use skep_testkit::{ScriptedBackend, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let mut backend = ScriptedBackend::scale(2.0);
///     let recording = backend.recording();
///     backend.forward(&Batch { rows: Rows(2), inputs: vec![sim.rows(2, 4)], grad_outputs: vec![] }).expect("no failure is ordered");
///     assert_eq!(recording.batches().len(), 1);
/// });
/// ```
#[derive(Clone, Debug, Default)]
pub struct Recording(Arc<Mutex<Vec<Recorded>>>);

impl Recording {
    /// All batches so far.
    pub fn batches(&self) -> Vec<Recorded> {
        self.0.lock().expect("a list of batches is never left half written").clone()
    }

    fn push(&self, recorded: Recorded) {
        self.0.lock().expect("a list of batches is never left half written").push(recorded);
    }
}

/// An expert `y = weight · x` over float32 tensors `[batch, width]`, of any width unless [one](Self::of_width) is set.
///
/// [`scale`](Self::scale) never changes its weight; [`affine`](Self::affine) trains it by `weight -= lr · Σ x·g`, so a
/// test can count its steps. Misbehaviour is ordered by the number of the batch, forward and backward counted together
/// from 1. Costs are virtual time; they count where [`Servers`](crate::Servers) host it.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::ScriptedBackend;
///
/// let millis = Duration::from_millis;
/// let backend = ScriptedBackend::scale(2.0).costing(millis(3)).costing_per_row(millis(1)).fail_on(2).panic_on(5);
/// assert_eq!(backend.cost(skep_kernel::Rows(4)), millis(7));
/// ```
#[derive(Clone, Debug)]
pub struct ScriptedBackend {
    info: ExpertInfo,
    weight: f32,
    learning_rate: f32,
    steps: u64,
    batches: u64,
    fail_on: BTreeSet<u64>,
    panic_on: BTreeSet<u64>,
    nan_on: BTreeSet<u64>,
    tear_on: BTreeSet<u64>,
    cost: Duration,
    cost_per_row: Duration,
    recording: Recording,
}

impl ScriptedBackend {
    /// Multiplies by `factor`; backward counts a step and changes nothing.
    pub fn scale(factor: f32) -> Self {
        Self {
            info: info(TensorDescriptor { size: vec![None, None], ..TensorDescriptor::batched(DType::F32, &[]) }),
            weight: factor,
            learning_rate: 0.0,
            steps: 0,
            batches: 0,
            fail_on: BTreeSet::new(),
            panic_on: BTreeSet::new(),
            nan_on: BTreeSet::new(),
            tear_on: BTreeSet::new(),
            cost: Duration::ZERO,
            cost_per_row: Duration::ZERO,
            recording: Recording::default(),
        }
    }

    /// Multiplies by a weight that backward trains.
    pub fn affine(weight: f32, learning_rate: f32) -> Self {
        Self { learning_rate, ..Self::scale(weight) }
    }

    /// Takes only rows of this width.
    pub fn of_width(self, width: usize) -> Self {
        Self { info: info(TensorDescriptor::batched(DType::F32, &[width])), ..self }
    }

    /// What each batch costs in virtual time.
    pub fn costing(self, cost: Duration) -> Self {
        Self { cost, ..self }
    }

    /// What each row of a batch costs beside that.
    pub fn costing_per_row(self, cost_per_row: Duration) -> Self {
        Self { cost_per_row, ..self }
    }

    /// What a batch of so many rows costs.
    pub fn cost(&self, rows: Rows) -> Duration {
        self.cost + self.cost_per_row * rows.0
    }

    /// The n-th batch fails before anything changes.
    pub fn fail_on(mut self, batch: u64) -> Self {
        self.fail_on.insert(batch);
        self
    }

    /// The n-th batch panics.
    pub fn panic_on(mut self, batch: u64) -> Self {
        self.panic_on.insert(batch);
        self
    }

    /// The n-th batch gives NaN.
    pub fn nan_on(mut self, batch: u64) -> Self {
        self.nan_on.insert(batch);
        self
    }

    /// The n-th batch fails during its optimizer step, if it is a backward batch.
    pub fn tear_on(mut self, batch: u64) -> Self {
        self.tear_on.insert(batch);
        self
    }

    /// The list into which batches go.
    pub fn recording(&self) -> Recording {
        self.recording.clone()
    }

    /// The same backend with a list of its own.
    pub fn recorded_anew(&self) -> Self {
        Self { recording: Recording::default(), ..self.clone() }
    }

    /// The weight now.
    pub fn weight(&self) -> f32 {
        self.weight
    }

    fn begin(&mut self, batch: &Batch, backward: bool) -> Result<u64, BackendError> {
        self.batches += 1;
        self.recording.push(Recorded { backward, batch: batch.clone() });
        assert!(!self.panic_on.contains(&self.batches), "panic ordered on batch {}", self.batches);
        if self.fail_on.contains(&self.batches) {
            return Err(BackendError::Failed(format!("failure ordered on batch {}", self.batches)));
        }
        Ok(self.batches)
    }

    fn scaled(&self, tensor: &HostTensor, number: u64) -> Result<Vec<HostTensor>, BackendError> {
        let factor = if self.nan_on.contains(&number) { f32::NAN } else { self.weight };
        let values: Vec<f32> = floats(tensor)?.iter().map(|v| v * factor).collect();
        let scaled = HostTensor::from_f32(tensor.shape(), &values);
        Ok(vec![scaled.map_err(|error| BackendError::Failed(error.to_string()))?])
    }
}

fn info(tensor: TensorDescriptor) -> ExpertInfo {
    ExpertInfo::simple(tensor.clone(), tensor.with_grad())
}

fn only(tensors: &[HostTensor]) -> Result<&HostTensor, BackendError> {
    match tensors {
        [only] => Ok(only),
        _ => Err(BackendError::Invalid(format!("expected 1 tensor, got {}", tensors.len()))),
    }
}

fn floats(tensor: &HostTensor) -> Result<Vec<f32>, BackendError> {
    tensor.to_f32().map_err(|error| BackendError::Invalid(error.to_string()))
}

impl Backend for ScriptedBackend {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn class(&self) -> &str {
        "scripted"
    }

    fn parameter_count(&self) -> u64 {
        1
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        let number = self.begin(batch, false)?;
        self.scaled(only(&batch.inputs)?, number)
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        let number = self.begin(batch, true)?;
        let (inputs, gradients) = (only(&batch.inputs)?, only(&batch.grad_outputs)?);
        let input_gradients = self.scaled(gradients, number)?;
        if self.tear_on.contains(&number) {
            return Err(BackendError::Torn(format!("torn step ordered on batch {number}")));
        }
        let gradient: f32 = floats(inputs)?.iter().zip(floats(gradients)?).map(|(x, g)| x * g).sum();
        self.weight -= self.learning_rate * gradient;
        self.steps += 1;
        Ok(input_gradients)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        let weight = HostTensor::from_f32([1], &[self.weight]);
        let weight = weight.map_err(|error| BackendError::Failed(error.to_string()))?;
        Ok(Snapshot { step: self.steps, tensors: vec![("weight".to_owned(), weight)] })
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        let [(name, weight)] = snapshot.tensors.as_slice() else {
            return Err(BackendError::Invalid("a scripted expert has exactly one tensor".to_owned()));
        };
        let values = floats(weight)?;
        let [value] = values.as_slice() else {
            return Err(BackendError::Invalid(format!("{name} must be one value, got {}", values.len())));
        };
        self.weight = *value;
        self.steps = snapshot.step;
        Ok(())
    }
}
