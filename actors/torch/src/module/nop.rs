//! `nop`: an expert that does nothing, for tests and for measuring everything else.

use skep_wire::{DType, ExpertInfo, TensorDescriptor};
use tch::{Device, Kind, TchError, Tensor};

use super::{ExpertModule, ModuleSpec, check_width};
use crate::Error;

/// The identity over `[batch, hidden]`.
pub struct Nop {
    hidden_dim: usize,
    w: Tensor,
}

impl Nop {
    /// The recipe of a `nop` of this width.
    pub fn hidden(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::Nop { hidden_dim }
    }

    /// A fresh one.
    pub fn new(hidden_dim: usize, device: Device) -> Result<Self, Error> {
        check_width(hidden_dim, 1)?;
        crate::check_device(device)?;
        // hivemind gives it an empty parameter, since torch's optimizers refuse to have none.
        Ok(Self { hidden_dim, w: Tensor::f_zeros([0], (Kind::Float, device))?.f_set_requires_grad(true)? })
    }
}

impl ExpertModule for Nop {
    fn class(&self) -> &str {
        "nop"
    }

    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[self.hidden_dim]);
        ExpertInfo::simple(x.clone(), x)
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        Ok(vec![inputs[0].shallow_clone()])
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("w".to_owned(), self.w.shallow_clone())]
    }
}
