//! [`CudaStream`]: a CUDA device behind the port through which an executor runs batches.
//!
//! Batches are brought to the device on one stream and computed on another, each kept in order by the device, so copies
//! overlap with computing. Inputs and outputs pass through pinned memory. The executor's thread waits for the device only
//! where a backward step decides: whether gradients are finite must be known before parameters change.

use skep_expert::{Backend, BackendError, Batch, Device as Port, Kind, Outcome};
use skep_wire::HostTensor;
use tch::{Device, TchError, Tensor};

use crate::{
    Error, TorchBackend,
    backend::hosts,
    convert,
    error::{failed, short},
    ffi::{Event, Stream, StreamGuard},
};

/// Streams of one device for one executor thread, on which it is made and stays. For the CPU, where everything is done when
/// a call returns, it does the same without streams: so its order of work is tested without a GPU.
pub struct CudaStream {
    /// Everything else that this thread does is given to `runs`, too: making experts, saving, loading, single tasks.
    _current: StreamGuard,
    device: Device,
    copies: Stream,
    runs: Stream,
    /// What the device said when it failed. After that it does nothing more in this process.
    broken: Option<String>,
}

/// A batch on its way to the device.
pub struct Staged {
    batch: Batch,
    tensors: Result<Tensors, BackendError>,
}

struct Tensors {
    inputs: Vec<Tensor>,
    grad_outputs: Vec<Tensor>,
    arrived: Event,
}

/// A batch in the stream; its results are on their way into pinned memory.
pub struct Launched {
    kind: Kind,
    results: Result<Results, BackendError>,
}

enum Results {
    Arriving(Vec<Tensor>),
    There(Vec<HostTensor>),
}

/// A place in the stream.
pub struct Mark(Result<Event, TchError>);

impl CudaStream {
    /// Two streams of `device`. For CUDA, [`check_device`](crate::check_device) comes before.
    pub fn new(device: Device) -> Result<Self, Error> {
        let (copies, runs) = (Stream::new(device)?, Stream::new(device)?);
        Ok(Self { _current: runs.enter()?, device, copies, runs, broken: None })
    }

    fn bring(&self, batch: &Batch) -> Result<Tensors, TchError> {
        let _guard = self.copies.enter()?;
        let all = |hosts: &[HostTensor]| hosts.iter().map(|host| self.to_device(host)).collect::<Result<Vec<_>, _>>();
        let (inputs, grad_outputs) = (all(&batch.inputs)?, all(&batch.grad_outputs)?);
        self.runs.uses(inputs.iter().chain(&grad_outputs))?;
        Ok(Tensors { inputs, grad_outputs, arrived: self.copies.record()? })
    }

    /// torch keeps the pinned memory until the copy is done.
    fn to_device(&self, host: &HostTensor) -> Result<Tensor, TchError> {
        let view = convert::view(host)?;
        if self.device == Device::Cpu {
            return Ok(view);
        }
        let kind = view.f_kind()?;
        view.f_pin_memory(self.device)?.f_to_device_(self.device, kind, true, false)
    }

    fn run(&self, kind: Kind, staged: &Staged, backend: &mut dyn Backend) -> Result<Results, BackendError> {
        let on_device = match (&staged.tensors, backend.as_any_mut().and_then(|any| any.downcast_mut::<TorchBackend>()))
        {
            (Ok(tensors), Some(backend)) if backend.device() == self.device => Some((tensors, backend)),
            (Err(error), _) => return Err(error.clone()),
            _ => None,
        };
        let Some((tensors, backend)) = on_device else {
            // It computes elsewhere, or is none of torch's.
            let outcome = match kind {
                Kind::Forward => backend.forward(&staged.batch),
                Kind::Backward => backend.backward(&staged.batch),
            };
            return outcome.map(Results::There);
        };
        self.runs.wait_for(&tensors.arrived).map_err(failed)?;
        match kind {
            Kind::Forward => backend.forward_on(&tensors.inputs, to_host_soon),
            Kind::Backward => {
                let inputs = tensors.inputs.iter().map(Tensor::shallow_clone).collect();
                backend.backward_on(inputs, &tensors.grad_outputs, to_host_soon)
            }
        }
    }
}

/// Begins to copy results into pinned memory, behind what the current stream does.
fn to_host_soon(tensors: &[Tensor]) -> Result<Results, BackendError> {
    let begin = |tensor: &Tensor| {
        let tensor = tensor.f_detach()?;
        // Of a tensor on a device, copied without waiting, torch pins the target itself.
        tensor.f_to_device_(Device::Cpu, tensor.f_kind()?, true, false)
    };
    let arriving = tensors.iter().map(begin).collect::<Result<_, _>>().map_err(failed)?;
    Ok(Results::Arriving(arriving))
}

