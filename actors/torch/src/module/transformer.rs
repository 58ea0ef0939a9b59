//! `transformer`: hivemind's post-norm encoder layer.

use skep_wire::{DType, ExpertInfo, Nested, TensorDescriptor};
use tch::{Device, TchError, Tensor};

use super::{Draws, ExpertModule, Init, Linear, ModuleSpec, Norm, check_width, named};
use crate::Error;

const HEADS: usize = 16;
/// Length in the advertised schema; the module itself takes any.
const SEQUENCE: usize = 128;

/// Self-attention with 16 heads and a feed-forward block of 4 × hidden with tanh GELU, each with dropout 0.1, residual and LayerNorm
/// behind it, over `[batch, 128, hidden]` and a bool mask `[batch, 128]`, true where a position is ignored.
pub struct Transformer {
    hidden_dim: usize,
    dropout: f64,
    draws: Draws,
    /// Rows: queries, keys, values.
    attend: Linear,
    project: Linear,
    up: Linear,
    down: Linear,
    norms: [Norm; 2],
}

/// hivemind's probability.
const DROPOUT: f64 = 0.1;

impl Transformer {
    /// The recipe of a `transformer` of this width.
    pub fn hidden(hidden_dim: usize) -> ModuleSpec {
        ModuleSpec::Transformer { hidden_dim, dropout: DROPOUT }
    }

    /// A fresh one; `hidden_dim` is a multiple of 16.
    pub fn new(hidden_dim: usize, device: Device, seed: u64) -> Result<Self, Error> {
        check_width(hidden_dim, HEADS)?;
        let mut init = Init::new(device, seed)?;
        let h = hidden_dim as i64;
        // torch's MultiheadAttention: Xavier weights, zero biases.
        let attend = Linear {
            weight: init.uniform(&[3 * h, h], (6.0 / (4.0 * h as f64)).sqrt())?,
            bias: init.constant(0.0, &[3 * h])?,
        };
        let mut project = init.linear(hidden_dim, hidden_dim)?;
        project.bias = init.constant(0.0, &[h])?;
        Ok(Self {
            hidden_dim,
            dropout: DROPOUT,
            draws: Draws { seed, step: 0 },
            attend,
            project,
            up: init.linear(hidden_dim, 4 * hidden_dim)?,
            down: init.linear(4 * hidden_dim, hidden_dim)?,
            norms: [init.norm(hidden_dim, 1e-5)?, init.norm(hidden_dim, 1e-5)?],
        })
    }

    /// Replaces the dropout probability.
    pub fn dropout(mut self, probability: f64) -> Self {
        self.dropout = probability;
        self
    }

    fn attention(&self, x: &Tensor, ignored: &Tensor) -> Result<Tensor, TchError> {
        let (batch, length, hidden) = x.size3()?;
        let heads = HEADS as i64;
        let qkv = self.attend.forward(x)?.f_chunk(3, -1)?;
        let split = |t: &Tensor| t.f_reshape([batch, length, heads, hidden / heads])?.f_transpose(1, 2);
        let [q, k, v] = [split(&qkv[0])?, split(&qkv[1])?, split(&qkv[2])?];
        let ignored = ignored.f_reshape([batch, 1, 1, length])?;
        let mixed = if self.dropout == 0.0 {
            let seen = ignored.f_logical_not()?;
            Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(&seen), 0.0, false, None, false)?
        } else {
            // By hand: the fused form drops by the process's generator.
            let scores = q.f_matmul(&k.f_transpose(-2, -1)?)?.f_mul_scalar(((hidden / heads) as f64).powf(-0.5))?;
            let scores = scores.f_masked_fill(&ignored, f64::NEG_INFINITY)?;
            self.draws.dropout(0, scores.f_internal_safe_softmax(-1, None)?, self.dropout)?.f_matmul(&v)?
        };
        self.project.forward(&mixed.f_transpose(1, 2)?.f_reshape([batch, length, hidden])?)
    }
}

impl ExpertModule for Transformer {
    fn class(&self) -> &str {
        "transformer"
    }

    fn info(&self) -> ExpertInfo {
        let x = TensorDescriptor::batched(DType::F32, &[SEQUENCE, self.hidden_dim]);
        let mut info = ExpertInfo::simple(x.clone(), x.with_grad());
        info.args.push(Nested::Leaf(TensorDescriptor::batched(DType::Bool, &[SEQUENCE])));
        info
    }

    fn free_dimensions(&self) -> &[usize] {
        // The sequence: 128 stands in hivemind's schema and binds nobody (docs/wire.md §9.4).
        &[1]
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        let x = &inputs[0];
        let drop = |place, t| self.draws.dropout(place, t, self.dropout);
        let x = self.norms[0].forward(&drop(1, self.attention(x, &inputs[1])?)?.f_add(x)?)?;
        let inner = drop(2, self.up.forward(&x)?.f_gelu("tanh")?)?;
        Ok(vec![self.norms[1].forward(&drop(3, self.down.forward(&inner)?)?.f_add(&x)?)?])
    }

    fn draws(&mut self) -> Option<&mut Draws> {
        Some(&mut self.draws)
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        named(&[
            ("self_attn.in_proj_weight", &self.attend.weight),
            ("self_attn.in_proj_bias", &self.attend.bias),
            ("self_attn.out_proj.weight", &self.project.weight),
            ("self_attn.out_proj.bias", &self.project.bias),
            ("linear1.weight", &self.up.weight),
            ("linear1.bias", &self.up.bias),
            ("linear2.weight", &self.down.weight),
            ("linear2.bias", &self.down.bias),
            ("norm1.weight", &self.norms[0].weight),
            ("norm1.bias", &self.norms[0].bias),
            ("norm2.weight", &self.norms[1].weight),
            ("norm2.bias", &self.norms[1].bias),
        ])
    }
}
