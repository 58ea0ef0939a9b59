//! [`Script`]: any TorchScript module as an expert.

use std::{collections::BTreeMap, ffi::CString, path::PathBuf};

use serde::{Deserialize, Serialize};
use skep_wire::{DType, ExpertInfo, Nested, TensorDescriptor};
use tch::{Device, TchError, Tensor};

use super::{ExpertModule, ModuleSpec};
use crate::{Error, error::short, ffi};

/// A tensor of a module's inputs or outputs, without the batch dimension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Name of the element type, as in `float32`, `bfloat16`, `int64`, `bool`.
    pub dtype: String,
    /// Sizes behind the batch dimension; -1 takes any.
    #[serde(default)]
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// A tensor `[batch, …shape]`.
    pub fn new(dtype: DType, shape: &[i64]) -> Self {
        Self { dtype: dtype.to_string(), shape: shape.to_vec() }
    }

    /// How it is described on the wire.
    pub fn descriptor(&self) -> Result<TensorDescriptor, Error> {
        let dtype = DType::from_name(&self.dtype);
        let known = || DType::ALL.map(|dtype| dtype.to_string()).join(", ");
        let dtype =
            dtype.ok_or_else(|| Error::Config(format!("no dtype is called {:?}; known: {}", self.dtype, known())))?;
        let mut descriptor = TensorDescriptor::batched(dtype, &[]);
        for size in &self.shape {
            descriptor.size.push(match (*size, usize::try_from(*size)) {
                (-1, _) => None,
                (1.., Ok(size)) => Some(size),
                _ => {
                    return Err(Error::Config(format!("{size} is no size of a tensor; give 1 or more, or -1 for any")));
                }
            });
        }
        Ok(descriptor)
    }
}

/// Where a TorchScript module is, and what it takes and gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptSpec {
    /// The file, as `torch.jit.save` writes it. It is code: host only files that you trust.
    pub path: PathBuf,
    /// Positional inputs.
    pub inputs: Vec<TensorSpec>,
    /// Keyword inputs by name.
    #[serde(default)]
    pub keyword_inputs: BTreeMap<String, TensorSpec>,
    /// Outputs; a tuple, list or dictionary that `forward` returns counts with its tensors in order.
    pub outputs: Vec<TensorSpec>,
}

impl ScriptSpec {
    /// The schema that callers see.
    pub fn info(&self) -> Result<ExpertInfo, Error> {
        let leaf = |spec: &TensorSpec| Ok::<_, Error>(Nested::Leaf(spec.descriptor()?));
        let mut outputs = Vec::new();
        for spec in &self.outputs {
            let descriptor = spec.descriptor()?;
            let floats = descriptor.dtype.is_some_and(DType::is_float);
            outputs.push(Nested::Leaf(if floats { descriptor.with_grad() } else { descriptor }));
        }
        let kwargs = self.keyword_inputs.iter().map(|(name, spec)| Ok((name.clone(), leaf(spec)?)));
        if (self.inputs.is_empty() && self.keyword_inputs.is_empty()) || outputs.is_empty() {
            return Err(Error::Config("a TorchScript module needs inputs and outputs".to_owned()));
        }
        Ok(ExpertInfo {
            args: self.inputs.iter().map(leaf).collect::<Result<_, _>>()?,
            kwargs: kwargs.collect::<Result<_, Error>>()?,
            outputs: if outputs.len() == 1 { outputs.remove(0) } else { Nested::Tuple(outputs) },
            keyword_names: self.keyword_inputs.keys().cloned().collect(),
        })
    }
}

/// A module that was scripted or traced in Python, in training mode. Its parameters are trained by our optimizers, its
/// buffers saved with them; every expert of a group starts with what is in the file.
pub struct Script {
    info: ExpertInfo,
    module: ffi::Script,
    positional: usize,
    keywords: Vec<CString>,
    outputs: usize,
    parameters: Vec<(String, Tensor)>,
    /// Parameters that do not train.
    frozen: Vec<(String, Tensor)>,
}

impl Script {
    /// The recipe of one.
    pub fn spec(spec: ScriptSpec) -> ModuleSpec {
        ModuleSpec::Script(spec)
    }

    /// Loads one.
    pub fn load(spec: &ScriptSpec, device: Device) -> Result<Self, Error> {
        crate::check_device(device)?;
        let info = spec.info()?;
        let failed = |error: TchError| {
            Error::Config(format!("cannot load the TorchScript module {}: {}", spec.path.display(), short(&error)))
        };
        let module = ffi::Script::load(&spec.path, device).map_err(failed)?;
        let all = module.state(false).map_err(failed)?;
        let trains = |tensor: &Tensor| tensor.requires_grad() && tensor.is_floating_point();
        let (parameters, frozen) = all.into_iter().partition(|(_, tensor)| trains(tensor));
        let keywords = spec.keyword_inputs.keys().map(|name| CString::new(name.as_str()));
        let keywords =
            keywords.collect::<Result<_, _>>().map_err(|_| Error::Config("a name with a zero".to_owned()))?;
        let (positional, outputs) = (spec.inputs.len(), spec.outputs.len());
        Ok(Self { info, module, positional, keywords, outputs, parameters, frozen })
    }
}

fn shared(tensors: &[(String, Tensor)]) -> impl Iterator<Item = (String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
}

impl ExpertModule for Script {
    fn class(&self) -> &str {
        "torchscript"
    }

    fn info(&self) -> ExpertInfo {
        self.info.clone()
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        let (args, kwargs) = inputs.split_at(self.positional.min(inputs.len()));
        let args: Vec<&Tensor> = args.iter().collect();
        let kwargs: Vec<_> = self.keywords.iter().map(CString::as_c_str).zip(kwargs).collect();
        let outputs = self.module.forward(&args, &kwargs)?;
        if outputs.len() != self.outputs {
            let (got, want) = (outputs.len(), self.outputs);
            return Err(TchError::Shape(format!("the module returned {got} tensors where {want} are declared")));
        }
        Ok(outputs)
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        shared(&self.parameters).collect()
    }

    fn buffers(&self) -> Result<Vec<(String, Tensor)>, TchError> {
        // Asked each time: a module may put new tensors in the place of old ones.
        let mut buffers = self.module.state(true)?;
        buffers.extend(shared(&self.frozen));
        Ok(buffers)
    }
}
