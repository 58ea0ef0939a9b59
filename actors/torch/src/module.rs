//! What an expert computes: [`ExpertModule`], and hivemind's built-in classes as [`ModuleSpec`].

mod det_dropout;
mod draws;
mod ffn;
mod nop;
mod registry;
mod script;
mod transformer;

use serde::{Deserialize, Serialize};
use skep_wire::ExpertInfo;
use tch::{Device, Kind, TchError, Tensor};

pub use det_dropout::DetDropout;
pub use draws::Draws;
pub use ffn::Ffn;
pub use nop::Nop;
pub use registry::register_class;
pub use script::{Script, ScriptSpec, TensorSpec};
pub use transformer::Transformer;

use crate::{Error, ffi};

/// A network block that a server hosts.
///
/// It is used by one thread at a time and always in training mode (docs/wire.md §9.1). Inputs arrive on the module's
/// device, in schema order, as tensors that must not be written to in place. Outputs have the inputs' number of rows.
pub trait ExpertModule: Send {
    /// The class name under which it is hosted, as in `ffn`.
    fn class(&self) -> &str;

    /// Schemas of inputs and outputs.
    fn info(&self) -> ExpertInfo;

    /// Dimensions, beside the first, that may have another length than the schema says.
    fn free_dimensions(&self) -> &[usize] {
        &[]
    }

    /// Outputs for these inputs. With gradients recorded or not; keeps no tensor of its own making for a later call.
    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError>;

    /// Trainable parameters by name, in an order that never changes. Leaves that require grad.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// Tensors that are saved but not trained, as batch statistics are.
    /// They share storage with the module and may be written to when no call runs.
    fn buffers(&self) -> Result<Vec<(String, Tensor)>, TchError> {
        Ok(Vec::new())
    }

    /// Where it takes random numbers from, if it takes any. Set before each call; the seed is saved.
    fn draws(&mut self) -> Option<&mut Draws> {
        None
    }
}

/// One of hivemind's built-in expert classes (docs/wire.md §9.4), a class of one's own, or a TorchScript file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "expert_cls", deny_unknown_fields)]
pub enum ModuleSpec {
    /// See [`Ffn`].
    Ffn {
        /// Width of inputs and outputs.
        hidden_dim: usize,
    },
    /// See [`Transformer`].
    Transformer {
        /// Width of inputs and outputs, a multiple of 16.
        hidden_dim: usize,
        /// Probability with which its dropouts drop.
        dropout: f64,
    },
    /// See [`Nop`].
    Nop {
        /// Width of inputs and outputs.
        hidden_dim: usize,
    },
    /// See [`Nop::delayed`].
    NopDelay {
        /// Width of inputs and outputs.
        hidden_dim: usize,
    },
    /// See [`DetDropout`].
    DetDropout {
        /// Width of inputs and outputs.
        hidden_dim: usize,
    },
    /// A class that [`register_class`] made known.
    Registered {
        /// Its name.
        class: String,
        /// What it is told of its width.
        hidden_dim: usize,
    },
    /// See [`Script`].
    Script(ScriptSpec),
}

impl ModuleSpec {
    /// Names of hivemind's classes.
    pub const CLASSES: [&str; 5] = ["ffn", "transformer", "nop", "nop_delay", "det_dropout"];

    /// Names of all classes, those of [`register_class`] behind hivemind's.
    pub fn classes() -> Vec<String> {
        Self::CLASSES.into_iter().map(str::to_owned).chain(registry::names()).collect()
    }

    /// The class of this name.
    pub fn named(class: &str, hidden_dim: usize) -> Result<Self, Error> {
        Ok(match class {
            "ffn" => ModuleSpec::Ffn { hidden_dim },
            "transformer" => Transformer::hidden(hidden_dim),
            "nop" => ModuleSpec::Nop { hidden_dim },
            "nop_delay" => ModuleSpec::NopDelay { hidden_dim },
            "det_dropout" => ModuleSpec::DetDropout { hidden_dim },
            _ if registry::maker(class).is_some() => ModuleSpec::Registered { class: class.to_owned(), hidden_dim },
            _ => {
                let known = Self::classes().join(", ");
                return Err(Error::Config(format!("no expert class is called {class:?}; known: {known}")));
            }
        })
    }

    /// Replaces the dropout probability of a class that drops at random.
    ///
    /// # Errors
    /// [`Error::Config`] for another class, and for what is no probability below 1.
    pub fn dropout(mut self, probability: f64) -> Result<Self, Error> {
        match &mut self {
            ModuleSpec::Transformer { dropout, .. } if (0.0..1.0).contains(&probability) => *dropout = probability,
            ModuleSpec::Transformer { .. } => {
                return Err(Error::Config(format!("dropout {probability} is no probability below 1")));
            }
            other => return Err(Error::Config(format!("{} has no dropout to set", other.class()))),
        }
        Ok(self)
    }

    /// The class's name.
    pub fn class(&self) -> &str {
        match self {
            ModuleSpec::Ffn { .. } => "ffn",
            ModuleSpec::Transformer { .. } => "transformer",
            ModuleSpec::Nop { .. } => "nop",
            ModuleSpec::NopDelay { .. } => "nop_delay",
            ModuleSpec::DetDropout { .. } => "det_dropout",
            ModuleSpec::Registered { class, .. } => class,
            ModuleSpec::Script(_) => "torchscript",
        }
    }

