//! [`RemoteExpert`]: one expert of another process, over host tensors.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use libp2p_identity::PeerId;
use skep_dht::Freshness;
use skep_kernel::Deadline;
use skep_rpc::RpcError;
use skep_wire::{ExpertInfo, ExpertUid, HostTensor, TensorError, limits::MAX_CALL_ROWS};

use crate::{
    Client,
    expert_call::{ExpertCall, fetch_info},
};

/// Forward calls of one batch that are under way at once. Backward calls follow each other: each is a training step.
const FORWARD_CALLS: usize = 4;

/// An expert at a known peer, with its schema. Cheap to clone.
///
/// Inputs are flat, in schema order; every tensor's first dimension is the batch. Larger batches than
/// `limits::MAX_CALL_ROWS` rows are cut into several calls. Futures end by their deadline; dropping one cancels the call.
/// They need a tokio runtime around them; the blocking twins (`…_wait`) need none.
#[derive(Clone)]
pub struct RemoteExpert {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    uid: ExpertUid,
    peer: PeerId,
    info: Arc<ExpertInfo>,
}

impl RemoteExpert {
    /// Finds the peer that hosts `uid` and fetches the schema. `None` when nobody has announced it.
    pub async fn find(client: &Client, uid: &ExpertUid, deadline: Deadline) -> Result<Option<Self>, RpcError> {
        let started = client.clock.now();
        let hosted = client.dht.find_experts(vec![uid.clone()], Freshness::Valid, deadline).await;
        let hosted = hosted.map_err(|error| client.search_failed(error, client.clock.now() - started))?;
        match hosted.into_iter().next().flatten() {
            Some(hosted) => Self::at(client, uid.clone(), hosted.value, deadline).await.map(Some),
            None => Ok(None),
        }
    }

    /// An expert whose peer is known; the schema is fetched.
    pub async fn at(client: &Client, uid: ExpertUid, peer: PeerId, deadline: Deadline) -> Result<Self, RpcError> {
        let info = Arc::new(fetch_info(client, &uid, peer, deadline).await?);
        Ok(Self { inner: Arc::new(Inner { client: client.clone(), uid, peer, info }) })
    }

    /// Blocks for [`find`](Self::find); not from skep's own threads.
    pub fn find_wait(client: &Client, uid: &ExpertUid, deadline: Deadline) -> Result<Option<Self>, RpcError> {
        let (owned, uid) = (client.clone(), uid.clone());
        client.wait(deadline, async move { Self::find(&owned, &uid, deadline).await })
    }

    /// Its name.
    pub fn uid(&self) -> &ExpertUid {
        &self.inner.uid
    }

    /// Who hosts it.
    pub fn peer(&self) -> PeerId {
        self.inner.peer
    }

    /// Its schema.
    pub fn info(&self) -> &Arc<ExpertInfo> {
        &self.inner.info
    }

    /// The client it was made with.
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// Outputs for these inputs, one per flat output of the schema.
    ///
    /// # Errors
    /// [`RpcError::Invalid`] when number or rows of the inputs do not fit; the expert's own words as
    /// [`RpcError::Remote`] when it refuses shapes or dtypes.
    pub async fn forward(&self, inputs: Vec<HostTensor>, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        self.in_pieces(inputs, None, deadline, FORWARD_CALLS).await
    }

    /// Trains the expert on these output gradients and returns one gradient per flat input.
    ///
    /// Of a batch in several calls, those that were made before one failed have trained. Dropping the future does not
    /// undo a step that the server has begun.
    pub async fn backward(
        &self,
        inputs: Vec<HostTensor>,
        grad_outputs: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Result<Vec<HostTensor>, RpcError> {
        self.in_pieces(inputs, Some(grad_outputs), deadline, 1).await
    }

    /// Blocks for [`forward`](Self::forward); not from skep's own threads.
    pub fn forward_wait(&self, inputs: Vec<HostTensor>, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let this = self.clone();
        self.client().wait(deadline, async move { this.forward(inputs, deadline).await })
    }

    /// Blocks for [`backward`](Self::backward); not from skep's own threads.
    pub fn backward_wait(
        &self,
        inputs: Vec<HostTensor>,
        grad_outputs: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Result<Vec<HostTensor>, RpcError> {
        let this = self.clone();
        self.client().wait(deadline, async move { this.backward(inputs, grad_outputs, deadline).await })
    }

    async fn in_pieces(
        &self,
        inputs: Vec<HostTensor>,
        grad_outputs: Option<Vec<HostTensor>>,
        deadline: Deadline,
        at_once: usize,
    ) -> Result<Vec<HostTensor>, RpcError> {
        let rows = inputs.first().map_or(0, HostTensor::rows);
        let gradients = grad_outputs.as_deref().unwrap_or_default();
        if rows <= MAX_CALL_ROWS || inputs.iter().chain(gradients).any(|tensor| tensor.rows() != rows) {
            return self.call(inputs, grad_outputs).send(self.client(), deadline).await;
        }
        let mut calls = Vec::new();
        for start in (0..rows).step_by(MAX_CALL_ROWS) {
            let piece = start..rows.min(start + MAX_CALL_ROWS);
            let inputs = slice(&inputs, piece.clone())?;
            let gradients = grad_outputs.as_deref().map(|gradients| slice(gradients, piece)).transpose()?;
            calls.push(self.call(inputs, gradients));
        }
        let answers: Vec<Vec<HostTensor>> =
            stream::iter(calls).map(|call| call.send(self.client(), deadline)).buffered(at_once).try_collect().await?;
        self.join(answers)
    }

    fn call(&self, inputs: Vec<HostTensor>, grad_outputs: Option<Vec<HostTensor>>) -> ExpertCall {
        let Inner { uid, peer, info, .. } = &*self.inner;
        let (uid, peer, info) = (uid.clone(), *peer, info.clone());
        ExpertCall { uid, peer, info, inputs, grad_outputs, must_be_finite: false }
    }

    fn join(&self, answers: Vec<Vec<HostTensor>>) -> Result<Vec<HostTensor>, RpcError> {
        let width = answers.first().map_or(0, Vec::len);
        let columns = (0..width).map(|index| {
            let column: Vec<HostTensor> = answers.iter().map(|answer| answer[index].clone()).collect();
            HostTensor::concat_rows(&column)
        });
        let joined: Result<_, TensorError> = columns.collect();
        joined.map_err(|error| RpcError::Malformed { peer: self.peer(), reason: error.to_string() })
    }
}

fn slice(tensors: &[HostTensor], rows: std::ops::Range<usize>) -> Result<Vec<HostTensor>, RpcError> {
    let pieces = tensors.iter().map(|tensor| tensor.slice_rows(rows.start, rows.end));
    pieces.collect::<Result<_, _>>().map_err(|error| RpcError::Invalid { reason: error.to_string() })
}
