//! Optimizers with a state that can be saved, stepped by torch's fused kernels.

mod half;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    Error, Schedule,
    ffi::{self, AdamNumbers},
};

/// Stochastic gradient descent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Share of the previous direction that is kept.
    pub momentum: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
}

/// Adam; the decay is an L2 penalty.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// L2 penalty.
    pub weight_decay: f64,
}

/// Adam with weight decay that is decoupled from the gradient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of the weights per step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { lr: 0.01, momentum: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

impl Default for Adam {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

impl Sgd {
    /// Plain SGD with this learning rate.
    pub fn lr(lr: f64) -> Self {
        Self { lr, ..Self::default() }
    }

    /// Sets [`momentum`](Self::momentum).
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.momentum = momentum;
        self
    }
}

impl Adam {
    /// torch's defaults with this learning rate.
    pub fn lr(lr: f64) -> Self {
        Self { lr, ..Self::default() }
    }
}

impl AdamW {
    /// torch's defaults with this learning rate.
    pub fn lr(lr: f64) -> Self {
        Self { lr, ..Self::default() }
    }
}

/// The rule by which parameters follow gradients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "rule")]
pub enum Rule {
    /// Parameters never change; their gradients are not even computed.
    #[default]
    None,
    /// See [`Sgd`].
    Sgd(Sgd),
    /// See [`Adam`].
    Adam(Adam),
    /// See [`AdamW`].
    #[serde(rename = "adamw")]
    AdamW(AdamW),
}

impl Rule {
    /// hivemind's name of it.
    pub fn name(&self) -> &'static str {
        match self {
            Rule::None => "none",
            Rule::Sgd(_) => "sgd",
            Rule::Adam(_) => "adam",
            Rule::AdamW(_) => "adamw",
        }
    }
}

/// How an expert trains: a rule, a schedule of its learning rate, a limit on the gradients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSpec {
    /// The rule.
    pub rule: Rule,
    /// Factor on the learning rate by step.
    pub schedule: Schedule,
    /// Largest L2 norm of all gradients together; larger ones are scaled down to it.
    pub clip_grad_norm: Option<f64>,
}

impl OptimizerSpec {
    /// No training.
    pub fn none() -> Self {
        Self::default()
    }

    /// By hivemind's name, `none`, `sgd`, `adam`, or `adamw`, with its default numbers.
    pub fn named(name: &str) -> Result<Self, Error> {
        let rule = match name {
            "none" => Rule::None,
            "sgd" => Rule::Sgd(Sgd::default()),
            "adam" => Rule::Adam(Adam::default()),
            "adamw" => Rule::AdamW(AdamW::default()),
            _ => return Err(Error::Config(format!("no optimizer is called {name:?}; try sgd, adam, adamw or none"))),
        };
        Ok(Self { rule, ..Self::default() })
    }

    /// Replaces the rule's learning rate; no effect without training.
    pub fn learning_rate(mut self, lr: f64) -> Self {
        match &mut self.rule {
            Rule::None => {}
            Rule::Sgd(rule) => rule.lr = lr,
            Rule::Adam(rule) => rule.lr = lr,
            Rule::AdamW(rule) => rule.lr = lr,
        }
        self
    }

    /// Sets [`schedule`](Self::schedule).
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets [`clip_grad_norm`](Self::clip_grad_norm).
    pub fn clip_grad_norm(mut self, limit: f64) -> Self {
        self.clip_grad_norm = Some(limit);
        self
    }

    /// Whether it changes parameters at all.
    pub fn trains(&self) -> bool {
        self.rule != Rule::None
    }

    /// Its numbers by torch's and hivemind's names; yes and no are 1 and 0.
    pub fn numbers(&self) -> BTreeMap<String, f64> {
        let mut numbers: Vec<(&str, f64)> = match &self.rule {
            Rule::None => Vec::new(),
            Rule::Sgd(sgd) => vec![
                ("lr", sgd.lr),
                ("momentum", sgd.momentum),
                ("weight_decay", sgd.weight_decay),
                ("nesterov", f64::from(sgd.nesterov)),
            ],
            Rule::Adam(Adam { lr, betas, eps, weight_decay }) | Rule::AdamW(AdamW { lr, betas, eps, weight_decay }) => {
                vec![
                    ("lr", *lr),
                    ("beta1", betas.0),
                    ("beta2", betas.1),
                    ("eps", *eps),
                    ("weight_decay", *weight_decay),
                ]
            }
        };
        if let Schedule::Linear { warmup_steps, total_steps } = self.schedule {
            numbers.extend([("num_warmup_steps", warmup_steps as f64), ("num_training_steps", total_steps as f64)]);
        }
        numbers.extend(self.clip_grad_norm.map(|limit| ("clip_grad_norm", limit)));
        numbers.into_iter().map(|(name, number)| (name.to_owned(), number)).collect()
    }

