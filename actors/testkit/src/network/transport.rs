//! [`SimTransport`]: one peer's end of a simulated network.

use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use multiaddr::{Multiaddr, Protocol};
use skep_kernel::{Moment, time::before};
use skep_rpc::{Answer, Bans, Call, RpcError, Step, Transport};
use skep_wire::Method;

use super::{CallUnderWay, SimNetwork};
use crate::trace::Happening;

/// One peer's end of a [`SimNetwork`].
///
/// ```
/// use std::time::Duration;
/// use skep_kernel::Deadline;
/// use skep_rpc::{Body, Call, Meta, RequestId, Router, RpcError, Transport};
/// use skep_testkit::{Sim, SimTransport};
/// use skep_wire::Method;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let (deaf, client): (SimTransport, SimTransport) = (sim.network().node(Router::new()), sim.network().client());
///     let deadline = Deadline::after(sim.now(), Duration::from_secs(1));
///     let meta = Meta { deadline, request_id: RequestId(1), trace: None };
///     let call = Call { peer: deaf.local_peer(), method: Method::Ping, body: Body::Message("hi".into()), meta };
///     assert!(matches!(client.call(call).await, Err(RpcError::Refused { .. })), "nothing is routed there");
/// });
/// ```
#[derive(Clone)]
pub struct SimTransport {
    network: SimNetwork,
    peer: PeerId,
    bans: Bans,
}

/// Counts a call as long as it lives.
struct UnderWay {
    network: SimNetwork,
    id: u64,
    caller: u32,
    callee: u32,
    method: Method,
    how: &'static str,
}

impl UnderWay {
    fn begin(network: &SimNetwork, from: PeerId, call: &Call, since: Moment) -> Self {
        let (to, method) = (call.peer, call.method);
        let (id, caller, callee) = {
            let state = &mut *network.state();
            state.next_call += 1;
            state.calls.insert(state.next_call, CallUnderWay { from, to, method, since });
            let number = |peer| state.nodes.get(peer).map_or(0, |node| node.number);
            (state.next_call, number(&from), number(&to))
        };
        network.trace.add(since, caller, Happening::Called { to: callee, method });
        Self { network: network.clone(), id, caller, callee, method, how: "the caller left" }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.network.state().calls.remove(&self.id);
        let ended = Happening::Ended { to: self.callee, method: self.method, how: self.how };
        self.network.trace.add(self.network.clock.now(), self.caller, ended);
    }
}

impl SimTransport {
    pub(super) fn new(network: SimNetwork, peer: PeerId) -> Self {
        Self { network, peer, bans: Bans::new() }
    }

    /// The same end without memories.
    pub(crate) fn afresh(&self) -> Self {
        Self::new(self.network.clone(), self.peer)
    }

    /// Peers whose calls failed lately.
    pub fn bans(&self) -> &Bans {
        &self.bans
    }
}

impl Transport for SimTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let (network, from, bans) = (self.network.clone(), self.peer, self.bans.clone());
        Box::pin(async move {
            let (clock, peer, deadline) = (network.clock.clone(), call.peer, call.meta.deadline);
            let method = call.method;
            let started = clock.now();
            let mut under_way = UnderWay::begin(&network, from, &call, started);
            let exchange = network.exchange(from, call);
            let late = |_| {
                let waited = deadline.moment().since(started);
                RpcError::Deadline { peer, step: Step::Exchange, waited }
            };
            let outcome = before(&*clock, deadline, exchange).await.map_err(late).flatten();
            under_way.how = how(&outcome);
            bans.note(clock.now(), peer, method, outcome.as_ref().err());
            outcome
        })
    }

    fn local_peer(&self) -> PeerId {
        self.peer
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        let state = self.network.state();
        let node = &state.nodes[&self.peer];
        if node.is_client {
            return Vec::new();
        }
        let port = u64::from(node.number);
        vec![Multiaddr::empty().with(Protocol::Memory(port)).with(Protocol::P2p(self.peer))]
    }

    fn add_addresses(&self, _peer: PeerId, _addresses: Vec<Multiaddr>) {}
}

/// An outcome in a word.
fn how(outcome: &Result<Answer, RpcError>) -> &'static str {
    match outcome {
        Ok(_) => "answered",
        Err(RpcError::Unreachable { .. }) => "unreachable",
        Err(RpcError::Refused { .. }) => "refused",
        Err(RpcError::Overloaded { .. }) => "overloaded",
        Err(RpcError::Deadline { .. }) => "deadline",
        Err(RpcError::Remote { .. }) => "remote error",
        Err(RpcError::AlreadyApplied) => "already applied",
        Err(RpcError::Poisoned) => "poisoned",
        Err(RpcError::TooLarge { .. }) => "too large",
        Err(_) => "failed",
    }
}
