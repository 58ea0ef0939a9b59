//! Experts whose state went through a folder, or through a file of hivemind's, train on as if nothing had happened.

mod support;

use std::path::PathBuf;

use skep_expert::{
    Backend, BackendError, Batch, Checkpoint, CheckpointStore, DirectoryCheckpoints, Manifest, Snapshot,
};
use skep_kernel::Rows;
use skep_torch::{Adam, AdamW, ModuleSpec, OptimizerSpec, Schedule, Sgd, Transformer, factory, pt, tch::Device};
use skep_wire::{DType, ExpertUid, HostTensor};

fn ffn(width: usize, spec: impl Into<OptimizerSpec>, seed: u64) -> Box<dyn Backend> {
    factory(ModuleSpec::Ffn { hidden_dim: width }, spec.into(), Device::Cpu, seed)().unwrap()
}

fn rows(width: usize, seed: usize) -> HostTensor {
    let values: Vec<f32> = (0..2 * width).map(|i| ((i * 37 + seed * 11) % 19) as f32 / 9.0 - 1.0).collect();
    HostTensor::from_f32([2, width], &values).unwrap()
}

fn train(backend: &mut dyn Backend, width: usize, step: usize) -> Vec<HostTensor> {
    let batch = Batch { rows: Rows(2), inputs: vec![rows(width, step)], grad_outputs: vec![rows(width, step + 100)] };
    backend.backward(&batch).unwrap()
}

fn uid() -> ExpertUid {
    "ffn.0.3".parse().unwrap()
}

