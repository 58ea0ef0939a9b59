//! [`TorchBackend`]: a module and its optimizer behind the port that experts are hosted through.

use std::{any::Any, collections::BTreeMap};

use skep_expert::{Backend, BackendError, BackendFactory, Batch, Snapshot};
use skep_wire::{ExpertInfo, HostTensor};
use tch::{Device, Tensor};
use tracing::warn;

use crate::{
    Draws, Error, ExpertModule, ModuleSpec, OptimizerSpec,
    convert::{self, to_host},
    error::{failed, short},
    ffi::{self, InferenceMode},
    optim::{Optimizer, clip},
};

/// Makes fresh experts of one class: what a server is told to host.
///
/// Parameters depend on `seed` only, so that a restart without a checkpoint begins at the same place.
pub fn factory(module: ModuleSpec, optimizer: OptimizerSpec, device: Device, seed: u64) -> BackendFactory {
    Box::new(move || {
        let module = module.build(device, seed)?;
        Ok(Box::new(TorchBackend::new(module, optimizer.clone(), device)?))
    })
}

/// An [`ExpertModule`] that trains while it serves (docs/wire.md §9.1).
pub struct TorchBackend {
    module: Box<dyn ExpertModule>,
    info: ExpertInfo,
    device: Device,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    spec: OptimizerSpec,
    optimizer: Optimizer,
    /// Of its random numbers, if it draws any; as a tensor, since it is saved.
    seed: Option<Tensor>,
    steps: u64,
}

impl TorchBackend {
    /// Hosts `module`, whose parameters are on `device`.
    pub fn new(mut module: Box<dyn ExpertModule>, spec: OptimizerSpec, device: Device) -> Result<Self, Error> {
        spec.check()?;
        let (names, parameters): (Vec<_>, Vec<_>) = module.parameters().into_iter().unzip();
        let optimizer = Optimizer::new(spec.rule.clone(), parameters.iter())?;
        let info = module.info();
        let seed = module.draws().map(|draws| Tensor::f_from_slice(&[draws.seed as i64])).transpose()?;
        Ok(Self { module, info, device, names, parameters, spec, optimizer, seed, steps: 0 })
    }

    /// Lets the module draw anew; the same again until the next step.
    fn set_draws(&mut self) -> Result<(), BackendError> {
        if let (Some(seed), Some(draws)) = (&self.seed, self.module.draws()) {
            *draws = Draws { seed: seed.f_int64_value(&[0]).map_err(failed)? as u64, step: self.steps };
        }
        Ok(())
    }

