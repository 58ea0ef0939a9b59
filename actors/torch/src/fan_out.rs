//! A mixture's experts as one differentiable function: one autograd node whatever their number, so that backward asks them
//! all at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use skep_moe::{BackwardGather, Chosen, Gather, GridScores, Mixture, MoeError};
use skep_rpc::RpcError;
use skep_wire::{ExpertUid, HostTensor};
use tch::{Device, Kind, Tensor};

use crate::{
    Error, attach, gate,
    staging::{Like, Staged, output_gradients},
    to_tensor,
};

/// A mixture over host tensors. Waits until it is done.
pub(crate) trait FanOut: Send + Sync {
    fn k_best(&self) -> usize;
    fn forward(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError>;
    fn backward(
        &self,
        gather: &Arc<Gather>,
        inputs: Vec<HostTensor>,
        grads: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError>;
}

impl FanOut for Mixture {
    fn k_best(&self) -> usize {
        self.config().k_best
    }

    fn forward(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
        self.forward_wait(inputs, scores)
    }

    fn backward(
        &self,
        gather: &Arc<Gather>,
        inputs: Vec<HostTensor>,
        grads: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        self.backward_wait(gather, inputs, grads)
    }
}

/// How the calls to one expert went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertCalls {
    /// Forward passes that it answered.
    pub forward: u64,
    /// Backward passes that it answered: each is an optimizer step of an expert that trains.
    pub backward: u64,
    /// Calls that failed.
    pub failed: u64,
}

/// How a mixture's calls to experts went since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Slots (a row and one of its k experts) that were answered in forward.
    pub answered: u64,
    /// Calls that failed in forward.
    pub failed_forward: u64,
    /// Calls that failed in backward.
    pub failed_backward: u64,
    /// Each expert that was asked.
    pub experts: BTreeMap<ExpertUid, ExpertCalls>,
}

impl Calls {
    /// Calls that failed, in either direction.
    pub fn failed(&self) -> u64 {
        self.failed_forward + self.failed_backward
    }

    fn count(&mut self, direction: Direction, chosen: &[Vec<Chosen>], mask: &[bool], failures: &[Failure]) {
        let k = mask.len().checked_div(chosen.len()).unwrap_or(0);
        let slots = chosen
            .iter()
            .enumerate()
            .flat_map(|(row, chosen)| chosen.iter().enumerate().map(move |(i, c)| (row * k + i, c)));
        let answered: BTreeSet<&ExpertUid> =
            slots.filter(|(slot, _)| mask[*slot]).map(|(_, chosen)| &chosen.uid).collect();
        for uid in answered {
            let calls = self.experts.entry(uid.clone()).or_default();
            match direction {
                Direction::Forward => calls.forward += 1,
                Direction::Backward => calls.backward += 1,
            }
        }
        for (uid, _) in failures {
            self.experts.entry(uid.clone()).or_default().failed += 1;
        }
        match direction {
            Direction::Forward => {
                self.answered += mask.iter().filter(|&&answered| answered).count() as u64;
                self.failed_forward += failures.len() as u64;
            }
            Direction::Backward => self.failed_backward += failures.len() as u64,
        }
    }
}

type Failure = (ExpertUid, RpcError);

#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

/// A mixture's output and who made it.
#[derive(Debug)]
pub struct Answered {
    /// One tensor `[batch, …]` per output of the experts.
    pub outputs: Vec<Tensor>,
    /// `[batch, k]` on the CPU: whether the row's expert answered. Rows without any have zero outputs.
    pub mask: Tensor,
    /// Per row the experts asked, best first.
    pub chosen: Vec<Vec<Chosen>>,
    /// Calls that failed, with the expert asked.
    pub failures: Vec<(ExpertUid, RpcError)>,
}

/// The experts behind a mixture layer.
pub(crate) struct Experts {
    fan_out: Arc<dyn FanOut>,
    counts: Arc<Mutex<Calls>>,
}

fn counting(counts: &Mutex<Calls>) -> MutexGuard<'_, Calls> {
    counts.lock().expect("no panic while calls are counted")
}

/// Outputs `[batch, k, …]` on the CPU and in the graph; `answered.outputs` is still empty.
pub(crate) struct Fanned {
    pub outputs: Vec<Tensor>,
    pub answered: Answered,
    /// Where the layer's outputs go.
    pub device: Device,
}

impl Experts {
    pub(crate) fn new(fan_out: Arc<dyn FanOut>) -> Self {
        Self { fan_out, counts: Arc::default() }
    }

    pub(crate) fn k_best(&self) -> usize {
        self.fan_out.k_best()
    }

    pub(crate) fn calls(&self) -> Calls {
        counting(&self.counts).clone()
    }

    /// Asks the best experts by `scores` (per dimension `[batch, size]`). Gradients flow to `inputs` only.
    pub(crate) fn call(&self, inputs: &[&Tensor], scores: &[Tensor]) -> Result<Fanned, Error> {
        let staged = Staged::new("the mixture", inputs)?;
        let mut gather = self.fan_out.forward(staged.hosts.clone(), gate::grid_scores(scores)?)?;
        counting(&self.counts).count(Direction::Forward, &gather.chosen, &gather.mask, &gather.failures);

        let outputs = std::mem::take(&mut gather.outputs);
        let like = Like::all(&outputs);
        let outputs = outputs.into_iter().map(to_tensor).collect::<Result<Vec<_>, _>>()?;
        let shape = [gather.chosen.len() as i64, self.k_best() as i64];
        let mask: Vec<u8> = gather.mask.iter().map(|&answered| answered.into()).collect();
        let mask = Tensor::f_from_slice(&mask)?.f_to_kind(Kind::Bool)?.f_reshape(shape)?;
        let (chosen, failures) = (gather.chosen.clone(), gather.failures.clone());

        let (fan_out, counts, gather) = (self.fan_out.clone(), self.counts.clone(), Arc::new(gather));
        let Staged { tensors, hosts, device } = staged;
        let backward = move |grads: &[Option<Tensor>]| {
            let joined = fan_out.backward(&gather, hosts.clone(), output_gradients(grads, &like)?)?;
            counting(&counts).count(Direction::Backward, &gather.chosen, &joined.mask, &joined.failures);
            Staged::gradients("the mixture", &hosts, joined.grad_inputs)
        };
        let outputs = attach("MixtureOfExperts", &tensors.iter().collect::<Vec<_>>(), &outputs, backward)?;
        Ok(Fanned { outputs, answered: Answered { outputs: Vec::new(), mask, chosen, failures }, device })
    }
}
