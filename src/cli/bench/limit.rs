//! What a machine could do at best: the same work by libtorch alone, in one process, without server, wire or copies.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use skep_torch::{
    ExpertModule, ModuleSpec,
    process::{Tuning, tune},
    tch::{Device, Kind, Tensor, no_grad, with_grad},
};

use super::{caller::noise, worker::Start};
use crate::error::Error;

/// Learning rate of the step; what it is costs nothing.
const RATE: f64 = 0.01;

/// Which work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Computation {
    /// Class of the experts.
    pub class: String,
    /// Their width.
    pub hidden: usize,
    /// How many there are in all.
    pub experts: usize,
    /// Rows of a batch.
    pub rows: usize,
    /// Whether each forward pass is followed by another one with gradients, a backward pass and a step of SGD.
    pub backward: bool,
    /// Threads that compute, each with one of torch's own.
    pub threads: usize,
    /// Seconds in which batches begin.
    pub seconds: f64,
}

/// How fast it went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Computed {
    /// Batches per second: the sum over the threads.
    pub rate: f64,
}

/// An expert and its parameters.
pub struct Alone {
    module: Box<dyn ExpertModule>,
    parameters: Vec<Tensor>,
    step: Tensor,
}

impl Alone {
    /// A fresh one.
    pub fn new(class: &str, hidden: usize, seed: u64) -> Result<Self, Error> {
        let invalid = |error: skep_torch::Error| Error::Invalid(error.to_string());
        let module =
            ModuleSpec::named(class, hidden).and_then(|spec| spec.build(Device::Cpu, seed)).map_err(invalid)?;
        let parameters = module.parameters().into_iter().map(|(_, parameter)| parameter).collect();
        Ok(Self { module, parameters, step: Tensor::from_slice(&[-RATE as f32]) })
    }

    /// The output, without gradients.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        no_grad(|| self.module.forward(&[x.shallow_clone()])).map(|mut y| y.swap_remove(0)).map_err(failed)
    }

    /// Computes the output again, its gradient at the input by `gradient`, and makes a step of SGD.
    pub fn train(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor, Error> {
        let x = x.detach().set_requires_grad(true);
        let y = with_grad(|| self.module.forward(&[x.shallow_clone()])).map_err(failed)?;
        let loss = (&y[0] * gradient).sum(Kind::Float);
        let wanted: Vec<&Tensor> = std::iter::once(&x).chain(&self.parameters).collect();
        let mut found = Tensor::f_run_backward(&[&loss], &wanted, false, false).map_err(failed)?.into_iter();
        let at_input = found.next().ok_or_else(|| Error::Invalid("no gradient".to_owned()))?;
        no_grad(|| {
            for (parameter, gradient) in self.parameters.iter().zip(found) {
                let _stepped = parameter.shallow_clone().f_addcmul_(&gradient, &self.step).map_err(failed)?;
            }
            Ok(at_input)
        })
    }
}

fn failed(error: skep_torch::tch::TchError) -> Error {
    Error::Invalid(error.to_string())
}

/// `[rows, hidden]` of small numbers.
pub fn input(rows: usize, hidden: usize, seed: u32) -> Result<Tensor, Error> {
    let sizes = [rows as i64, hidden as i64];
    Tensor::f_from_slice(&noise(rows * hidden, seed)).and_then(|t| t.f_reshape(sizes)).map_err(failed)
}

/// Builds the experts, computes at each word.
pub fn run(work: &Computation, start: &Start) -> Result<(), Error> {
    tune(&Tuning::default()).map_err(|error| Error::Invalid(error.to_string()))?;
    let threads = work.threads.max(1);
    let mut lots = Vec::new();
    for thread in 0..threads {
        let numbers = (thread..work.experts.max(threads)).step_by(threads);
        let experts = numbers.map(|number| Alone::new(&work.class, work.hidden, number as u64));
        let experts = experts.collect::<Result<Vec<_>, _>>()?;
        let (x, gradient) = (input(work.rows, work.hidden, 1)?, input(work.rows, work.hidden, 2)?);
        for expert in &experts {
            compute(expert, &x, &gradient, work.backward)?;
        }
        lots.push(Lot { experts, x, gradient, turn: 0 });
    }
    start.rounds(|| {
        let until = Instant::now() + Duration::from_secs_f64(work.seconds);
        thread::scope(|scope| {
            let turn = |lot| scope.spawn(move || compute_until(lot, work.backward, until));
            let threads: Vec<_> = lots.iter_mut().map(turn).collect();
            threads.into_iter().try_fold(Computed::default(), |sum, thread| {
                let rate = thread.join().map_err(|_| Error::Invalid("libtorch alone panicked".to_owned()))??;
                Ok(Computed { rate: sum.rate + rate })
            })
        })
    })
}

/// What one thread computes on.
struct Lot {
    experts: Vec<Alone>,
    x: Tensor,
    gradient: Tensor,
    /// The expert whose turn it is, counted through.
    turn: usize,
}

fn compute(expert: &Alone, x: &Tensor, gradient: &Tensor, backward: bool) -> Result<(), Error> {
    let _output = expert.forward(x)?;
    if backward {
        let _gradient = expert.train(x, gradient)?;
    }
    Ok(())
}

/// Batches per second.
fn compute_until(lot: &mut Lot, backward: bool, until: Instant) -> Result<f64, Error> {
    // OpenMP counts threads for each thread that asks it.
    skep_torch::tch::set_num_threads(1);
    let (begun, first) = (Instant::now(), lot.turn);
    while lot.turn == first || Instant::now() < until {
        compute(&lot.experts[lot.turn % lot.experts.len()], &lot.x, &lot.gradient, backward)?;
        lot.turn += 1;
    }
    Ok((lot.turn - first) as f64 / begun.elapsed().as_secs_f64())
}