    /// Where its parameters are.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    fn on_device(&self, hosts: &[HostTensor]) -> Result<Vec<Tensor>, BackendError> {
        let load = |host| convert::view(host).and_then(|t| t.f_to(self.device));
        hosts.iter().map(load).collect::<Result<_, _>>().map_err(|e| BackendError::Invalid(short(&e)))
    }

    fn check_count(&self, inputs: &[Tensor]) -> Result<(), BackendError> {
        let expected = self.info.flat_inputs().len();
        if inputs.len() == expected {
            return Ok(());
        }
        Err(BackendError::Invalid(format!("{} inputs given, {expected} expected", inputs.len())))
    }

    /// Outputs for inputs on the module's device; `finish` hands them out.
    pub(crate) fn forward_on<R>(
        &mut self,
        inputs: &[Tensor],
        finish: impl FnOnce(&[Tensor]) -> Result<R, BackendError>,
    ) -> Result<R, BackendError> {
        self.set_draws()?;
        let _guard = InferenceMode::enter().map_err(failed)?;
        self.check_count(inputs)?;
        finish(&self.module.forward(inputs).map_err(failed)?)
    }

    /// One step on inputs and output gradients on the module's device; `finish` hands out the input gradients before the
    /// step, so that its failure changes nothing.
    pub(crate) fn backward_on<R>(
        &mut self,
        mut inputs: Vec<Tensor>,
        grad_outputs: &[Tensor],
        finish: impl FnOnce(&[Tensor]) -> Result<R, BackendError>,
    ) -> Result<R, BackendError> {
        self.check_count(&inputs)?;
        for input in inputs.iter_mut().filter(|input| input.is_floating_point()) {
            *input = input.f_detach().and_then(|t| t.f_set_requires_grad(true)).map_err(failed)?;
        }
        self.set_draws()?;
        let grads = self.gradients(&inputs, grad_outputs)?;
        let norm = self.checked_norm(&grads)?;
        let answer = inputs.iter().zip(&grads.inputs).map(|(input, grad)| match grad {
            Some(grad) => Ok(grad.shallow_clone()),
            None => input.f_detach()?.f_zeros_like(),
        });
        let answer = finish(&answer.collect::<Result<Vec<_>, _>>().map_err(failed)?)?;
        if !self.spec.trains() {
            return Ok(answer);
        }
        let grads = match self.spec.clip_grad_norm {
            Some(limit) => clip(grads.parameters, norm, limit).map_err(failed)?,
            None => grads.parameters,
        };
        let parameters: Vec<&Tensor> = self.parameters.iter().collect();
        let step = self.optimizer.step(&parameters, &grads, self.spec.schedule.factor(self.steps));
        step.map_err(|error| BackendError::Torn(short(&error)))?;
        self.steps += 1;
        Ok(answer)
    }

    /// The batch's output gradients in the outputs' dtypes, with the outputs that they belong to. Outputs that depend on
    /// nothing trainable are left out.
    fn seeds<'a>(outputs: &'a [Tensor], grads: &[Tensor]) -> Result<Vec<(&'a Tensor, Tensor)>, BackendError> {
        if outputs.len() != grads.len() {
            let given = grads.len();
            return Err(BackendError::Invalid(format!("{given} output gradients given for {} outputs", outputs.len())));
        }
        let mut seeds = Vec::new();
        for (i, (output, grad)) in outputs.iter().zip(grads).enumerate() {
            if !output.requires_grad() {
                continue;
            }
            let grad = output.f_kind().and_then(|kind| grad.f_to_kind(kind));
            let grad = grad.map_err(|e| BackendError::Invalid(short(&e)))?;
            if grad.size() != output.size() {
                let (want, got) = (output.size(), grad.size());
                return Err(BackendError::Invalid(format!("gradient of output {i} has shape {got:?}, not {want:?}")));
            }
            seeds.push((output, grad));
        }
        Ok(seeds)
    }

    /// Gradients of all inputs and of the parameters, if these train, at the current parameters.
    fn gradients(&self, inputs: &[Tensor], grad_outputs: &[Tensor]) -> Result<Gradients, BackendError> {
        let outputs = tch::with_grad(|| self.module.forward(inputs)).map_err(failed)?;
        let seeds = Self::seeds(&outputs, grad_outputs)?;
        let trained: &[Tensor] = if self.spec.trains() { &self.parameters } else { &[] };
        let wanted: Vec<&Tensor> = inputs.iter().filter(|i| i.requires_grad()).chain(trained).collect();
        let mut found = if seeds.is_empty() || wanted.is_empty() {
            wanted.iter().map(|_| None).collect()
        } else {
            let (outputs, grads): (Vec<_>, Vec<_>) = seeds.iter().map(|(output, grad)| (*output, grad)).unzip();
            ffi::vjp(&outputs, &grads, &wanted).map_err(failed)?
        };
        let parameters = found.split_off(found.len() - trained.len());
        let mut found = found.into_iter();
        let inputs =
            inputs.iter().map(|input| input.requires_grad().then(|| found.next().flatten()).flatten()).collect();
        Ok(Gradients { inputs, parameters })
    }

    /// Fails when a gradient is not finite; gives the norm of the parameters' gradients.
    fn checked_norm(&self, grads: &Gradients) -> Result<f64, BackendError> {
        for (i, grad) in grads.inputs.iter().enumerate() {
            if let Some(grad) = grad
                && !is_finite(grad)?
            {
                return Err(BackendError::Invalid(format!("gradient of input {i} is not finite; no step was made")));
            }
        }
        let present: Vec<&Tensor> = grads.parameters.iter().flatten().collect();
        let norm = ffi::norm(&present).map_err(failed)?;
        // The norm of huge finite gradients overflows, too: look closer before blaming the batch.
        if !norm.is_finite() {
            for (name, grad) in self.names.iter().zip(&grads.parameters) {
                if let Some(grad) = grad
                    && !is_finite(grad)?
                {
                    return Err(BackendError::Invalid(format!("gradient of {name} is not finite; no step was made")));
                }
            }
        }
        Ok(norm)
    }

    /// Every tensor of the state by its name in snapshots; they share storage with the state.
    fn state(&self) -> Result<Vec<(String, Tensor)>, BackendError> {
        let parameters = self.names.iter().cloned().zip(self.parameters.iter().map(Tensor::shallow_clone));
        let module = parameters.chain(self.module.buffers().map_err(failed)?);
        let module = module.map(|(name, t)| (format!("module.{name}"), t.detach()));
        let optimizer = self.optimizer.tensors(&self.names).into_iter();
        let seed = self.seed.iter().map(|seed| (SEED.to_owned(), seed.shallow_clone()));
        Ok(module.chain(optimizer.map(|(name, t)| (format!("optimizer.{name}"), t))).chain(seed).collect())
    }
}

