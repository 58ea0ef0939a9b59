//! Experts that are none of hivemind's: TorchScript files, and classes registered by name.

use std::path::PathBuf;

use skep_expert::{Backend, BackendError, Batch};
use skep_kernel::Rows;
use skep_torch::{
    Adam, Error, ExpertModule, ModuleSpec, OptimizerSpec, Script, ScriptSpec, Sgd, TensorSpec, factory, register_class,
    tch::{Device, Kind, TchError, Tensor},
};
use skep_wire::{DType, ExpertInfo, HostTensor, Nested, TensorDescriptor};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");

/// `block.pt` of `make.py`: `(x, token, keep=None) -> (y, {"sum": …, "token": token})`.
fn block() -> ScriptSpec {
    ScriptSpec {
        path: PathBuf::from(format!("{DATA}block.pt")),
        inputs: vec![TensorSpec::new(DType::F32, &[4]), TensorSpec::new(DType::I64, &[])],
        keyword_inputs: [("keep".to_owned(), TensorSpec::new(DType::Bool, &[]))].into(),
        outputs: vec![
            TensorSpec::new(DType::F32, &[3]),
            TensorSpec::new(DType::F32, &[]),
            TensorSpec::new(DType::I64, &[]),
        ],
    }
}

fn host(spec: ScriptSpec, optimizer: impl Into<OptimizerSpec>) -> Result<Box<dyn Backend>, BackendError> {
    factory(Script::spec(spec), optimizer.into(), Device::Cpu, 0)()
}

fn integers(values: &[i64]) -> HostTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    HostTensor::new(DType::I64, [values.len()], bytes.into()).unwrap()
}

fn bools(values: &[u8]) -> HostTensor {
    HostTensor::new(DType::Bool, [values.len()], values.to_vec().into()).unwrap()
}

fn inputs(seed: usize) -> Vec<HostTensor> {
    let x: Vec<f32> = (0..12).map(|i| ((i * 37 + seed * 11) % 19) as f32 / 9.0 - 1.0).collect();
    vec![HostTensor::from_f32([3, 4], &x).unwrap(), integers(&[1, 9, 4]), bools(&[1, 0, 1])]
}

fn forward(backend: &mut dyn Backend, inputs: Vec<HostTensor>) -> Result<Vec<HostTensor>, BackendError> {
    backend.forward(&Batch { rows: Rows(inputs[0].rows() as u32), inputs, grad_outputs: vec![] })
}

/// One step towards outputs of zero: their gradient is themselves.
fn train(backend: &mut dyn Backend, seed: usize) -> Vec<HostTensor> {
    let y = HostTensor::from_f32([3, 3], &[1.0, -0.5, 2.0, 0.3, 1.0, 1.0, -1.0, 0.5, 0.25]).unwrap();
    let grad_outputs = vec![y, HostTensor::from_f32([3], &[0.1, 0.2, 0.3]).unwrap(), integers(&[0, 0, 0])];
    backend.backward(&Batch { rows: Rows(3), inputs: inputs(seed), grad_outputs }).unwrap()
}

fn state(backend: &mut dyn Backend, name: &str) -> HostTensor {
    let snapshot = backend.save().unwrap();
    snapshot.tensors.into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("{name}")).1
}

#[test]
fn a_torchscript_file_takes_several_inputs_keywords_and_integers_and_gives_several_outputs() {
    let mut backend = host(block(), Sgd::lr(0.1)).unwrap();
    assert_eq!(backend.class(), "torchscript");
    assert_eq!(backend.info().keyword_names, ["keep"]);
    assert_eq!(backend.parameter_count(), 10 * 4 + 4 * 3 + 3 + 2 * 3);
    let outputs = forward(&mut *backend, inputs(0)).unwrap();
    let shapes: Vec<&[usize]> = outputs.iter().map(HostTensor::shape).collect();
    assert_eq!(shapes, [&[3, 3][..], &[3], &[3]]);
    let y = outputs[0].to_f32().unwrap();
    assert_eq!(y[3..6], [0.0; 3], "the keyword masks the second row");
    assert!(y[..3].iter().any(|v| *v != 0.0));
    let sum = outputs[1].to_f32().unwrap();
    assert!((sum[0] - y[..3].iter().sum::<f32>()).abs() < 1e-6);
    assert_eq!(outputs[2], integers(&[1, 9, 4]));
}

