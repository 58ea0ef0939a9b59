//! A behaviour that opens and accepts raw substreams under any name, hivemind's handler names included, and that houses
//! the links of skep's own wire ([`crate::native_link`]) in the tasks of their connections.
//!
//! Opens go from the caller straight to the task of a connection, many at once; the swarm's task is not involved.
//! Accepted substreams go to one function. None is dropped in silence: over the limit of a connection it is reset,
//! counted and logged.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::{Ready, ready},
    io,
    sync::{
        Arc, OnceLock, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::{
        Endpoint,
        transport::PortUse,
        upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo},
    },
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
        StreamUpgradeError, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound, ProtocolsChange,
        },
    },
};
use skep_kernel::Moment;
use skep_rpc::Router;
use skep_wire::{Framing, Method, frame::native::Lane};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tracing::{debug, warn};

use crate::{
    native_link::{self, Caller, Link, NATIVE, Native, Servant},
    slashless::PREFIX,
};

/// Substreams that we open on one connection at once. Far below yamux's limit, at which a connection ends, and equal to
/// the number of unanswered opens that yamux allows.
pub(crate) const MAX_OUTBOUND: usize = 256;

/// Why no substream came about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("not connected")]
    NotConnected,
    #[error("the connection closed")]
    Closed,
    #[error("the peer does not serve {0}")]
    Unsupported(&'static str),
    #[error("negotiating the protocol took too long")]
    Timeout,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A substream that we opened. Dropping it unclosed resets it; its slot on the connection is free again then.
pub(crate) struct Opened {
    pub(crate) stream: Stream,
    pub(crate) slot: OwnedSemaphorePermit,
}

/// A substream that a peer opened.
pub(crate) struct Accepted {
    pub(crate) peer: PeerId,
    pub(crate) method: Method,
    pub(crate) framing: Framing,
    pub(crate) stream: Stream,
    pub(crate) slot: InboundSlot,
}

/// One of the inbound substreams that a connection may carry.
pub(crate) struct InboundSlot(Arc<AtomicUsize>);

impl InboundSlot {
    fn take(open: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let slot = InboundSlot(open.clone());
        // A failed taker gives its count back by dropping the slot.
        (open.fetch_add(1, Ordering::Relaxed) < limit).then_some(slot)
    }
}

impl Drop for InboundSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Open {
    method: Method,
    framing: Framing,
    reply: oneshot::Sender<Result<Stream, OpenError>>,
}

/// What is known of one live connection.
#[derive(Clone)]
struct Connection {
    id: ConnectionId,
    relayed: bool,
    opens: mpsc::Sender<Open>,
    slots: Arc<Semaphore>,
    /// What is known of the native wire, and since when the connection is there. `None` when we do not speak it.
    native: Option<(watch::Receiver<Native>, Moment)>,
}

/// The live connections by peer, shared by callers and the swarm.
#[derive(Default)]
pub(crate) struct Connections {
    by_peer: RwLock<HashMap<PeerId, Vec<Connection>>>,
    refused_streams: AtomicU64,
}

impl Connections {
    /// Opens a substream to a connected peer. Waits for a slot as long as the caller does; dropping the future gives up.
    pub(crate) async fn open(&self, peer: PeerId, method: Method, framing: Framing) -> Result<Opened, OpenError> {
        let connection = self.best(peer).ok_or(OpenError::NotConnected)?;
        let slot = connection.slots.acquire_owned().await.map_err(|_| OpenError::Closed)?;
        let (reply, opened) = oneshot::channel();
        let open = Open { method, framing, reply };
        connection.opens.send(open).await.map_err(|_| OpenError::Closed)?;
        let stream = opened.await.map_err(|_| OpenError::Closed)??;
        Ok(Opened { stream, slot })
    }

    /// What is known of the native wire on the best connection, to be watched, and since when that connection is there.
    pub(crate) fn native(&self, peer: PeerId) -> Option<(watch::Receiver<Native>, Moment)> {
        self.best(peer)?.native
    }

    /// The link to a peer, if calls may be made on it now.
    pub(crate) fn link(&self, peer: PeerId) -> Option<Arc<Link>> {
        let by_peer = self.read();
        match &*best_of(by_peer.get(&peer)?)?.native.as_ref()?.0.borrow() {
            Native::Ready(link) => Some(link.clone()),
            Native::Unknown | Native::Absent | Native::Opening => None,
        }
    }

    /// Connections, and substreams that we have open on them.
    pub(crate) fn count(&self) -> (usize, usize) {
        let by_peer = self.read();
        let connections = by_peer.values().flatten();
        connections.fold((0, 0), |(n, streams), c| (n + 1, streams + MAX_OUTBOUND - c.slots.available_permits()))
    }

    /// Inbound substreams reset because a connection carried too many.
    pub(crate) fn refused_streams(&self) -> u64 {
        self.refused_streams.load(Ordering::Relaxed)
    }

    fn best(&self, peer: PeerId) -> Option<Connection> {
        best_of(self.read().get(&peer)?).cloned()
    }

    fn add(&self, peer: PeerId, connection: Connection) {
        self.by_peer.write().expect(UNPOISONED).entry(peer).or_default().push(connection);
    }

    fn remove(&self, peer: PeerId, id: ConnectionId) {
        let mut by_peer = self.by_peer.write().expect(UNPOISONED);
        let Some(connections) = by_peer.get_mut(&peer) else { return };
        for gone in connections.extract_if(.., |c| c.id == id) {
            // Callers that wait for a slot learn that the connection is gone.
            gone.slots.close();
        }
        if connections.is_empty() {
            by_peer.remove(&peer);
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<PeerId, Vec<Connection>>> {
        self.by_peer.read().expect(UNPOISONED)
    }
}

const UNPOISONED: &str = "no panic while connections are held";

/// The newest direct connection, or the newest relayed one: after a crash of the peer the older one is the dead one.
fn best_of(connections: &[Connection]) -> Option<&Connection> {
    connections.iter().rev().find(|c| !c.relayed).or(connections.last())
}

/// What a substream is for.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// One call on hivemind's wire.
    Call(Method, Framing),
    /// Many on ours.
    Native,
}

/// The name under which our side of a substream negotiates a handler (see [`crate::slashless`]).
fn protocol(method: Method, framing: Framing) -> Option<StreamProtocol> {
    type Named = ((Method, Framing), StreamProtocol);
    static NAMES: OnceLock<Vec<Named>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let unary = Method::ALL.map(|method| (method, Framing::Unary, Some(method.unary_name())));
        let stream = Method::ALL.map(|method| (method, Framing::Stream, method.stream_name()));
        let named = unary.into_iter().chain(stream).filter_map(|(method, framing, name)| {
            let name = StreamProtocol::try_from_owned(format!("{PREFIX}{}", name?)).expect("the prefix has a slash");
            Some(((method, framing), name))
        });
        named.collect()
    });
    names.iter().find(|(key, _)| *key == (method, framing)).map(|(_, name)| name.clone())
}

