//! What a hosted module promises beyond its numbers.

mod support;

use skep_expert::{Backend, BackendError, Batch};
use skep_kernel::Rows;
use skep_torch::{
    Adam, AdamW, ExpertModule, ModuleSpec, OptimizerSpec, Schedule, Sgd, TorchBackend, factory,
    tch::{Device, TchError, Tensor},
};
use skep_wire::{DType, ExpertInfo, HostTensor, TensorDescriptor};

fn ffn(spec: impl Into<OptimizerSpec>) -> Box<dyn Backend> {
    factory(ModuleSpec::Ffn { hidden_dim: 8 }, spec.into(), Device::Cpu, 7)().unwrap()
}

fn rows(seed: i64) -> HostTensor {
    let values: Vec<f32> = (0..24).map(|i| ((i * 37 + seed * 11) % 19) as f32 / 9.0 - 1.0).collect();
    HostTensor::from_f32([3, 8], &values).unwrap()
}

fn batch(input: HostTensor, grads: Vec<HostTensor>) -> Batch {
    Batch { rows: Rows(input.rows() as u32), inputs: vec![input], grad_outputs: grads }
}

#[test]
fn a_loaded_snapshot_continues_bit_by_bit() {
    let schedule = Schedule::Linear { warmup_steps: 3, total_steps: 20 };
    let specs: [OptimizerSpec; 4] = [
        Sgd::lr(0.05).into(),
        Sgd::lr(0.05).momentum(0.9).into(),
        OptimizerSpec::from(Adam::lr(0.01)).schedule(schedule).clip_grad_norm(0.5),
        AdamW::lr(0.01).into(),
    ];
    for spec in specs {
        let mut first = ffn(spec.clone());
        for i in 0..5 {
            first.backward(&batch(rows(i), vec![rows(i + 100)])).unwrap();
        }
        let snapshot = first.save().unwrap();
        let mut second = factory(ModuleSpec::Ffn { hidden_dim: 8 }, spec, Device::Cpu, 99)().unwrap();
        second.load(&snapshot).unwrap();
        assert_eq!(second.steps(), 5);
        for i in 5..9 {
            let next = batch(rows(i), vec![rows(i + 100)]);
            assert_eq!(first.backward(&next).unwrap(), second.backward(&next).unwrap());
        }
        assert_eq!(first.save().unwrap(), second.save().unwrap());
    }
}

#[test]
fn a_snapshot_of_something_else_is_refused_and_changes_nothing() {
    let mut backend = ffn(Adam::lr(0.01));
    let before = backend.save().unwrap();
    let other = |width, spec: OptimizerSpec| {
        factory(ModuleSpec::Ffn { hidden_dim: width }, spec, Device::Cpu, 0)().unwrap().save().unwrap()
    };
    for (snapshot, text) in [
        (other(4, Adam::lr(0.01).into()), "in the snapshot"),
        (other(8, Sgd::lr(0.01).into()), "missing"),
        (other(8, Sgd::lr(0.01).momentum(0.9).into()), "missing"),
    ] {
        let error = backend.load(&snapshot).unwrap_err();
        assert!(matches!(&error, BackendError::Invalid(reason) if reason.contains(text)), "{error}");
    }
    let mut extra = before.clone();
    extra.tensors.push(("module.more".into(), rows(0)));
    assert!(backend.load(&extra).unwrap_err().to_string().contains("module.more"));
    assert_eq!(backend.save().unwrap(), before);
}