    /// Makes the module with fresh parameters, which depend on `seed` only.
    pub fn build(&self, device: Device, seed: u64) -> Result<Box<dyn ExpertModule>, Error> {
        Ok(match self {
            ModuleSpec::Registered { class, hidden_dim } => {
                let maker = registry::maker(class);
                let maker = maker.ok_or_else(|| Error::Config(format!("no class {class:?} is registered")))?;
                return maker(*hidden_dim, device, seed);
            }
            ModuleSpec::Script(spec) => Box::new(Script::load(spec, device)?),
            &ModuleSpec::Ffn { hidden_dim } => Box::new(Ffn::new(hidden_dim, device, seed)?),
            &ModuleSpec::Transformer { hidden_dim, dropout } => {
                Box::new(Transformer::new(hidden_dim, device, seed)?.dropout(dropout))
            }
            &ModuleSpec::Nop { hidden_dim } => Box::new(Nop::new(hidden_dim, device)?),
            &ModuleSpec::NopDelay { hidden_dim } => Box::new(Nop::new_delayed(hidden_dim, device)?),
            &ModuleSpec::DetDropout { hidden_dim } => Box::new(DetDropout::new(hidden_dim, device, seed)?),
        })
    }
}

/// Makes parameters as torch's layers do by default, each from a generator of its own.
struct Init {
    device: Device,
    seed: u64,
}

/// Weight `[out, in]` and bias `[out]`.
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

/// Weight and bias `[width]`.
struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Init {
    fn new(device: Device, seed: u64) -> Result<Self, Error> {
        crate::check_device(device)?;
        Ok(Self { device, seed })
    }

    /// Uniform in ±bound.
    fn uniform(&mut self, shape: &[i64], bound: f64) -> Result<Tensor, TchError> {
        let mut tensor = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
        ffi::uniform_(&mut tensor, -bound, bound, self.seed)?;
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        tensor.f_to(self.device)?.f_set_requires_grad(true)
    }

    fn constant(&self, value: f64, shape: &[i64]) -> Result<Tensor, TchError> {
        Tensor::f_full(shape, value, (Kind::Float, self.device))?.f_set_requires_grad(true)
    }

    fn linear(&mut self, from: usize, to: usize) -> Result<Linear, TchError> {
        let bound = 1.0 / (from as f64).sqrt();
        Ok(Linear { weight: self.uniform(&[to as i64, from as i64], bound)?, bias: self.uniform(&[to as i64], bound)? })
    }

    fn norm(&self, width: usize, eps: f64) -> Result<Norm, TchError> {
        let shape = [width as i64];
        Ok(Norm { weight: self.constant(1.0, &shape)?, bias: self.constant(0.0, &shape)?, eps })
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_linear(&self.weight, Some(&self.bias))
    }
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

fn named(parameters: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
    parameters.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())).collect()
}

fn check_width(hidden_dim: usize, multiple: usize) -> Result<(), Error> {
    // 4H × H elements must be countable; far beyond any memory.
    let most = 1 << 20;
    if hidden_dim == 0 || hidden_dim > most || !hidden_dim.is_multiple_of(multiple) {
        return Err(Error::Config(format!(
            "hidden_dim {hidden_dim} is not a multiple of {multiple} from {multiple} to {most}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_hiveminds() {
        let count = |class: &str, hidden_dim| {
            let module = ModuleSpec::named(class, hidden_dim).unwrap().build(Device::Cpu, 0).unwrap();
            assert_eq!(module.class(), class);
            module.parameters().iter().map(|(_, p)| p.numel()).sum::<usize>()
        };
        assert_eq!(count("ffn", 1024), 8_395_776);
        assert_eq!(count("ffn", 512), 2_100_736);
        assert_eq!(count("transformer", 1024), 12_596_224);
        assert_eq!(count("nop", 64), 0);
        assert_eq!(count("nop_delay", 64), 0);
        assert_eq!(count("det_dropout", 8), 4 * 64 + 3 * 8);
    }

    #[test]
    fn parameters_depend_on_the_seed_only() {
        let weights = |seed| Ffn::new(8, Device::Cpu, seed).unwrap().parameters();
        let (a, b, c) = (weights(7), weights(7), weights(8));
        for ((name, a), (_, b)) in a.iter().zip(&b) {
            assert!(a.equal(b), "{name}");
            assert!(a.requires_grad() && a.is_leaf());
        }
        assert!(!a[0].1.equal(&c[0].1));
        let bound = a[0].1.abs().max().double_value(&[]);
        assert!((0.3..=1.0 / 8f64.sqrt()).contains(&bound), "{bound}");
    }

    #[test]
    fn impossible_modules_are_refused() {
        assert!(ModuleSpec::named("mlp", 8).unwrap_err().to_string().contains("known: ffn"));
        for (class, width) in [("ffn", 0), ("ffn", usize::MAX), ("transformer", 24)] {
            let error = ModuleSpec::named(class, width).unwrap().build(Device::Cpu, 0).err().unwrap();
            assert!(error.to_string().contains("hidden_dim"), "{error}");
        }
    }
}
