//! The port through which calls leave.

use std::sync::Arc;

use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use multiaddr::Multiaddr;

use crate::{Answer, Call, RpcError};

/// Carries calls to other peers: `skep-net` over libp2p, the test harness over simulated links.
pub trait Transport: Send + Sync {
    /// Makes one call. Ends by `call.meta.deadline`; dropping the future cancels the call at the peer where the wire
    /// can say so.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>>;

    /// Our own peer id.
    fn local_peer(&self) -> PeerId;

    /// Addresses at which others reach us, each ending in `/p2p/<peer>`; empty for a node that only asks.
    fn addresses(&self) -> Vec<Multiaddr>;

    /// Remembers where a peer can be reached. Addresses of other peers inside them are ignored.
    fn add_addresses(&self, peer: PeerId, addresses: Vec<Multiaddr>);
}

/// A transport that the parts of one runtime share.
pub type SharedTransport = Arc<dyn Transport>;