/// The seed's name in snapshots.
const SEED: &str = "random.seed";

struct Gradients {
    inputs: Vec<Option<Tensor>>,
    parameters: Vec<Option<Tensor>>,
}

fn is_finite(tensor: &Tensor) -> Result<bool, BackendError> {
    tensor.f_isfinite().and_then(|t| t.f_all()?.f_int64_value(&[])).map(|all| all != 0).map_err(failed)
}

pub(crate) fn hosts(tensors: &[Tensor]) -> Result<Vec<HostTensor>, BackendError> {
    tensors.iter().map(|t| to_host(t).map_err(|e| BackendError::Failed(e.to_string()))).collect()
}

impl Backend for TorchBackend {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn free_dimensions(&self) -> &[usize] {
        self.module.free_dimensions()
    }

    fn class(&self) -> &str {
        self.module.class()
    }

    fn parameter_count(&self) -> u64 {
        self.parameters.iter().map(|p| p.numel() as u64).sum()
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn optimizer(&self) -> &str {
        self.spec.rule.name()
    }

    fn settings(&self) -> BTreeMap<String, f64> {
        let mut settings = self.spec.numbers();
        settings.insert("parameter_tensors".to_owned(), self.parameters.len() as f64);
        settings
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        let inputs = self.on_device(&batch.inputs)?;
        self.forward_on(&inputs, hosts)
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        let (inputs, grads) = (self.on_device(&batch.inputs)?, self.on_device(&batch.grad_outputs)?);
        self.backward_on(inputs, &grads, hosts)
    }

    fn as_any_mut(&mut self) -> Option<&mut dyn Any> {
        Some(self)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        let (names, tensors): (Vec<_>, Vec<_>) = self.state()?.into_iter().unzip();
        Ok(Snapshot { step: self.steps, tensors: names.into_iter().zip(hosts(&tensors)?).collect() })
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        let mut state = self.state()?;
        // Checkpoints of earlier versions have none; what is dropped then is another part, but just as random.
        if self.seed.is_some() && snapshot.tensors.iter().all(|(name, _)| name != SEED) {
            warn!(step = snapshot.step, "the snapshot has no {SEED}: the expert draws from a fresh one");
            state.retain(|(name, _)| name != SEED);
        }
        let mut loaded = Vec::with_capacity(state.len());
        for (name, tensor) in &state {
            let host = snapshot.tensors.iter().find(|(given, _)| given == name).map(|(_, host)| host);
            let host = host.ok_or_else(|| BackendError::Invalid(format!("{name} is missing in the snapshot")))?;
            let source = convert::view(host).map_err(|e| BackendError::Invalid(short(&e)))?;
            if (source.size(), source.kind()) != (tensor.size(), tensor.kind()) {
                return Err(BackendError::Invalid(format!(
                    "{name} is {host:?} in the snapshot, {:?} {:?} here",
                    tensor.kind(),
                    tensor.size()
                )));
            }
            loaded.push(source);
        }
        if let Some((name, _)) = snapshot.tensors.iter().find(|(given, _)| state.iter().all(|(name, _)| name != given))
        {
            return Err(BackendError::Invalid(format!("{name} of the snapshot is unknown here")));
        }
        let _guard = tch::no_grad_guard();
        for ((name, tensor), source) in state.iter_mut().zip(&loaded) {
            tensor.f_copy_(source).map_err(|e| BackendError::Torn(format!("loading {name}: {}", short(&e))))?;
        }
        self.steps = snapshot.step;
        Ok(())
    }
}