/// Negotiates one of several names; the result is the raw substream.
pub(crate) struct Handlers(Arc<[(StreamProtocol, Purpose)]>);

impl UpgradeInfo for Handlers {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>().into_iter()
    }
}

impl InboundUpgrade<Stream> for Handlers {
    type Output = (Stream, Purpose);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, name: StreamProtocol) -> Self::Future {
        let (_, purpose) = self.0.iter().find(|(n, _)| *n == name).expect("only offered names are agreed");
        ready(Ok((stream, *purpose)))
    }
}

impl OutboundUpgrade<Stream> for Handlers {
    type Output = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_outbound(self, stream: Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

/// What every connection's handler shares.
pub(crate) struct Shared {
    pub(crate) connections: Arc<Connections>,
    /// Handlers are offered while the router has a route for them.
    pub(crate) router: Option<Router>,
    pub(crate) max_inbound_streams: usize,
    pub(crate) negotiation_timeout: Duration,
    pub(crate) accept: Box<dyn Fn(Accepted) + Send + Sync>,
    /// What links need; `None` when we do not speak the native wire.
    pub(crate) native: Option<Arc<native_link::Context>>,
}

/// The behaviour.
pub(crate) struct Behaviour {
    shared: Arc<Shared>,
    pending: HashMap<ConnectionId, Connection>,
}

impl Behaviour {
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared: Arc::new(shared), pending: HashMap::new() }
    }

