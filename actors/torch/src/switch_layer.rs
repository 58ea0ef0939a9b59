//! [`SwitchMixtureOfExperts`]: a mixture that learns to use its experts evenly.

use std::sync::Arc;

use skep_moe::{Chosen, Client, Mixture, MoeConfig};
use tch::{Kind, Tensor, nn::Path};

use crate::{
    Answered, Calls, Error,
    fan_out::{Experts, FanOut, Fanned},
    gate::{self, Gate},
};

/// How a switch mixture routes, beyond [`MoeConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct SwitchConfig {
    /// Search, waits and failures.
    pub moe: MoeConfig,
    /// Share of the old utilization that a training step keeps.
    pub utilization_alpha: f64,
    /// Probability that a coordinate may be chosen in a training step.
    pub grid_dropout: f64,
    /// Width of the noise on the gate's inputs in training: a factor from 1 ± this.
    pub jitter_eps: f64,
}

impl SwitchConfig {
    /// hivemind's defaults over a grid: the best expert only, rows without an answer pass through, jitter 0.01.
    pub fn grid(prefix: &str, grid_size: impl Into<Vec<usize>>) -> Self {
        let moe = MoeConfig::grid(prefix, grid_size).k_best(1).k_min(0).backward_k_min(0).allow_zero_outputs(true);
        Self { moe, utilization_alpha: 0.9, grid_dropout: 1.0, jitter_eps: 0.01 }
    }

    fn check(&self) -> Result<(), Error> {
        for (name, value) in [
            ("utilization_alpha", self.utilization_alpha),
            ("grid_dropout", self.grid_dropout),
            ("jitter_eps", self.jitter_eps),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::Config(format!("{name} {value} is not between 0 and 1")));
            }
        }
        Ok(())
    }
}

/// A residual mixture in the manner of the Switch Transformer (docs/wire.md §10.3): `x + Σ_k q_k y_k`, where `q` is the
/// product of the gate's probabilities of an expert's coordinates. It comes with a loss that pulls towards even use.
///
/// Variables: `proj`, the gate, and `grid_utilization`, a buffer of all dimensions' shares behind each other. Every call
/// blocks the thread, at most for the configured timeouts.
pub struct SwitchMixtureOfExperts {
    gate: Gate,
    experts: Experts,
    config: SwitchConfig,
    utilization: Tensor,
}

impl SwitchMixtureOfExperts {
    /// A layer over inputs `[batch, …, in_features]`; its variables are made in `vs`.
    pub fn new(vs: Path, client: &impl AsRef<Client>, in_features: i64, config: SwitchConfig) -> Result<Self, Error> {
        let mixture = Mixture::new(client.as_ref(), config.moe.clone())?;
        Self::over(&vs, in_features, config, Arc::new(mixture))
    }

    fn over(vs: &Path, in_features: i64, config: SwitchConfig, fan_out: Arc<dyn FanOut>) -> Result<Self, Error> {
        config.check()?;
        let gate = Gate::new(vs, in_features, &config.moe.grid_size)?;
        let even: Vec<f32> = config.moe.grid_size.iter().flat_map(|&size| vec![1.0 / size as f32; size]).collect();
        let mut utilization = vs.f_zeros_no_train("grid_utilization", &[even.len() as i64])?;
        utilization.f_copy_(&Tensor::f_from_slice(&even)?)?;
        Ok(Self { gate, experts: Experts::new(fan_out), config, utilization })
    }