fn checkpoint(backend: &mut dyn Backend) -> Checkpoint {
    let snapshot = backend.save().unwrap();
    Checkpoint { manifest: Manifest::of(&uid(), snapshot.step, backend).unwrap(), snapshot }
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

fn specs() -> [OptimizerSpec; 5] {
    let schedule = Schedule::Linear { warmup_steps: 3, total_steps: 20 };
    [
        Sgd::lr(0.05).into(),
        Sgd { lr: 0.05, momentum: 0.9, weight_decay: 0.01, nesterov: true }.into(),
        OptimizerSpec::from(Adam::lr(0.01)).schedule(schedule).clip_grad_norm(0.5),
        OptimizerSpec::from(AdamW::lr(0.01)).schedule(schedule),
        OptimizerSpec::none(),
    ]
}

#[test]
fn training_goes_on_bit_by_bit_after_a_restart_from_the_disk() {
    let folder = Folder(std::env::temp_dir().join(format!("skep-torch-checkpoints-{}", std::process::id())));
    for spec in specs() {
        let mut first = ffn(8, spec.clone(), 7);
        (0..5).for_each(|i| _ = train(&mut *first, 8, i));
        let id = DirectoryCheckpoints::open(&folder.0).unwrap().write(&uid(), &checkpoint(&mut *first)).unwrap();
        let store = DirectoryCheckpoints::open(&folder.0).unwrap();
        let read = store.read(&uid(), id).unwrap();
        let mut second = ffn(8, spec.clone(), 99);
        second.load(&read.snapshot).unwrap();
        for i in 5..9 {
            assert_eq!(train(&mut *first, 8, i), train(&mut *second, 8, i), "{spec:?}");
        }
        assert_eq!(first.save().unwrap(), second.save().unwrap(), "{spec:?}");
    }
}

/// A batch of two sequences of five, the end of the second one masked.
fn sequences(step: usize) -> Batch {
    let values =
        |seed: usize| (0..2 * 5 * 16).map(|i| ((i * 37 + seed * 11) % 19) as f32 / 9.0 - 1.0).collect::<Vec<_>>();
    let tensor = |seed| HostTensor::from_f32([2, 5, 16], &values(seed)).unwrap();
    let mask = HostTensor::new(DType::Bool, [2, 5], vec![0, 0, 0, 0, 0, 0, 0, 0, 1, 1].into()).unwrap();
    Batch { rows: Rows(2), inputs: vec![tensor(step), mask], grad_outputs: vec![tensor(step + 100)] }
}

fn transformer(seed: u64) -> Box<dyn Backend> {
    factory(Transformer::hidden(16), Adam::lr(0.01).into(), Device::Cpu, seed)().unwrap()
}

#[test]
fn what_dropout_drops_is_the_same_after_a_restart() {
    let mut first = transformer(7);
    let same = |batch: Batch, one: &mut dyn Backend, other: &mut dyn Backend| {
        assert_eq!(one.forward(&batch).unwrap(), other.forward(&batch).unwrap());
        assert_eq!(one.backward(&batch).unwrap(), other.backward(&batch).unwrap());
    };
    for step in 0..3 {
        // Calls that change nothing do not matter: a server that was restarted has not seen them.
        (0..step).for_each(|_| _ = first.forward(&sequences(9)).unwrap());
        first.backward(&sequences(step)).unwrap();
    }
    // Without a seed of its own in the configuration, an expert begins with another one at each start.
    let mut second = transformer(99);
    second.load(&first.save().unwrap()).unwrap();
    (3..6).for_each(|step| same(sequences(step), &mut *first, &mut *second));
    assert_eq!(first.save().unwrap(), second.save().unwrap());
    // It does drop, and something else after each step.
    let mut plain = factory(Transformer::hidden(16).dropout(0.0).unwrap(), OptimizerSpec::none(), Device::Cpu, 7);
    let mut other_seed = transformer(99);
    let weights = |snapshot: Snapshot, of: &Snapshot| Snapshot {
        tensors: snapshot
            .tensors
            .into_iter()
            .map(|(name, tensor)| match name.starts_with("module.") {
                true => (name.clone(), named(of, &name).clone()),
                false => (name, tensor),
            })
            .collect(),
        ..snapshot
    };
    let now = first.save().unwrap();
    let answer = first.forward(&sequences(0)).unwrap();
    for other in [&mut plain().unwrap(), &mut other_seed] {
        let given = weights(other.save().unwrap(), &now);
        other.load(&given).unwrap();
        assert_ne!(other.forward(&sequences(0)).unwrap(), answer);
    }
}

#[test]
fn a_checkpoint_from_before_there_were_seeds_is_loaded_and_the_expert_draws_from_its_own() {
    let mut first = transformer(7);
    first.backward(&sequences(0)).unwrap();
    let saved = first.save().unwrap();
    let mut old = saved.clone();
    old.tensors.retain(|(name, _)| name != "random.seed");
    assert_eq!(old.tensors.len() + 1, saved.tensors.len());
    let (mut same_seed, mut other_seed) = (transformer(7), transformer(99));
    same_seed.load(&old).unwrap();
    assert_eq!(same_seed.save().unwrap(), saved);
    other_seed.load(&old).unwrap();
    assert_ne!(other_seed.forward(&sequences(0)).unwrap(), first.forward(&sequences(0)).unwrap());
    other_seed.backward(&sequences(1)).unwrap();
    // Nothing else may be missing.
    old.tensors.pop();
    assert!(matches!(transformer(7).load(&old), Err(BackendError::Invalid(_))));
}

#[test]
fn backward_drops_what_forward_dropped() {
    let mut backend = transformer(7);
    let batch = sequences(0);
    let shifted = |by: f32| {
        let values = batch.inputs[0].to_f32().unwrap();
        let moved: Vec<f32> = values.iter().enumerate().map(|(i, v)| if i == 3 { v + by } else { *v }).collect();
        Batch {
            inputs: vec![HostTensor::from_f32([2, 5, 16], &moved).unwrap(), batch.inputs[1].clone()],
            ..batch.clone()
        }
    };
    let weighted = |backend: &mut dyn Backend, by| {
        let outputs = backend.forward(&shifted(by)).unwrap()[0].to_f32().unwrap();
        let weights = batch.grad_outputs[0].to_f32().unwrap();
        outputs.iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(w)).sum::<f64>()
    };
    let slope = (weighted(&mut *backend, 1e-2) - weighted(&mut *backend, -1e-2)) / 2e-2;
    let gradient = f64::from(backend.backward(&batch).unwrap()[0].to_f32().unwrap()[3]);
    assert!((slope - gradient).abs() < 0.02 * gradient.abs().max(1.0), "{slope} {gradient}");
}

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");

fn hiveminds(name: &str) -> Vec<u8> {
    std::fs::read(format!("{DATA}{name}")).unwrap()
}

/// hivemind's `Adam(lr=0.01)` with the linear schedule over 2 and 50 steps.
fn scheduled_adam() -> OptimizerSpec {
    OptimizerSpec::from(Adam::lr(0.01)).schedule(Schedule::Linear { warmup_steps: 2, total_steps: 50 })
}

fn parameters(fresh: &Snapshot) -> Vec<String> {
    fresh.tensors.iter().filter_map(|(name, _)| name.strip_prefix("module.")).map(str::to_owned).collect()
}

