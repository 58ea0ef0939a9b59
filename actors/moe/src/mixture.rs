//! [`Mixture`]: a batch fanned out to the k best experts per row and joined again, over host tensors.

use std::time::Duration;

use libp2p_identity::PeerId;
use serde::{Deserialize, Serialize};
use skep_rpc::RpcError;
use skep_wire::{ExpertPrefix, ExpertUid, HostTensor, UidError};

use crate::Client;

/// How a mixture searches, waits and fails. Names are hivemind's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Beginning of the experts' uids, as in `expert.`.
    pub uid_prefix: String,
    /// Sizes of the grid's dimensions.
    pub grid_size: Vec<usize>,
    /// Experts asked per row.
    pub k_best: usize,
    /// Answers that each row needs in forward.
    pub k_min: usize,
    /// Answers that the batch needs in backward, per row that had any.
    pub backward_k_min: usize,
    /// Longest wait for forward, search included.
    pub forward_timeout: Duration,
    /// Longest wait for backward.
    pub backward_timeout: Duration,
    /// Longest wait once every row has `k_min` answers; `None` waits for the timeout.
    pub timeout_after_k_min: Option<Duration>,
    /// Rows short of `k_min` become zero rows instead of an error.
    pub allow_zero_outputs: bool,
    /// Refuse inputs and gradients that are not finite, and count answers that are not as failures.
    pub detect_anomalies: bool,
}

impl MoeConfig {
    /// The grid `prefix` × `grid_size` with the defaults: k_best 4, k_min 1, 30 s.
    pub fn grid(prefix: &str, grid_size: impl Into<Vec<usize>>) -> Self {
        Self {
            uid_prefix: prefix.to_owned(),
            grid_size: grid_size.into(),
            k_best: 4,
            k_min: 1,
            backward_k_min: 1,
            forward_timeout: Duration::from_secs(30),
            backward_timeout: Duration::from_secs(30),
            timeout_after_k_min: None,
            allow_zero_outputs: false,
            detect_anomalies: false,
        }
    }

    /// Sets [`k_best`](Self::k_best).
    pub fn k_best(mut self, k: usize) -> Self {
        self.k_best = k;
        self
    }

    /// Sets [`k_min`](Self::k_min).
    pub fn k_min(mut self, k: usize) -> Self {
        self.k_min = k;
        self
    }

    /// Sets [`backward_k_min`](Self::backward_k_min).
    pub fn backward_k_min(mut self, k: usize) -> Self {
        self.backward_k_min = k;
        self
    }

    /// Sets [`forward_timeout`](Self::forward_timeout).
    pub fn forward_timeout(mut self, wait: Duration) -> Self {
        self.forward_timeout = wait;
        self
    }

    /// Sets [`backward_timeout`](Self::backward_timeout).
    pub fn backward_timeout(mut self, wait: Duration) -> Self {
        self.backward_timeout = wait;
        self
    }

    /// Sets [`timeout_after_k_min`](Self::timeout_after_k_min).
    pub fn timeout_after_k_min(mut self, wait: Duration) -> Self {
        self.timeout_after_k_min = Some(wait);
        self
    }

    /// Sets [`allow_zero_outputs`](Self::allow_zero_outputs).
    pub fn allow_zero_outputs(mut self, allow: bool) -> Self {
        self.allow_zero_outputs = allow;
        self
    }
}

/// Scores of a gate: one matrix `[rows, size]` per grid dimension, C order.
#[derive(Clone, Debug, PartialEq)]
pub struct GridScores {
    /// Rows of the batch.
    pub rows: usize,
    /// Per dimension its size and `rows × size` scores.
    pub dimensions: Vec<(usize, Vec<f32>)>,
}

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
    /// Per row up to k chosen experts, best first: their number may be smaller than k.
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
#[derive(Clone)]
pub struct Mixture {}

impl Mixture {
    /// Checks the configuration and starts the mixture's actor on the client's system.
    pub fn new(_client: &Client, _config: MoeConfig) -> Result<Self, MoeError> {
        unimplemented!()
    }

    /// Its configuration.
    pub fn config(&self) -> &MoeConfig {
        unimplemented!()
    }

    /// The prefix of its experts.
    pub fn prefix(&self) -> &ExpertPrefix {
        unimplemented!()
    }

    /// The client it was made with.
    pub fn client(&self) -> &Client {
        unimplemented!()
    }

    /// Fans the rows of `inputs` out by `scores` and joins the outputs. Ends by `forward_timeout`.
    pub async fn forward(&self, _inputs: Vec<HostTensor>, _scores: GridScores) -> Result<Gather, MoeError> {
        unimplemented!()
    }

    /// Sends `grad_outputs` (`[rows, k, …]` per output) to the experts that answered in `gather`, which train, and joins
    /// their input gradients. Ends by `backward_timeout`.
    pub async fn backward(
        &self,
        _gather: &Gather,
        _inputs: Vec<HostTensor>,
        _grad_outputs: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        unimplemented!()
    }

    /// Blocks for [`forward`](Self::forward); not from skep's own threads.
    pub fn forward_wait(&self, _inputs: Vec<HostTensor>, _scores: GridScores) -> Result<Gather, MoeError> {
        unimplemented!()
    }

    /// Blocks for [`backward`](Self::backward); not from skep's own threads.
    pub fn backward_wait(
        &self,
        _gather: &Gather,
        _inputs: Vec<HostTensor>,
        _grad_outputs: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        unimplemented!()
    }
}