    /// Fails on numbers that no optimizer can work with.
    pub fn check(&self) -> Result<(), Error> {
        let (lr, decay) = match &self.rule {
            Rule::None => (0.0, 0.0),
            Rule::Sgd(rule) => (rule.lr, rule.weight_decay),
            Rule::Adam(rule) => (rule.lr, rule.weight_decay),
            Rule::AdamW(rule) => (rule.lr, rule.weight_decay),
        };
        let good = |x: f64| x.is_finite() && x >= 0.0;
        if !good(lr) {
            return Err(Error::Config(format!("learning rate {lr} is not a number of at least 0")));
        }
        if !good(decay) {
            return Err(Error::Config(format!("weight decay {decay} is not a number of at least 0")));
        }
        match self.clip_grad_norm {
            Some(limit) if !(limit.is_finite() && limit > 0.0) => {
                Err(Error::Config(format!("clip_grad_norm {limit} is not a number above 0")))
            }
            _ => Ok(()),
        }
    }
}

impl From<Sgd> for OptimizerSpec {
    fn from(rule: Sgd) -> Self {
        Self { rule: Rule::Sgd(rule), ..Self::default() }
    }
}

impl From<Adam> for OptimizerSpec {
    fn from(rule: Adam) -> Self {
        Self { rule: Rule::Adam(rule), ..Self::default() }
    }
}

impl From<AdamW> for OptimizerSpec {
    fn from(rule: AdamW) -> Self {
        Self { rule: Rule::AdamW(rule), ..Self::default() }
    }
}

/// A rule with its state over the parameters of one module.
pub(crate) struct Optimizer {
    rule: Rule,
    state: State,
}

/// Per parameter, in the module's order.
enum State {
    None,
    Momenta(Vec<Tensor>),
    /// exp_avg, exp_avg_sq, and a scalar float32 step count.
    Moments(Vec<[Tensor; 3]>),
}

const MOMENTUM: &str = "momentum_buffer";
const MOMENTS: [&str; 3] = ["exp_avg", "exp_avg_sq", "step"];

impl Optimizer {
    pub(crate) fn new<'a>(rule: Rule, params: impl Iterator<Item = &'a Tensor>) -> Result<Self, TchError> {
        let zeros = |p: &Tensor| p.f_detach()?.f_zeros_like();
        let state = match &rule {
            Rule::Sgd(sgd) if sgd.momentum != 0.0 => State::Momenta(params.map(zeros).collect::<Result<_, _>>()?),
            Rule::None | Rule::Sgd(_) => State::None,
            Rule::Adam(_) | Rule::AdamW(_) => {
                let moments = |p: &Tensor| Ok([zeros(p)?, zeros(p)?, step_count(p.device())?]);
                State::Moments(params.map(moments).collect::<Result<_, TchError>>()?)
            }
        };
        Ok(Self { rule, state })
    }

    /// One step in place, with the learning rate times `factor`. A parameter without a gradient keeps value and state.
    pub(crate) fn step(&mut self, params: &[&Tensor], grads: &[Option<Tensor>], factor: f64) -> Result<(), TchError> {
        let used: Vec<usize> = (0..params.len()).filter(|&i| grads[i].is_some()).collect();
        if used.is_empty() {
            return Ok(());
        }
        let grads: Vec<&Tensor> = grads.iter().flatten().collect();
        let params: Vec<&Tensor> = used.iter().map(|&i| params[i]).collect();
        match (&self.rule, &self.state) {
            (Rule::Sgd(sgd), state) => {
                let momentum = |i: usize| if let State::Momenta(all) = state { Some(&all[i]) } else { None };
                let rate = sgd.lr * factor;
                let (mut fused, mut fused_grads, mut momenta) = (Vec::new(), Vec::new(), Vec::new());
                for ((&i, &param), &grad) in used.iter().zip(&params).zip(&grads) {
                    if half::is_half(param) {
                        half::sgd_step(sgd, rate, param, grad, momentum(i))?;
                    } else {
                        fused.push(param);
                        fused_grads.push(grad);
                        momenta.extend(momentum(i));
                    }
                }
                if fused.is_empty() {
                    return Ok(());
                }
                ffi::sgd_step(&fused, &fused_grads, &momenta, rate, sgd.momentum, sgd.weight_decay, sgd.nesterov)
            }
            (Rule::Adam(Adam { lr, betas, eps, weight_decay }), State::Moments(all))
            | (Rule::AdamW(AdamW { lr, betas, eps, weight_decay }), State::Moments(all)) => {
                let moments: Vec<_> = used.iter().map(|&i| &all[i]).collect();
                let decoupled = matches!(self.rule, Rule::AdamW(_));
                let numbers =
                    AdamNumbers { lr: lr * factor, betas: *betas, eps: *eps, weight_decay: *weight_decay, decoupled };
                ffi::adam_step(&params, &grads, &moments, numbers)
            }
            _ => Ok(()),
        }
    }

    /// The state's tensors, named `parameter.state` as in `ffn.weight.exp_avg`; they share storage with the state.
    pub(crate) fn tensors(&self, names: &[String]) -> Vec<(String, Tensor)> {
        match &self.state {
            State::None => Vec::new(),
            State::Momenta(all) => {
                names.iter().zip(all).map(|(name, m)| (format!("{name}.{MOMENTUM}"), m.shallow_clone())).collect()
            }
            State::Moments(all) => {
                let named = names.iter().zip(all).flat_map(|(name, state)| {
                    MOMENTS.iter().zip(state).map(move |(part, t)| (format!("{name}.{part}"), t.shallow_clone()))
                });
                named.collect()
            }
        }
    }
}

