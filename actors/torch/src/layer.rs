//! [`MixtureOfExperts`]: a layer whose experts live elsewhere.

use std::sync::Arc;

use skep_moe::{Client, Mixture, MoeConfig};
use tch::{Kind, Tensor, nn::Path};

use crate::{
    Answered, Calls, Error,
    fan_out::{Experts, FanOut, Fanned},
    gate::{self, Gate},
};

/// A gate and the k best experts of a grid per row, averaged by the softmax of their scores (docs/wire.md §10.2).
///
/// The gate is one linear layer, `proj` in the variable store; an expert's score is the sum of its coordinates' scores.
/// `backward()` trains the experts that answered. Every call blocks the thread, at most for the configured timeouts.
pub struct MixtureOfExperts {
    gate: Gate,
    experts: Experts,
}

impl MixtureOfExperts {
    /// A layer over inputs `[batch, …, in_features]`; its gate's variables are made in `vs`.
    ///
    /// # Errors
    /// [`Error::Moe`] when the configuration makes no sense. Experts are looked for with each call.
    pub fn new(vs: Path, client: &impl AsRef<Client>, in_features: i64, config: MoeConfig) -> Result<Self, Error> {
        let grid_size = config.grid_size.clone();
        Self::over(&vs, in_features, &grid_size, Arc::new(Mixture::new(client.as_ref(), config)?))
    }

    fn over(vs: &Path, in_features: i64, grid_size: &[usize], fan_out: Arc<dyn FanOut>) -> Result<Self, Error> {
        Ok(Self { gate: Gate::new(vs, in_features, grid_size)?, experts: Experts::new(fan_out) })
    }

    /// The experts' first output for `x`, `[batch, …]`, on its device.
    ///
    /// # Errors
    /// [`Error::Moe`] when a row has fewer than `k_min` answers, unless `allow_zero_outputs` makes it a row of zeros.
    /// Errors of the backward call end `backward()`: see [`take_backward_error`](crate::take_backward_error).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let mut outputs = self.forward_all(&[x])?.outputs;
        if outputs.is_empty() {
            return Err(Error::Answer { expert: "the mixture".into(), reason: "its experts have no output".into() });
        }
        Ok(outputs.swap_remove(0))
    }

    /// All outputs of experts with several inputs; the gate looks at the first input.
    pub fn forward_all(&self, inputs: &[&Tensor]) -> Result<Answered, Error> {
        let first = inputs
            .first()
            .ok_or_else(|| Error::Inputs { expert: "the mixture".into(), reason: "there are none".into() })?;
        let scores = self.gate.scores(&self.gate.view(first)?)?;
        let Fanned { outputs, mut answered, device } = self.experts.call(inputs, &scores)?;
        let at_chosen = gate::at_chosen(&scores, &answered.chosen, self.experts.k_best())?;
        let weights = weights(&at_chosen, &answered.mask)?;
        let average = |y: &Tensor| Ok(gate::weighted_sum(&weights, y)?.f_to(device)?);
        answered.outputs = outputs.iter().map(average).collect::<Result<_, Error>>()?;
        Ok(answered)
    }

    /// How the calls to experts went so far.
    pub fn calls(&self) -> Calls {
        self.experts.calls()
    }
}

/// Softmax of the experts' scores over the slots that answered, `[batch, k]`; zeros where none did.
fn weights(at_chosen: &[Tensor], mask: &Tensor) -> Result<Tensor, Error> {
    let mut scores = at_chosen[0].shallow_clone();
    for dimension in &at_chosen[1..] {
        scores = scores.f_add(dimension)?;
    }
    // A row of -inf alone would have NaN for softmax and gradient.
    let empty = mask.f_any_dim(1, true)?.f_logical_not()?;
    let alive = mask.f_logical_or(&empty)?;
    let softmax = scores.f_masked_fill(&alive.f_logical_not()?, f64::NEG_INFINITY)?.f_softmax(1, None::<Kind>)?;
    Ok(softmax.f_masked_fill(&mask.f_logical_not()?, 0.0)?)
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