    /// A training step's output, `[batch, …]` like `x`, and balancing loss, a scalar to be added to the loss with some
    /// small factor.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        self.forward_t(x, true)
    }

    /// As [`forward`](Self::forward), with or without noise, dropout and an update of the utilization.
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<(Tensor, Tensor), Error> {
        let (mut answered, loss) = self.forward_all(&[x], train)?;
        if answered.outputs.is_empty() {
            return Err(Error::Answer { expert: "the mixture".into(), reason: "its experts have no output".into() });
        }
        Ok((answered.outputs.swap_remove(0), loss))
    }

    /// All outputs of experts with several inputs, and the balancing loss. The gate looks at the first input, which is
    /// added to the first output.
    ///
    /// # Errors
    /// As [`MixtureOfExperts::forward`](crate::MixtureOfExperts::forward).
    pub fn forward_all(&self, inputs: &[&Tensor], train: bool) -> Result<(Answered, Tensor), Error> {
        let wrong = |reason: String| Error::Inputs { expert: "the mixture".into(), reason };
        let first = inputs.first().ok_or_else(|| wrong("there are none".into()))?;
        let mut scores = self.gate.scores(&self.view(first, train)?)?;
        if train && self.config.grid_dropout < 1.0 {
            scores = scores.iter().map(|scores| self.drop_coordinates(scores)).collect::<Result<_, _>>()?;
        }
        let Fanned { outputs, mut answered, device } = self.experts.call(inputs, &scores)?;
        let softmax = scores.iter().map(|s| s.f_softmax(1, None::<Kind>)).collect::<Result<Vec<_>, _>>()?;
        if train {
            self.update_utilization(&answered)?;
        }
        let mut weights = gate::at_chosen(&softmax, &answered.chosen, self.experts.k_best())?
            .into_iter()
            .try_fold(answered.mask.f_to_kind(Kind::Float)?, |product, p| product.f_mul(&p))?;
        weights = weights.f_masked_fill(&answered.mask.f_logical_not()?, 0.0)?;
        for (i, y) in outputs.iter().enumerate() {
            let mut output = gate::weighted_sum(&weights, y)?.f_to(device)?;
            if i == 0 {
                if output.size() != first.size() {
                    let sizes = (first.size(), output.size());
                    return Err(wrong(format!("the input {:?} cannot be added to the output {:?}", sizes.0, sizes.1)));
                }
                output = output.f_add(first)?;
            }
            answered.outputs.push(output);
        }
        Ok((answered, self.balancing_loss(&softmax)?))
    }

    /// Shares of the experts asked, all dimensions behind each other.
    pub fn utilization(&self) -> Tensor {
        self.utilization.shallow_clone()
    }

    /// How the calls to experts went so far.
    pub fn calls(&self) -> Calls {
        self.experts.calls()
    }

    fn view(&self, x: &Tensor, train: bool) -> Result<Tensor, Error> {
        let (view, eps) = (self.gate.view(x)?, self.config.jitter_eps);
        if !train || eps == 0.0 {
            return Ok(view);
        }
        let factor = view.f_detach()?.f_rand_like()?.f_mul_scalar(2.0 * eps)?.f_add_scalar(1.0 - eps)?;
        Ok(view.f_mul(&factor)?)
    }

    /// Rules coordinates out for a whole step, but never all of a dimension.
    fn drop_coordinates(&self, scores: &Tensor) -> Result<Tensor, Error> {
        let options = (Kind::Float, scores.device());
        let dropped = Tensor::f_rand([scores.size()[1]], options)?.f_ge(self.config.grid_dropout)?;
        if dropped.f_all()?.f_int64_value(&[])? != 0 {
            return Ok(scores.shallow_clone());
        }
        Ok(scores.f_masked_fill(&dropped, f64::NEG_INFINITY)?)
    }

    fn update_utilization(&self, answered: &Answered) -> Result<(), Error> {
        let _guard = tch::no_grad_guard();
        let mask = Vec::<bool>::try_from(answered.mask.f_reshape([-1])?)?;
        let shares = shares(&answered.chosen, &mask, &self.config.moe.grid_size);
        let alpha = self.config.utilization_alpha;
        let fresh = Tensor::f_from_slice(&shares)?.f_to(self.utilization.device())?.f_mul_scalar(1.0 - alpha)?;
        let mut utilization = self.utilization.shallow_clone();
        utilization.f_copy_(&self.utilization.f_mul_scalar(alpha)?.f_add(&fresh)?)?;
        Ok(())
    }

    /// `Σ_d size_d² · mean_i(mean_b p_d[b, i] · u_d[i])`: what hivemind means; it multiplies by another `u` and has no
    /// gradient (docs/wire.md §10.3).
    fn balancing_loss(&self, softmax: &[Tensor]) -> Result<Tensor, Error> {
        let sizes: Vec<i64> = self.config.moe.grid_size.iter().map(|&size| size as i64).collect();
        // A copy: the next step updates the buffer while this step's graph still needs it.
        let used = self.utilization.f_detach()?.f_mul_scalar(1.0)?.f_split_with_sizes(&sizes, 0)?;
        let mut loss = Tensor::f_zeros([0i64; 0], (Kind::Float, self.utilization.device()))?;
        for ((p, u), size) in softmax.iter().zip(&used).zip(&sizes) {
            let even = p.f_mean_dim(0i64, false, None::<Kind>)?.f_mul(u)?.f_mean(None::<Kind>)?;
            loss = loss.f_add(&even.f_mul_scalar((size * size) as f64)?)?;
        }
        Ok(loss)
    }
}

/// Per dimension the share of each coordinate among the slots that answered; zeros when none did.
fn shares(chosen: &[Vec<Chosen>], mask: &[bool], grid_size: &[usize]) -> Vec<f32> {
    let mut counts: Vec<Vec<f32>> = grid_size.iter().map(|&size| vec![0.0; size]).collect();
    let k = mask.len().checked_div(chosen.len()).unwrap_or(0);
    let answered = chosen.iter().enumerate().flat_map(|(row, experts)| {
        experts.iter().enumerate().filter(move |(rank, _)| mask[row * k + rank]).map(|(_, expert)| expert)
    });
    let mut total: f32 = 0.0;
    for expert in answered {
        total += 1.0;
        expert.coordinates.iter().zip(&mut counts).for_each(|(&coordinate, counts)| counts[coordinate] += 1.0);
    }
    counts.concat().into_iter().map(|count| count / total.max(1.0)).collect()
}

#[cfg(test)]
#[path = "switch_layer_tests.rs"]
mod tests;
