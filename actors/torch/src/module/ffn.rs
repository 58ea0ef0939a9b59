//! `ffn`: hivemind's feed-forward expert.

use skep_wire::{DType, ExpertInfo, TensorDescriptor};
use tch::{Device, TchError, Tensor};

use super::{ExpertModule, Init, Linear, ModuleSpec, Norm, check_width, named};
use crate::Error;

/// `LayerNorm(x + W2 gelu(W1 x + b1) + b2)` over `[batch, hidden]`, inner width 4 × hidden, tanh GELU, eps 1e-12.
pub struct Ffn {
    hidden_dim: usize,
    up: Linear,
    down: Linear,
    norm: Norm,
}

impl Ffn {
    /// The recipe of an `ffn` of this width.
    pub fn hidden(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::Ffn { hidden_dim }
    }

    /// A fresh one.
    pub fn new(hidden_dim: usize, device: Device, seed: u64) -> Result<Self, Error> {
        check_width(hidden_dim, 1)?;
        let mut init = Init::new(device, seed)?;
        Ok(Self {
            hidden_dim,
            up: init.linear(hidden_dim, 4 * hidden_dim)?,
            down: init.linear(4 * hidden_dim, hidden_dim)?,
            norm: init.norm(hidden_dim, 1e-12)?,
        })
    }
}

impl ExpertModule for Ffn {
    fn class(&self) -> &str {
        "ffn"
    }

    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[self.hidden_dim]);
        ExpertInfo::simple(x.clone(), x.with_grad())
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        let x = &inputs[0];
        let inner = self.up.forward(x)?.f_gelu("tanh")?;
        Ok(vec![self.norm.forward(&self.down.forward(&inner)?.f_add(x)?)?])
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        named(&[
            ("ffn.weight", &self.up.weight),
            ("ffn.bias", &self.up.bias),
            ("ffn_output.weight", &self.down.weight),
            ("ffn_output.bias", &self.down.bias),
            ("layer_norm.weight", &self.norm.weight),
            ("layer_norm.bias", &self.norm.bias),
        ])
    }
}
