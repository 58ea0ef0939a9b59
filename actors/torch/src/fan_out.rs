//! A mixture's experts as one differentiable function: one autograd node whatever their number, so that backward asks them
//! all at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use skep_moe::{BackwardGather, Chosen, Client, Gather, GridScores, Mixture, MoeError};
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

/// A mixture ends by its own timeout with what it has by then; the wait for it ends a little later.
const GRACE: Duration = Duration::from_millis(500);

impl FanOut for Mixture {
    fn k_best(&self) -> usize {
        self.config().k_best
    }

    fn forward(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
        let (this, client): (Mixture, &Client) = (self.clone(), self.client());
        let deadline = client.deadline(self.config().forward_timeout + GRACE);
        client.wait(deadline, async move { Mixture::forward(&this, inputs, scores).await })
    }

    fn backward(
        &self,
        gather: &Arc<Gather>,
        inputs: Vec<HostTensor>,
        grads: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        let (this, client, gather) = (self.clone(), self.client(), gather.clone());
        let deadline = client.deadline(self.config().backward_timeout + GRACE);
        client.wait(deadline, async move { Mixture::backward(&this, &gather, inputs, grads).await })
    }
}

/// How a mixture's calls to experts went since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Slots (a row and one of its k experts) that were answered in forward.
    pub answered: u64,
    /// Calls that failed in forward.
    pub failed_forward: u64,
    /// Calls that failed in backward.
    pub failed_backward: u64,
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
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    answered: AtomicU64,
    failed_forward: AtomicU64,
    failed_backward: AtomicU64,
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
        let Counts { answered, failed_forward, failed_backward } = &*self.counts;
        Calls {
            answered: answered.load(Relaxed),
            failed_forward: failed_forward.load(Relaxed),
            failed_backward: failed_backward.load(Relaxed),
        }
    }

    /// Asks the best experts by `scores` (per dimension `[batch, size]`). Gradients flow to `inputs` only.
    pub(crate) fn call(&self, inputs: &[&Tensor], scores: &[Tensor]) -> Result<Fanned, Error> {
        let staged = Staged::new("the mixture", inputs)?;
        let mut gather = self.fan_out.forward(staged.hosts.clone(), gate::grid_scores(scores)?)?;
        self.counts.answered.fetch_add(gather.mask.iter().filter(|&&answered| answered).count() as u64, Relaxed);
        self.counts.failed_forward.fetch_add(gather.failures.len() as u64, Relaxed);

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
            counts.failed_backward.fetch_add(joined.failures.len() as u64, Relaxed);
            Staged::gradients("the mixture", &hosts, joined.grad_inputs)
        };
        let outputs = attach("MixtureOfExperts", &tensors.iter().collect::<Vec<_>>(), &outputs, backward)?;
        Ok(Fanned { outputs, answered: Answered { outputs: Vec::new(), mask, chosen, failures }, device })
    }
}