#[test]
fn our_optimizers_train_it_and_leave_frozen_parameters_alone() {
    let mut backend = host(block(), Adam::lr(0.01)).unwrap();
    let before = state(&mut *backend, "module.linear.weight");
    let answer = train(&mut *backend, 0);
    assert_eq!((answer[0].shape(), answer[0].dtype()), (&[3, 4][..], DType::F32));
    assert!(answer[0].to_f32().unwrap().iter().any(|v| *v != 0.0));
    assert_eq!(answer[1..], [integers(&[0, 0, 0]), bools(&[0, 0, 0])], "no gradients for integers and bools");
    assert_ne!(state(&mut *backend, "module.linear.weight"), before);
    assert_eq!(state(&mut *backend, "module.scale").to_f32().unwrap(), [2.0; 3]);
    assert_eq!(backend.steps(), 1);
}

#[test]
fn buffers_are_kept_also_those_that_the_module_replaces() {
    let mut backend = host(block(), Sgd::lr(0.1)).unwrap();
    assert_eq!(state(&mut *backend, "module.calls").data()[0], 0);
    for seed in 0..3 {
        forward(&mut *backend, inputs(seed)).unwrap();
        train(&mut *backend, seed);
    }
    assert_eq!(state(&mut *backend, "module.calls").data()[0], 6);
    assert!(state(&mut *backend, "module.norm.running_mean").to_f32().unwrap().iter().any(|v| *v != 0.0));
}

#[test]
fn it_goes_on_bit_by_bit_from_a_snapshot() {
    let mut first = host(block(), Adam::lr(0.01)).unwrap();
    (0..4).for_each(|seed| _ = train(&mut *first, seed));
    let snapshot = first.save().unwrap();
    let mut second = host(block(), Adam::lr(0.01)).unwrap();
    second.load(&snapshot).unwrap();
    for seed in 4..7 {
        assert_eq!(train(&mut *first, seed), train(&mut *second, seed));
        assert_eq!(forward(&mut *first, inputs(seed)).unwrap(), forward(&mut *second, inputs(seed)).unwrap());
    }
    assert_eq!(first.save().unwrap(), second.save().unwrap());
}

#[test]
fn bfloat16_goes_in_and_out() {
    let side = vec![TensorSpec::new(DType::BF16, &[4])];
    let spec = ScriptSpec {
        path: PathBuf::from(format!("{DATA}half.pt")),
        inputs: side.clone(),
        keyword_inputs: Default::default(),
        outputs: side,
    };
    let mut backend = host(spec, Sgd::lr(0.1)).unwrap();
    // 1.0 in bfloat16.
    let ones = HostTensor::new(DType::BF16, [2, 4], [0x80, 0x3f].repeat(8).into()).unwrap();
    let output = forward(&mut *backend, vec![ones.clone()]).unwrap().remove(0);
    assert_eq!((output.dtype(), output.shape()), (DType::BF16, &[2, 4][..]));
    let batch = Batch { rows: Rows(2), inputs: vec![ones.clone()], grad_outputs: vec![ones] };
    let gradient = backend.backward(&batch).unwrap().remove(0);
    assert_eq!((gradient.dtype(), gradient.shape()), (DType::BF16, &[2, 4][..]));
}

#[test]
fn a_description_that_does_not_fit_the_file_is_an_error_of_the_call() {
    let two = ScriptSpec { outputs: block().outputs[..2].to_vec(), ..block() };
    let error = forward(&mut *host(two, Sgd::lr(0.1)).unwrap(), inputs(0)).unwrap_err();
    assert!(error.to_string().contains("returned 3 tensors where 2 are declared"), "{error}");
    let mut backend = host(block(), Sgd::lr(0.1)).unwrap();
    let before = backend.save().unwrap();
    let mut wide = inputs(0);
    wide[0] = HostTensor::zeros(DType::F32, [3, 5]).unwrap();
    let error = forward(&mut *backend, wide).unwrap_err();
    assert!(matches!(error, BackendError::Failed(_)), "{error}");
    let other = |name: &str| before.tensors.iter().find(|(found, _)| found == name).unwrap().1.clone();
    assert_eq!(state(&mut *backend, "module.linear.weight"), other("module.linear.weight"));
    forward(&mut *backend, inputs(0)).unwrap();
}

