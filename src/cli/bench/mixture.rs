//! A mixture of experts without a network: the same gate, the same experts, the same steps, by libtorch alone.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use skep_torch::{
    process::{Tuning, tune},
    tch::{Kind, TchError, Tensor, no_grad},
};

use super::{
    limit::{Alone, input},
    machine::cores,
    moe::{Mix, Mixed},
    worker::Start,
};
use crate::error::Error;

struct Local {
    experts: Vec<Mutex<Alone>>,
    /// The experts' scores are products of inputs with this, `[hidden, experts]`: a sum over the grid's dimensions.
    gate: Tensor,
    k: i64,
}

/// Rows of one expert and where their outputs belong.
struct Lot {
    expert: usize,
    /// Row and slot, as `row × k + slot`.
    places: Tensor,
    x: Tensor,
    /// The gradient at their outputs, once it is known.
    gradient: Tensor,
}

/// Makes the experts, tries a step, makes steps at each word.
pub fn run(mix: &Mix, start: &Start) -> Result<(), Error> {
    tune(&Tuning::default()).map_err(|error| Error::Invalid(error.to_string()))?;
    let count: usize = mix.grid.iter().product();
    let experts = (0..count).map(|number| Alone::new("ffn", mix.hidden, number as u64).map(Mutex::new));
    let experts = experts.collect::<Result<Vec<_>, _>>()?;
    let gate = input(mix.hidden, count, 3)?.set_requires_grad(true);
    let local = Local { experts, gate, k: mix.k_best.min(count) as i64 };
    let x = input(mix.rows, mix.hidden, 1)?;
    local.step(&x)?;
    start.rounds(|| Mixed::of(mix.seconds, || Ok(local.step(&x)? as u64)))
}

impl Local {
    /// Forward and backward; tells how many experts were chosen.
    fn step(&self, x: &Tensor) -> Result<usize, Error> {
        let x = x.detach().set_requires_grad(true);
        let scores = x.f_matmul(&self.gate).map_err(failed)?;
        let (best, index) = scores.f_topk(self.k, 1, true, true).map_err(failed)?;
        let weights = best.f_softmax(1, None::<Kind>).map_err(failed)?;
        let mut lots = no_grad(|| self.lots(&x, &index))?;
        let (rows, width) = x.size2().map_err(failed)?;
        let slots = Tensor::zeros([rows * self.k, width], (Kind::Float, x.device()));
        let outputs = each(&self.experts, &lots, |expert, lot| expert.forward(&lot.x))?;
        for (lot, y) in lots.iter().zip(outputs) {
            let _ = slots.shallow_clone().f_index_copy_(0, &lot.places, &y).map_err(failed)?;
        }
        let slots = slots.reshape([rows, self.k, width]).set_requires_grad(true);
        let y = (weights.f_unsqueeze(2).map_err(failed)? * &slots).f_sum_dim_intlist(1, false, Kind::Float);
        let loss = y.map_err(failed)?.square().sum(Kind::Float);
        let found = Tensor::f_run_backward(&[&loss], &[&slots, &x, &self.gate], false, false).map_err(failed)?;
        let grads = found[0].reshape([rows * self.k, width]);
        for lot in &mut lots {
            lot.gradient = no_grad(|| grads.f_index_select(0, &lot.places)).map_err(failed)?;
        }
        let at_inputs = each(&self.experts, &lots, |expert, lot| expert.train(&lot.x, &lot.gradient))?;
        let mut at_input = found[1].shallow_clone();
        for (lot, gradient) in lots.iter().zip(at_inputs) {
            let rows = lot.places.f_floor_divide_scalar(self.k).map_err(failed)?;
            let _ = at_input.f_index_add_(0, &rows, &gradient).map_err(failed)?;
        }
        Ok(lots.len())
    }

    fn lots(&self, x: &Tensor, index: &Tensor) -> Result<Vec<Lot>, Error> {
        let chosen = Vec::<i64>::try_from(index.f_reshape([-1]).map_err(failed)?).map_err(failed)?;
        let mut places: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        for (place, expert) in chosen.into_iter().enumerate() {
            places.entry(expert).or_default().push(place as i64);
        }
        let lot = |(expert, places): (i64, Vec<i64>)| {
            let rows: Vec<i64> = places.iter().map(|place| place / self.k).collect();
            let x = x.f_index_select(0, &Tensor::from_slice(&rows)).map_err(failed)?;
            Ok(Lot { expert: expert as usize, places: Tensor::from_slice(&places), x, gradient: Tensor::new() })
        };
        places.into_iter().map(lot).collect()
    }
}

/// Does the same with each lot, on a thread per core; results in the order of the lots.
fn each(
    experts: &[Mutex<Alone>],
    lots: &[Lot],
    work: impl Fn(&Alone, &Lot) -> Result<Tensor, Error> + Sync,
) -> Result<Vec<Tensor>, Error> {
    // Tensors may change threads, but not be shared by them.
    let shared: Vec<(usize, Mutex<Lot>)> = lots.iter().map(|lot| (lot.expert, Mutex::new(lot.share()))).collect();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let turn = || {
        // OpenMP counts threads for each thread that asks it.
        skep_torch::tch::set_num_threads(1);
        while let Some((number, (expert, lot))) = {
            let number = next.fetch_add(1, Ordering::Relaxed);
            shared.get(number).map(|each| (number, each))
        } {
            let result = work(&held(&experts[*expert]), &held(lot));
            held(&done).push((number, result));
        }
    };
    thread::scope(|scope| (0..cores()).for_each(|_| drop(scope.spawn(turn))));
    let mut done: Vec<(usize, Result<Tensor, Error>)> = std::mem::take(&mut held(&done));
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lot {
    fn share(&self) -> Lot {
        let Lot { expert, places, x, gradient } = self;
        let (places, x, gradient) = (places.shallow_clone(), x.shallow_clone(), gradient.shallow_clone());
        Lot { expert: *expert, places, x, gradient }
    }
}

fn failed(error: TchError) -> Error {
    Error::Invalid(error.to_string())
}