#[test]
fn a_bad_batch_changes_nothing() {
    let mut backend = ffn(Adam::lr(0.01));
    let before = backend.save().unwrap();
    let nan = HostTensor::from_f32([3, 8], &[f32::NAN; 24]).unwrap();
    let wide = HostTensor::zeros(DType::F32, [3, 9]).unwrap();
    let bad = [
        (batch(rows(0), vec![nan.clone()]), "not finite"),
        (batch(nan, vec![rows(0)]), "not finite"),
        (batch(rows(0), vec![wide.clone()]), "shape"),
        (batch(rows(0), vec![]), "0 output gradients"),
        (batch(wide, vec![rows(0)]), "shape"),
        (Batch { rows: Rows(3), inputs: vec![], grad_outputs: vec![rows(0)] }, "0 inputs"),
    ];
    for (batch, text) in bad {
        let error = backend.backward(&batch).unwrap_err();
        assert!(!matches!(error, BackendError::Torn(_)) && error.to_string().contains(text), "{error}");
        assert!(error.to_string().lines().count() < 4, "no backtrace: {error}");
    }
    assert_eq!(backend.save().unwrap(), before);
    assert_eq!(backend.steps(), 0);
    backend.backward(&batch(rows(0), vec![rows(1)])).unwrap();
    assert_ne!(backend.save().unwrap(), before);
}

#[test]
fn huge_but_finite_gradients_are_no_error() {
    let mut backend = ffn(OptimizerSpec::from(Sgd::lr(0.01)).clip_grad_norm(1.0));
    let huge = HostTensor::from_f32([3, 8], &[1e25; 24]).unwrap();
    backend.backward(&batch(rows(0), vec![huge])).unwrap();
}

#[test]
fn forward_changes_nothing_and_answers_the_same_each_time() {
    let mut backend = ffn(Adam::lr(0.01));
    let before = backend.save().unwrap();
    let (a, b) = (backend.forward(&batch(rows(0), vec![])).unwrap(), backend.forward(&batch(rows(0), vec![])).unwrap());
    assert_eq!(a, b);
    assert_eq!(backend.save().unwrap(), before);
}

#[test]
fn without_an_optimizer_only_input_gradients_come_back() {
    let mut backend = ffn(OptimizerSpec::none());
    let before = backend.save().unwrap();
    let answer = backend.backward(&batch(rows(0), vec![rows(1)])).unwrap();
    assert_eq!(answer, ffn(Sgd::lr(0.1)).backward(&batch(rows(0), vec![rows(1)])).unwrap());
    assert_eq!((backend.save().unwrap(), backend.steps()), (before, 0));
}

/// `y = x·0 + 1`-like outputs that depend on nothing, or a panic.
struct Odd {
    panics: bool,
}

impl ExpertModule for Odd {
    fn class(&self) -> &str {
        "odd"
    }
    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[8]);
        ExpertInfo::simple(x.clone(), x)
    }
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        assert!(!self.panics, "a bug");
        Ok(vec![inputs[0].f_detach()?.f_ones_like()?])
    }
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("w".into(), Tensor::ones([8], (skep_torch::tch::Kind::Float, Device::Cpu)).set_requires_grad(true))]
    }
}

#[test]
fn a_module_that_ignores_its_input_has_zero_gradients() {
    let mut backend = TorchBackend::new(Box::new(Odd { panics: false }), Sgd::lr(0.1).into(), Device::Cpu).unwrap();
    let answer = backend.backward(&batch(rows(0), vec![rows(1)])).unwrap();
    assert_eq!(answer, [HostTensor::zeros(DType::F32, [3, 8]).unwrap()]);
}

#[test]
fn a_panic_leaves_the_thread_fit_for_the_next_batch() {
    let mut broken = TorchBackend::new(Box::new(Odd { panics: true }), Sgd::lr(0.1).into(), Device::Cpu).unwrap();
    for call in [TorchBackend::forward, TorchBackend::backward] {
        let next = batch(rows(0), vec![rows(1)]);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| call(&mut broken, &next)));
        assert!(outcome.is_err());
    }
    let mut healthy = ffn(Sgd::lr(0.1));
    let before = healthy.save().unwrap();
    healthy.backward(&batch(rows(0), vec![rows(1)])).unwrap();
    assert_ne!(healthy.save().unwrap(), before);
}