    fn handler(&mut self, id: ConnectionId, peer: PeerId, relayed: bool) -> Handler {
        let (opens, requests) = mpsc::channel(MAX_OUTBOUND);
        let slots = Arc::new(Semaphore::new(MAX_OUTBOUND));
        let (caller, native) = match &self.shared.native {
            Some(node) => {
                let (state, native) = watch::channel(Native::Unknown);
                (Some(Caller::new(node.clone(), peer, state)), Some((native, node.server.clock.now())))
            }
            None => (None, None),
        };
        let servant = self.shared.native.iter().find(|node| node.serves).map(|node| Servant::new(node.clone(), peer));
        self.pending.insert(id, Connection { id, relayed, opens, slots, native });
        let shared = self.shared.clone();
        Handler { peer, shared, requests, inbound: Arc::default(), offered: None, caller, servant }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(id, peer, is_relayed(local)))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(id, peer, is_relayed(remote)))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionEstablished(established) => {
                if let Some(connection) = self.pending.remove(&established.connection_id) {
                    self.shared.connections.add(established.peer_id, connection);
                }
            }
            FromSwarm::ConnectionClosed(closed) => {
                self.shared.connections.remove(closed.peer_id, closed.connection_id);
            }
            // Another behaviour refused the connection after this one made a handler for it.
            FromSwarm::DialFailure(failure) => drop(self.pending.remove(&failure.connection_id)),
            FromSwarm::ListenFailure(failure) => drop(self.pending.remove(&failure.connection_id)),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == multiaddr::Protocol::P2pCircuit)
}

/// Opens and accepts the substreams of one connection.
pub(crate) struct Handler {
    peer: PeerId,
    shared: Arc<Shared>,
    requests: mpsc::Receiver<Open>,
    inbound: Arc<AtomicUsize>,
    /// What we offer, and the version of the routes from which that follows.
    offered: Option<(u64, Arc<[(StreamProtocol, Purpose)]>)>,
    caller: Option<Caller>,
    servant: Option<Servant>,
}

impl Handler {
    /// hivemind's names of all methods that have a route, and our wire if one of them travels on it.
    fn offer(&self) -> Arc<[(StreamProtocol, Purpose)]> {
        let methods = self.shared.router.as_ref().map(Router::methods).unwrap_or_default();
        let is_native = self.servant.is_some() && methods.iter().any(|method| method.is_native());
        let forms = methods.into_iter().flat_map(|method| [(method, Framing::Unary), (method, Framing::Stream)]);
        let calls =
            forms.filter_map(|(method, framing)| Some((protocol(method, framing)?, Purpose::Call(method, framing))));
        calls.chain(is_native.then_some((NATIVE, Purpose::Native))).collect()
    }

    fn ask(
        &self,
        protocol: StreamProtocol,
        purpose: Purpose,
        asked: Asked,
    ) -> Poll<ConnectionHandlerEvent<Handlers, Asked, Infallible>> {
        let upgrade = SubstreamProtocol::new(Handlers(Arc::new([(protocol, purpose)])), asked);
        let protocol = upgrade.with_timeout(self.shared.negotiation_timeout);
        Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
    }

    fn accept(&self, stream: Stream, method: Method, framing: Framing) {
        let (peer, limit) = (self.peer, self.shared.max_inbound_streams);
        match InboundSlot::take(&self.inbound, limit) {
            Some(slot) => (self.shared.accept)(Accepted { peer, method, framing, stream, slot }),
            None => {
                self.shared.connections.refused_streams.fetch_add(1, Ordering::Relaxed);
                warn!(%peer, %method, limit, "reset a stream: the peer has too many open on one connection");
            }
        }
    }
}