fn import(file: &[u8], spec: OptimizerSpec) -> Result<Box<dyn Backend>, pt::PtError> {
    let mut backend = ffn(4, spec, 1);
    let fresh = backend.save().unwrap();
    let snapshot = pt::read_checkpoint(file, &fresh, &parameters(&fresh))?;
    backend.load(&snapshot).unwrap();
    Ok(backend)
}

fn named<'a>(snapshot: &'a Snapshot, name: &str) -> &'a HostTensor {
    &snapshot.tensors.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("{name}")).1
}

fn assert_near(a: &HostTensor, b: &HostTensor, what: &str) {
    let near = a.to_f32().unwrap().iter().zip(b.to_f32().unwrap()).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(a.shape() == b.shape() && near, "{what}: {:?} and {:?}", a.to_f32(), b.to_f32());
}

#[test]
fn an_expert_of_hiveminds_trains_on_here_as_it_would_have_there() {
    let mut backend = import(&hiveminds("ffn_adam_3_steps.pt"), scheduled_adam()).unwrap();
    assert_eq!(backend.steps(), 3);
    let input: Vec<f32> = (0..8).map(|i| i as f32 / 4.0 - 1.0).collect();
    let gradient = [1.0, -1.0, 0.5, 2.0, 1.0, -1.0, 0.5, 2.0];
    let tensor = |values: &[f32]| HostTensor::from_f32([2, 4], values).unwrap();
    let batch = Batch { rows: Rows(2), inputs: vec![tensor(&input)], grad_outputs: vec![tensor(&gradient)] };
    backend.backward(&batch).unwrap();
    let ours = backend.save().unwrap();
    // The same step, made by hivemind.
    let theirs = import(&hiveminds("ffn_adam_4_steps.pt"), OptimizerSpec::none()).unwrap().save().unwrap();
    for (name, tensor) in theirs.tensors.iter().filter(|(name, _)| name.starts_with("module.")) {
        assert_near(named(&ours, name), tensor, name);
    }
}

#[test]
fn momenta_come_along_and_without_a_schedule_steps_are_counted_by_the_optimizer() {
    let mut sgd = import(&hiveminds("ffn_sgd.pt"), Sgd::lr(0.1).momentum(0.9).into()).unwrap();
    let momenta = sgd.save().unwrap();
    let momentum = named(&momenta, "optimizer.ffn.weight.momentum_buffer");
    assert!(momentum.to_f32().unwrap().iter().any(|v| *v != 0.0));
    assert_eq!(sgd.steps(), 0, "SGD counts none");
    let adam = import(&hiveminds("ffn_adam_3_steps.pt"), Adam::lr(0.01).into()).unwrap();
    assert_eq!(adam.steps(), 3);
}

#[test]
fn a_file_of_another_expert_is_refused() {
    let refused = |file: &str, spec: OptimizerSpec| import(&hiveminds(file), spec).err().unwrap().to_string();
    let other = refused("ffn_adam_3_steps.pt", Sgd::lr(0.1).into());
    assert!(other.contains("exp_avg") && other.contains("class and optimizer"), "{other}");
    let mut wide = ffn(8, Sgd::lr(0.1), 1);
    let fresh = wide.save().unwrap();
    let error = pt::read_checkpoint(&hiveminds("ffn_sgd.pt"), &fresh, &parameters(&fresh)).unwrap_err();
    assert!(error.to_string().contains("ffn"), "{error}");
    assert!(import(b"PK", Sgd::lr(0.1).into()).is_err());
    let file = hiveminds("ffn_sgd.pt");
    for length in (0..file.len()).step_by(13) {
        assert!(import(&file[..length], Sgd::lr(0.1).momentum(0.9).into()).is_err());
    }
}

#[test]
fn what_is_written_for_hivemind_reads_back_the_same() {
    for spec in specs() {
        let mut backend = ffn(4, spec.clone(), 3);
        (0..4).for_each(|i| _ = train(&mut *backend, 4, i));
        let written = checkpoint(&mut *backend);
        let file = pt::write_checkpoint(&written).unwrap();
        let mut back = import(&file, spec.clone()).unwrap().save().unwrap();
        if spec.schedule == Schedule::Constant
            && !written.snapshot.tensors.iter().any(|(name, _)| name.ends_with(".step"))
        {
            // Plain SGD keeps no count.
            back.step = written.snapshot.step;
        }
        assert_eq!(back, written.snapshot, "{spec:?}");
    }
}