impl Port for CudaStream {
    type Staged = Staged;
    type Launched = Launched;
    type Mark = Mark;

    fn stage(&mut self, batch: Batch) -> Staged {
        let tensors = self.bring(&batch).map_err(|error| BackendError::Failed(short(&error)));
        Staged { batch, tensors }
    }

    fn launch(&mut self, kind: Kind, staged: Staged, backend: &mut dyn Backend) -> Launched {
        let results = match &self.broken {
            Some(reason) => Err(BackendError::Failed(format!("{:?} is broken: {reason}", self.device))),
            None => self.run(kind, &staged, backend),
        };
        Launched { kind, results }
    }

    fn record(&mut self) -> Mark {
        Mark(self.runs.record())
    }

    /// Also true when the device fails: then nothing is to be waited for.
    fn query(&mut self, mark: &Mark) -> bool {
        let error = match &mark.0 {
            Ok(event) => match event.is_reached() {
                Ok(reached) => return reached,
                Err(error) => short(&error),
            },
            Err(error) => short(error),
        };
        self.broken.get_or_insert(error);
        true
    }

    /// What a broken device left of a step nobody knows, so that is [`BackendError::Torn`].
    fn collect(&mut self, launched: Launched) -> Outcome {
        let results = launched.results?;
        match (&self.broken, launched.kind) {
            (Some(reason), Kind::Forward) => Err(BackendError::Failed(format!("{:?} failed: {reason}", self.device))),
            (Some(reason), Kind::Backward) => Err(BackendError::Torn(format!("{:?} failed: {reason}", self.device))),
            (None, _) => match results {
                Results::Arriving(tensors) => hosts(&tensors),
                Results::There(hosts) => Ok(hosts),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use skep_expert::Lane;
    use skep_kernel::Rows;

    use super::*;
    use crate::{ModuleSpec, OptimizerSpec, Sgd, check_device};

    fn expert(device: Device) -> TorchBackend {
        let module = ModuleSpec::named("ffn", 16).unwrap().build(device, 7).unwrap();
        TorchBackend::new(module, OptimizerSpec::from(Sgd::lr(0.1)), device).unwrap()
    }

    fn batch(rows: usize, seed: usize, backward: bool) -> Batch {
        let values: Vec<f32> = (0..rows * 16).map(|i| ((i * 7 + seed) % 13) as f32 / 13.0 - 0.5).collect();
        let tensor = || HostTensor::from_f32([rows, 16], &values).unwrap();
        let grad_outputs = if backward { vec![tensor()] } else { Vec::new() };
        Batch { rows: Rows(rows as u32), inputs: vec![tensor()], grad_outputs }
    }

    /// Work of both kinds in a fixed order.
    fn work() -> Vec<(Kind, Batch)> {
        let kind = |i: usize| if i.is_multiple_of(3) { Kind::Forward } else { Kind::Backward };
        (0..9).map(|i| (kind(i), batch(1 + i % 4, i, i % 3 != 0))).collect()
    }

    /// What a lane over the device gives, in order.
    fn through_a_lane(device: Device) -> Vec<Vec<f32>> {
        let (mut lane, mut backend) = (Lane::new(CudaStream::new(device).unwrap()), expert(device));
        let (mut todo, mut found) = (work().into_iter().enumerate(), Vec::new());
        let mut next = todo.next();
        while next.is_some() || !lane.is_empty() {
            if let Some((i, (kind, batch))) = next.take() {
                next = match lane.stage(kind, batch.clone(), i) {
                    Ok(()) => todo.next(),
                    Err(_) => Some((i, (kind, batch))),
                };
            }
            lane.launch(&mut backend);
            while let Some((i, outcome)) = lane.finished() {
                assert_eq!(i, found.len(), "answers leave in the order of the launches");
                found.push(outcome.unwrap().iter().flat_map(|tensor| tensor.to_f32().unwrap()).collect());
            }
        }
        assert_eq!(backend.steps(), 6);
        found
    }

    /// The same without a device between.
    fn one_by_one() -> Vec<Vec<f32>> {
        let mut backend = expert(Device::Cpu);
        let run = |(kind, batch): (Kind, Batch)| {
            let outcome = match kind {
                Kind::Forward => backend.forward(&batch),
                Kind::Backward => backend.backward(&batch),
            };
            outcome.unwrap().iter().flat_map(|tensor| tensor.to_f32().unwrap()).collect()
        };
        work().into_iter().map(run).collect()
    }

    #[test]
    fn a_lane_over_torch_gives_what_the_backend_gives() {
        assert_eq!(through_a_lane(Device::Cpu), one_by_one());
    }

    #[test]
    fn what_does_not_fit_fails_and_the_lane_goes_on() {
        let (mut lane, mut backend) = (Lane::new(CudaStream::new(Device::Cpu).unwrap()), expert(Device::Cpu));
        let narrow = HostTensor::from_f32([2, 3], &[0.0; 6]).unwrap();
        let bad = Batch { rows: Rows(2), inputs: vec![narrow], grad_outputs: Vec::new() };
        for (tag, batch) in [("bad", bad), ("good", batch(2, 0, false))] {
            assert!(lane.stage(Kind::Forward, batch, tag).is_ok());
            assert!(lane.launch(&mut backend));
        }
        assert!(matches!(lane.finished(), Some(("bad", Err(BackendError::Failed(_))))));
        assert!(matches!(lane.finished(), Some(("good", Ok(_)))));
    }

    #[test]
    fn a_step_on_what_is_not_finite_changes_nothing() {
        let (mut lane, mut backend) = (Lane::new(CudaStream::new(Device::Cpu).unwrap()), expert(Device::Cpu));
        let mut bad = batch(2, 0, true);
        bad.grad_outputs = vec![HostTensor::from_f32([2, 16], &[f32::NAN; 32]).unwrap()];
        assert!(lane.stage(Kind::Backward, bad, ()).is_ok());
        lane.launch(&mut backend);
        assert!(matches!(lane.finished(), Some(((), Err(BackendError::Invalid(_))))));
        assert_eq!(backend.steps(), 0);
    }

    #[test]
    fn a_device_that_broke_tears_steps_and_runs_nothing_more() {
        let (mut stream, mut backend) = (CudaStream::new(Device::Cpu).unwrap(), expert(Device::Cpu));
        let staged = [true, false, false].map(|backward| stream.stage(batch(1, 0, backward)));
        let [step, forward, later] = staged;
        let step = stream.launch(Kind::Backward, step, &mut backend);
        let forward = stream.launch(Kind::Forward, forward, &mut backend);
        assert!(stream.query(&Mark(Err(TchError::Torch("device-side assert".into())))), "there is nothing to wait for");
        assert!(matches!(stream.collect(step), Err(BackendError::Torn(text)) if text.contains("device-side assert")));
        assert!(matches!(stream.collect(forward), Err(BackendError::Failed(_))));
        let later = stream.launch(Kind::Forward, later, &mut backend);
        assert!(matches!(stream.collect(later), Err(BackendError::Failed(text)) if text.contains("broken")));
    }

    #[test]
    fn a_device_without_cuda_is_refused_with_what_to_do() {
        let Err(error) = check_device(Device::Cuda(0)) else { return };
        let text = error.to_string();
        assert!(text.contains("scripts/libtorch --cuda") || text.contains("driver"), "{text}");
    }

    const GPU: Device = Device::Cuda(0);

    #[test]
    #[ignore = "needs a CUDA device: make gpu-check"]
    fn gpu_results_equal_those_of_the_cpu() {
        check_device(GPU).unwrap();
        for (there, here) in through_a_lane(GPU).into_iter().zip(one_by_one()) {
            assert_eq!(there.len(), here.len());
            assert!(there.iter().zip(&here).all(|(a, b)| (a - b).abs() <= 1e-4 + 1e-3 * b.abs()), "{there:?} {here:?}");
        }
    }

    #[test]
    #[ignore = "needs a CUDA device: make gpu-check"]
    fn gpu_copies_overlap_with_computing_and_nobody_waits_at_a_launch() {
        check_device(GPU).unwrap();
        let mut stream = CudaStream::new(GPU).unwrap();
        let busy = Tensor::randn([8192, 8192], (tch::Kind::Float, GPU));
        let large = HostTensor::from_f32([4096, 1024], &vec![1.0; 4096 * 1024]).unwrap();
        let warm = stream.stage(Batch { rows: Rows(4096), inputs: vec![large.clone()], grad_outputs: Vec::new() });
        drop(busy.f_matmul(&busy).unwrap());
        let before = stream.runs.record().unwrap();
        let mut product = busy.shallow_clone();
        for _ in 0..20 {
            product = product.f_matmul(&busy).unwrap();
        }
        let computed = stream.runs.record().unwrap();
        let staged = stream.stage(Batch { rows: Rows(4096), inputs: vec![large], grad_outputs: Vec::new() });
        let arrived = &staged.tensors.as_ref().unwrap().arrived;
        assert!(!computed.is_reached().unwrap(), "staging waits for no computation");
        while !(computed.is_reached().unwrap() && arrived.is_reached().unwrap()) {
            std::hint::spin_loop();
        }
        let (run, copy) = (before.millis_until(&computed).unwrap(), before.millis_until(arrived).unwrap());
        assert!(copy < run, "the copy was there after {copy} ms, the computation took {run} ms");
        drop(warm);
    }
}