/// Who asked for a substream.
pub(crate) enum Asked {
    /// A caller: the way back, and the name it asked for.
    Call { name: &'static str, reply: oneshot::Sender<Result<Stream, OpenError>> },
    /// The link.
    Native(Lane),
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Handlers;
    type OutboundProtocol = Handlers;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Asked;

    fn listen_protocol(&self) -> SubstreamProtocol<Handlers> {
        let offered = match &self.offered {
            Some((_, offered)) => offered.clone(),
            None => self.offer(),
        };
        SubstreamProtocol::new(Handlers(offered), ()).with_timeout(self.shared.negotiation_timeout)
    }

    fn connection_keep_alive(&self) -> bool {
        self.caller.as_ref().is_some_and(Caller::is_busy) || self.servant.as_ref().is_some_and(Servant::is_busy)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Handlers, Asked, Infallible>> {
        // The swarm asks what we offer each time it polls a connection, and the routes hardly ever change.
        let version = self.shared.router.as_ref().map_or(0, Router::version);
        if self.offered.as_ref().is_none_or(|(known, _)| *known != version) {
            self.offered = Some((version, self.offer()));
        }
        while let Poll::Ready(Some(open)) = self.requests.poll_recv(cx) {
            let Open { method, framing, reply } = open;
            let name = method_name(method, framing);
            let Some(protocol) = protocol(method, framing) else {
                let _caller_left = reply.send(Err(OpenError::Unsupported(name)));
                continue;
            };
            if reply.is_closed() {
                continue;
            }
            return self.ask(protocol, Purpose::Call(method, framing), Asked::Call { name, reply });
        }
        if let Some(servant) = &mut self.servant {
            servant.poll(cx);
        }
        if let Some(caller) = &mut self.caller
            && let Poll::Ready(lane) = caller.poll(cx)
        {
            return self.ask(NATIVE, Purpose::Native, Asked::Native(lane));
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Handlers, Handlers, (), Asked>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => match protocol {
                (stream, Purpose::Call(method, framing)) => self.accept(stream, method, framing),
                (stream, Purpose::Native) => {
                    if let Some(servant) = &mut self.servant {
                        servant.accept(stream);
                    }
                }
            },
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info }) => {
                match (info, &mut self.caller) {
                    (Asked::Call { reply, .. }, _) => {
                        // A caller who left drops the stream, which resets it.
                        let _caller_left = reply.send(Ok(stream));
                    }
                    (Asked::Native(lane), Some(caller)) => caller.opened(lane, stream),
                    (Asked::Native(_), None) => {}
                }
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => match (info, &mut self.caller) {
                (Asked::Call { name, reply }, _) => {
                    let error = match error {
                        StreamUpgradeError::Timeout => OpenError::Timeout,
                        StreamUpgradeError::NegotiationFailed => OpenError::Unsupported(name),
                        StreamUpgradeError::Io(error) => OpenError::Io(error),
                        StreamUpgradeError::Apply(never) => match never {},
                    };
                    let _caller_left = reply.send(Err(error));
                }
                (Asked::Native(_), Some(caller)) => caller.refused(&error.to_string()),
                (Asked::Native(_), None) => {}
            },
            ConnectionEvent::RemoteProtocolsChange(change) => {
                if let (ProtocolsChange::Added(added), Some(caller)) = (change, &mut self.caller) {
                    caller.identified(added.into_iter().any(|protocol| *protocol == NATIVE));
                }
            }
            ConnectionEvent::ListenUpgradeError(failed) => {
                debug!(peer = %self.peer, error = ?failed.error, "a stream of the peer found no protocol");
            }
            _ => {}
        }
    }
}

fn method_name(method: Method, framing: Framing) -> &'static str {
    match framing {
        Framing::Unary => method.unary_name(),
        Framing::Stream => method.stream_name().unwrap_or(method.unary_name()),
    }
}