fn step_count(device: Device) -> Result<Tensor, TchError> {
    Tensor::f_zeros([0i64; 0], (Kind::Float, device))
}

/// Gradients scaled so that their joint L2 norm is at most `limit`, given that norm. The factor is torch's:
/// `limit / (norm + 1e-6)` when below 1. Gradients are copied when scaled: they may share storage with an answer.
pub(crate) fn clip(grads: Vec<Option<Tensor>>, norm: f64, limit: f64) -> Result<Vec<Option<Tensor>>, TchError> {
    let factor = limit / (norm + 1e-6);
    if factor >= 1.0 {
        return Ok(grads);
    }
    let mut scaled = ffi::scaled(&grads.iter().flatten().collect::<Vec<_>>(), factor)?.into_iter();
    Ok(grads.into_iter().map(|grad| grad.and_then(|_| scaled.next())).collect())
}

#[cfg(test)]
mod tests {
    use tch::nn::{self, OptimizerConfig};

    use super::*;

    fn own_and_torchs(rule: Rule, torchs: impl Fn(&nn::VarStore) -> nn::Optimizer) -> (Tensor, Tensor) {
        let vs = nn::VarStore::new(Device::Cpu);
        let (w, b) = (vs.root().randn("w", &[33, 17], 0., 1.), vs.root().randn("b", &[17], 0., 1.));
        let own = [&w, &b].map(|p| p.detach().copy().set_requires_grad(true));
        let mut torchs = torchs(&vs);
        let mut optimizer = Optimizer::new(rule, own.iter()).unwrap();
        for _ in 0..20 {
            let x = Tensor::randn([8, 33], (Kind::Float, Device::Cpu));
            let loss = |w: &Tensor, b: &Tensor| (x.matmul(w) + b).tanh().square().sum(Kind::Float);
            torchs.backward_step(&loss(&w, &b));
            let grads = Tensor::run_backward(&[loss(&own[0], &own[1])], &own, false, false);
            let grads: Vec<_> = grads.into_iter().map(Some).collect();
            optimizer.step(&[&own[0], &own[1]], &grads, 1.0).unwrap();
        }
        let [own, _] = own;
        (w.detach(), own.detach())
    }

