//! `nop` and `nop_delay`: experts that do nothing, at once or slowly, for tests and for measuring everything else.

use std::{thread, time::Duration};

use skep_wire::{DType, ExpertInfo, TensorDescriptor};
use tch::{Device, Kind, TchError, Tensor};

use super::{ExpertModule, ModuleSpec, check_width};
use crate::Error;

/// How long `nop_delay` takes in hivemind.
const DELAY: Duration = Duration::from_millis(500);

/// The identity over `[batch, hidden]`, after a delay if it has one.
pub struct Nop {
    hidden_dim: usize,
    delay: Duration,
    w: Tensor,
}

impl Nop {
    /// The recipe of a `nop` of this width.
    pub fn hidden(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::Nop { hidden_dim }
    }

    /// The recipe of a `nop_delay` of this width: the identity after half a second, during which its executor does
    /// nothing else.
    pub fn delayed(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::NopDelay { hidden_dim }
    }

    /// A fresh `nop`.
    pub fn new(hidden_dim: usize, device: Device) -> Result<Self, Error> {
        check_width(hidden_dim, 1)?;
        crate::check_device(device)?;
        // hivemind gives it an empty parameter, since torch's optimizers refuse to have none.
        let delay = Duration::ZERO;
        Ok(Self { hidden_dim, delay, w: Tensor::f_zeros([0], (Kind::Float, device))?.f_set_requires_grad(true)? })
    }

    /// A fresh `nop_delay`.
    pub fn new_delayed(hidden_dim: usize, device: Device) -> Result<Self, Error> {
        Ok(Self { delay: DELAY, ..Self::new(hidden_dim, device)? })
    }
}

impl ExpertModule for Nop {
    fn class(&self) -> &str {
        if self.delay.is_zero() { "nop" } else { "nop_delay" }
    }

    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[self.hidden_dim]);
        ExpertInfo::simple(x.clone(), x)
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        if !self.delay.is_zero() {
            #[allow(clippy::disallowed_methods, reason = "to block its executor is the whole job of nop_delay")]
            thread::sleep(self.delay);
        }
        Ok(vec![inputs[0].shallow_clone()])
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("w".to_owned(), self.w.shallow_clone())]
    }
}
