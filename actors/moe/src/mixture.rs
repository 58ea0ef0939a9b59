//! [`Mixture`]: a batch fanned out to the k best experts per row and joined again, over host tensors.

use std::{sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{RpcError, Step};
use skep_wire::{ExpertPrefix, ExpertUid, HostTensor, UidError};
use tokio::sync::oneshot;

use crate::{Client, GridScores, MoeConfig, fan_out, hive::Hive};

/// What a pass may take after its timeout, for joining what has come by then.
const JOINING: Duration = Duration::from_millis(500);

/// An expert chosen for a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its name.
    pub uid: ExpertUid,
    /// Who hosts it.
    pub peer: PeerId,
    /// Its coordinates in the grid.
    pub coordinates: Vec<usize>,
}

/// A joined forward pass. `k` is `k_best`; slots without an answer are zero and masked out.
#[derive(Clone, Debug)]
pub struct Gather {
    /// Per row up to k chosen experts, best first: their number may be smaller than k. An expert that took the place of
    /// one that failed stands where that one stood.
    pub chosen: Vec<Vec<Chosen>>,
    /// `rows × k`, C order: whether the slot's expert answered.
    pub mask: Vec<bool>,
    /// One tensor `[rows, k, …]` per flat output of the experts.
    pub outputs: Vec<HostTensor>,
    /// Calls that failed, with the expert asked.
    pub failures: Vec<(ExpertUid, RpcError)>,
}

/// A joined backward pass.
#[derive(Clone, Debug)]
pub struct BackwardGather {
    /// One gradient per flat input, summed over the experts that answered; missing answers count as zero.
    pub grad_inputs: Vec<HostTensor>,
    /// `rows × k`: whether the slot's expert answered.
    pub mask: Vec<bool>,
    /// Calls that failed, with the expert asked.
    pub failures: Vec<(ExpertUid, RpcError)>,
}

/// Why a mixture gave no result.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoeError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The prefix is no expert prefix.
    #[error(transparent)]
    Prefix(#[from] UidError),
    /// Rows with fewer answers than `k_min`.
    #[error("{} rows had fewer than {k_min} answers (first: row {}); {tried}", rows.len(), rows.first().copied().unwrap_or(0))]
    TooFewAnswers {
        /// The rows.
        rows: Vec<usize>,
        /// Answers that each needed.
        k_min: usize,
        /// What was tried and how it failed.
        tried: String,
    },
    /// Inputs that do not fit the experts' schema or the scores.
    #[error("{0}")]
    Invalid(String),
    /// The call as a whole failed.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// The search failed.
    #[error(transparent)]
    Dht(#[from] skep_dht::DhtError),
}

/// A mixture of experts over a grid: searches the k best experts of every row, calls each chosen expert once with all its
/// rows, joins the answers. Cheap to clone; calls from several threads at once are served concurrently.
///
/// The work runs on the client's system. Dropping the future of a call ends it there, with all that it had under way;
/// a training step that a server has begun is not undone.
#[derive(Clone)]
pub struct Mixture {
    hive: Arc<Hive>,
}

impl Mixture {
    /// Checks the configuration. Experts are looked for with each call.
    pub fn new(client: &Client, config: MoeConfig) -> Result<Self, MoeError> {
        Ok(Self { hive: Arc::new(Hive::new(client.clone(), config)?) })
    }

    /// Its configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.hive.config
    }

    /// The prefix of its experts.
    pub fn prefix(&self) -> &ExpertPrefix {
        &self.hive.grid.prefix
    }

    /// The client it was made with.
    pub fn client(&self) -> &Client {
        &self.hive.client
    }

    /// Fans the rows of `inputs` out by `scores` and joins the outputs. Ends by `forward_timeout`.
    ///
    /// Inputs are flat, in the experts' schema order; every first dimension is `scores.rows`.
    pub async fn forward(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
        let latest = self.latest(self.config().forward_timeout);
        self.on_system(latest, fan_out::forward(self.hive.clone(), inputs, scores)).await
    }

    /// Sends `grad_outputs` (`[rows, k, …]` per output) to the experts that answered in `gather`, which train, and joins
    /// their input gradients. Ends by `backward_timeout`.
    pub async fn backward(
        &self,
        gather: &Gather,
        inputs: Vec<HostTensor>,
        grad_outputs: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        let latest = self.latest(self.config().backward_timeout);
        self.on_system(latest, fan_out::backward(self.hive.clone(), gather, inputs, grad_outputs)?).await
    }

    /// Blocks for [`forward`](Self::forward); not from skep's own threads.
    pub fn forward_wait(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
        self.client()
            .wait(self.latest(self.config().forward_timeout), fan_out::forward(self.hive.clone(), inputs, scores))
    }

    /// Blocks for [`backward`](Self::backward); not from skep's own threads.
    pub fn backward_wait(
        &self,
        gather: &Gather,
        inputs: Vec<HostTensor>,
        grad_outputs: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        let backward = fan_out::backward(self.hive.clone(), gather, inputs, grad_outputs)?;
        self.client().wait(self.latest(self.config().backward_timeout), backward)
    }

    /// When a wait for a pass ends: after the pass, which joins at its timeout what it has by then.
    fn latest(&self, timeout: Duration) -> Deadline {
        self.client().deadline(timeout + JOINING)
    }

    /// Runs `work` on the system thread; the end of the returned future is the end of the work. So is `latest`.
    async fn on_system<R: Send + 'static>(
        &self,
        latest: Deadline,
        work: impl Future<Output = Result<R, MoeError>> + Send + 'static,
    ) -> Result<R, MoeError> {
        let (mut done, result) = oneshot::channel();
        let started = self.client().spawner.spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = done.closed() => return,
                outcome = work => outcome,
            };
            let _caller_left = done.send(outcome);
        });
        let asked = self.client().clock.now();
        match before(&*self.client().clock, latest, result).await {
            Ok(Ok(outcome)) if started => outcome,
            Ok(_) => Err(RpcError::Cancelled.into()),
            Err(_) => {
                let (peer, waited) = (self.client().transport.local_peer(), latest.moment() - asked);
                Err(RpcError::Deadline { peer, step: Step::Schedule, waited }.into())
            }
        }
    }
}
