//! [`RemoteExpert`]: one expert of another process, over host tensors.

use libp2p_identity::PeerId;
use skep_kernel::Deadline;
use skep_rpc::RpcError;
use skep_wire::{ExpertInfo, ExpertUid, HostTensor};
use std::sync::Arc;

use crate::Client;

/// An expert at a known peer, with its schema. Cheap to clone.
///
/// Inputs are flat, in schema order; every tensor's first dimension is the batch. Larger batches than
/// `limits::MAX_CALL_ROWS` rows are cut into several calls. Futures end by their deadline; dropping one cancels the call.
#[derive(Clone)]
pub struct RemoteExpert {}

impl RemoteExpert {
    /// Finds the peer that hosts `uid` and fetches the schema. `None` when nobody has announced it.
    pub async fn find(_client: &Client, _uid: &ExpertUid, _deadline: Deadline) -> Result<Option<Self>, RpcError> {
        unimplemented!()
    }

    /// An expert whose peer is known; the schema is fetched.
    pub async fn at(_client: &Client, _uid: ExpertUid, _peer: PeerId, _deadline: Deadline) -> Result<Self, RpcError> {
        unimplemented!()
    }

    /// Its name.
    pub fn uid(&self) -> &ExpertUid {
        unimplemented!()
    }

    /// Who hosts it.
    pub fn peer(&self) -> PeerId {
        unimplemented!()
    }

    /// Its schema.
    pub fn info(&self) -> &Arc<ExpertInfo> {
        unimplemented!()
    }

    /// The client it was made with.
    pub fn client(&self) -> &Client {
        unimplemented!()
    }

    /// Outputs for these inputs, one per flat output of the schema.
    pub async fn forward(&self, _inputs: Vec<HostTensor>, _deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        unimplemented!()
    }

    /// Trains the expert on these output gradients and returns one gradient per flat input.
    pub async fn backward(
        &self,
        _inputs: Vec<HostTensor>,
        _grad_outputs: Vec<HostTensor>,
        _deadline: Deadline,
    ) -> Result<Vec<HostTensor>, RpcError> {
        unimplemented!()
    }
}