    #[test]
    fn optimizers_step_as_torchs_do() {
        type Build<'a> = &'a dyn Fn(&nn::VarStore) -> nn::Optimizer;
        let cases: [(Rule, Build); 5] = [
            (Rule::Sgd(Sgd::lr(0.01)), &|vs| nn::Sgd::default().build(vs, 0.01).unwrap()),
            (Rule::Sgd(Sgd::lr(0.01).momentum(0.9)), &|vs| nn::sgd(0.9, 0., 0., false).build(vs, 0.01).unwrap()),
            (Rule::Sgd(Sgd { lr: 0.01, momentum: 0.9, weight_decay: 0.1, nesterov: true }), &|vs| {
                nn::sgd(0.9, 0., 0.1, true).build(vs, 0.01).unwrap()
            }),
            (Rule::Adam(Adam::lr(0.01)), &|vs| nn::Adam::default().build(vs, 0.01).unwrap()),
            (Rule::AdamW(AdamW::lr(0.01)), &|vs| nn::AdamW::default().build(vs, 0.01).unwrap()),
        ];
        for (rule, torchs) in cases {
            let name = format!("{rule:?}");
            let (theirs, ours) = own_and_torchs(rule, torchs);
            assert!(theirs.allclose(&ours, 1e-5, 1e-6, false), "{name}");
        }
    }

    /// 33 elements: vectors and a rest in every kernel.
    #[test]
    fn parameters_of_two_bytes_step_as_those_of_four_do() {
        let rules = [
            Rule::Sgd(Sgd::lr(0.1)),
            Rule::Sgd(Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.1, nesterov: true }),
            Rule::Sgd(Sgd::lr(0.1).momentum(0.9)),
            Rule::Adam(Adam::lr(0.1)),
            Rule::AdamW(AdamW::lr(0.1)),
        ];
        let values = |seed: i64| (Tensor::arange(33, (Kind::Float, Device::Cpu)) * seed).sin() + 0.01;
        for rule in rules {
            let stepped = |kind: Kind| {
                let p = [values(1).to_kind(kind), values(2).to_kind(Kind::Float)];
                let mut optimizer = Optimizer::new(rule.clone(), p.iter()).unwrap();
                for seed in 3..6 {
                    let grads = [values(seed).to_kind(kind), values(seed)].map(Some);
                    optimizer.step(&[&p[0], &p[1]], &grads, 1.0).unwrap();
                }
                p.map(|p| p.to_kind(Kind::Float))
            };
            let ([half, beside], [whole, same]) = (stepped(Kind::BFloat16), stepped(Kind::Float));
            assert!(half.allclose(&whole, 0.03, 0.03, false), "{rule:?}: {half} {whole}");
            assert!(beside.equal(&same), "{rule:?}");
        }
    }

    #[test]
    fn a_parameter_without_gradient_stays() {
        let p = [Tensor::ones([2], (Kind::Float, Device::Cpu)), Tensor::ones([3], (Kind::Float, Device::Cpu))];
        let mut optimizer = Optimizer::new(Rule::Adam(Adam::lr(0.1)), p.iter()).unwrap();
        optimizer.step(&[&p[0], &p[1]], &[None, Some(p[1].ones_like())], 1.0).unwrap();
        assert_eq!(Vec::<f32>::try_from(&p[0]).unwrap(), [1., 1.]);
        assert!(p[1].double_value(&[0]) < 0.95);
        let steps: Vec<_> =
            optimizer.tensors(&["a".into(), "b".into()]).into_iter().filter(|t| t.0.ends_with("step")).collect();
        assert_eq!(steps.iter().map(|t| t.1.double_value(&[])).collect::<Vec<_>>(), [0.0, 1.0]);
    }

    #[test]
    fn clipping_copies_and_reaches_the_limit() {
        let grads = [Tensor::ones([100], (Kind::Float, Device::Cpu)), Tensor::ones([300], (Kind::Float, Device::Cpu))];
        let norm = ffi::norm(&[&grads[0], &grads[1]]).unwrap();
        assert!((norm - 20.0).abs() < 1e-4);
        let [first, second] = &grads;
        let clipped = clip(vec![Some(first.shallow_clone()), None, Some(second.shallow_clone())], norm, 1.0).unwrap();
        assert!((clipped[2].as_ref().unwrap().double_value(&[0]) - 0.05).abs() < 1e-6);
        assert!(clipped[1].is_none());
        assert_eq!(second.double_value(&[0]), 1.0);
    }

    #[test]
    fn names_and_numbers_are_checked() {
        assert!(OptimizerSpec::named("lion").unwrap_err().to_string().contains("try sgd"));
        assert!(OptimizerSpec::named("sgd").unwrap().learning_rate(f64::NAN).check().is_err());
        assert!(OptimizerSpec::from(Sgd::lr(0.1)).clip_grad_norm(0.0).check().is_err());
        assert!(OptimizerSpec::none().check().is_ok());
    }
}
