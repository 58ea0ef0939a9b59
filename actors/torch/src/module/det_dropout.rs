//! `det_dropout`: a feed-forward expert whose dropout mask is an input, so that gradients are reproducible.

use skep_wire::{DType, ExpertInfo, TensorDescriptor};
use tch::{Device, TchError, Tensor};

use super::{ExpertModule, Init, Linear, ModuleSpec, check_width, named};
use crate::Error;

/// `W2 relu(W1 (x · mask / 0.8) + b1) + b2` over `[batch, hidden]` and an int64 mask `[batch, hidden]` of zeros and ones.
pub struct DetDropout {
    hidden_dim: usize,
    up: Linear,
    down: Linear,
}

const KEEP: f64 = 0.8;

impl DetDropout {
    /// The recipe of a `det_dropout` of this width.
    pub fn hidden(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::DetDropout { hidden_dim }
    }

    /// A fresh one.
    pub fn new(hidden_dim: usize, device: Device, seed: u64) -> Result<Self, Error> {
        check_width(hidden_dim, 1)?;
        let mut init = Init::new(device, seed)?;
        let (up, down) = (init.linear(hidden_dim, 2 * hidden_dim)?, init.linear(2 * hidden_dim, hidden_dim)?);
        Ok(Self { hidden_dim, up, down })
    }
}

impl ExpertModule for DetDropout {
    fn class(&self) -> &str {
        "det_dropout"
    }

    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[self.hidden_dim]);
        let mask = TensorDescriptor::batched(DType::I64, &[self.hidden_dim]);
        let mut info = ExpertInfo::simple(x.clone(), x.with_grad());
        info.args.push(skep_wire::Nested::Leaf(mask));
        info
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        let kept = inputs[0].f_mul(&inputs[1])?.f_div_scalar(KEEP)?;
        Ok(vec![self.down.forward(&self.up.forward(&kept)?.f_relu()?)?])
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        named(&[
            ("linear_in.weight", &self.up.weight),
            ("linear_in.bias", &self.up.bias),
            ("linear_out.weight", &self.down.weight),
            ("linear_out.bias", &self.down.bias),
        ])
    }
}