#[test]
fn files_that_are_no_modules_and_impossible_descriptions_are_named() {
    let missing = ScriptSpec { path: "/nowhere/block.pt".into(), ..block() };
    let text = ScriptSpec { path: format!("{DATA}make.py").into(), ..block() };
    let state = ScriptSpec { path: format!("{DATA}ffn_sgd.pt").into(), ..block() };
    for spec in [missing, text, state] {
        let path = spec.path.display().to_string();
        let error = host(spec, Sgd::lr(0.1)).err().unwrap().to_string();
        assert!(error.contains("cannot load the TorchScript module") && error.contains(&path), "{error}");
    }
    let odd = |tensor: TensorSpec| host(ScriptSpec { inputs: vec![tensor], ..block() }, Sgd::lr(0.1)).err().unwrap();
    let dtype = odd(TensorSpec { dtype: "float31".into(), shape: vec![] }).to_string();
    assert!(dtype.contains("float31") && dtype.contains("bfloat16"), "{dtype}");
    assert!(odd(TensorSpec::new(DType::F32, &[0])).to_string().contains("no size"));
}

/// `{"sum": a + b, "parts": [a · w, b · w]}` of a tuple `(a, b)`.
struct Nest {
    w: Tensor,
}

impl ExpertModule for Nest {
    fn class(&self) -> &str {
        "nest"
    }
    fn info(&self) -> ExpertInfo {
        let rows = || Nested::Leaf(TensorDescriptor::batched(DType::F32, &[2]).with_grad());
        let outputs = [("parts".to_owned(), Nested::List(vec![rows(), rows()])), ("sum".to_owned(), rows())];
        ExpertInfo {
            args: vec![Nested::Tuple(vec![rows(), rows()])],
            kwargs: Default::default(),
            outputs: Nested::Map(outputs.into()),
            keyword_names: vec![],
        }
    }
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        let (a, b) = (&inputs[0], &inputs[1]);
        Ok(vec![a.f_mul(&self.w)?, b.f_mul(&self.w)?, a.f_add(b)?])
    }
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("w".to_owned(), self.w.shallow_clone())]
    }
}

#[test]
fn a_class_of_ones_own_is_found_by_its_name() {
    let make = |width: usize, device: Device, seed: u64| {
        if width != 2 {
            return Err(Error::Config(format!("nest has width 2, not {width}")));
        }
        let w = Tensor::f_full([2], 1.0 + seed as f64, (Kind::Float, device))?.f_set_requires_grad(true)?;
        Ok(Box::new(Nest { w }) as Box<dyn ExpertModule>)
    };
    register_class("nest", make).unwrap();
    for taken in ["nest", "ffn", "torchscript"] {
        assert!(register_class(taken, make).unwrap_err().to_string().contains("exists already"));
    }
    assert!(ModuleSpec::classes().contains(&"nest".to_owned()));
    let spec = ModuleSpec::named("nest", 2).unwrap();
    assert_eq!(spec.class(), "nest");
    let mut backend = factory(spec, Sgd::lr(0.5).into(), Device::Cpu, 2)().unwrap();
    let rows = |value: f32| HostTensor::from_f32([1, 2], &[value; 2]).unwrap();
    let outputs = forward(&mut *backend, vec![rows(1.0), rows(2.0)]).unwrap();
    assert_eq!(outputs, [rows(3.0), rows(6.0), rows(3.0)]);
    let batch = Batch {
        rows: Rows(1),
        inputs: vec![rows(1.0), rows(2.0)],
        grad_outputs: vec![rows(1.0), rows(0.0), rows(1.0)],
    };
    assert_eq!(backend.backward(&batch).unwrap(), [rows(4.0), rows(1.0)]);
    assert_eq!(forward(&mut *backend, vec![rows(1.0), rows(0.0)]).unwrap()[0], rows(2.5));
    let wide = factory(ModuleSpec::named("nest", 3).unwrap(), Sgd::lr(0.1).into(), Device::Cpu, 0)();
    assert!(wide.err().unwrap().to_string().contains("width 2"));
    assert!(ModuleSpec::named("nesst", 2).unwrap_err().to_string().contains("nest"), "known ones are listed");
}
