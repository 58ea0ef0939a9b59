//! A behaviour that opens and accepts raw substreams under any name, hivemind's handler names included.
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
        handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound},
    },
};
use skep_rpc::Router;
use skep_wire::{Framing, Method};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use crate::slashless::PREFIX;

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

    /// The newest direct connection, or the newest relayed one: after a crash of the peer the older one is the dead one.
    fn best(&self, peer: PeerId) -> Option<Connection> {
        let by_peer = self.read();
        let connections = by_peer.get(&peer)?;
        connections.iter().rev().find(|c| !c.relayed).or(connections.last()).cloned()
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

/// Negotiates one of several handlers; the result is the raw substream.
pub(crate) struct Handlers(Vec<(StreamProtocol, Method, Framing)>);

impl UpgradeInfo for Handlers {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>().into_iter()
    }
}

impl InboundUpgrade<Stream> for Handlers {
    type Output = (Stream, Method, Framing);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, name: StreamProtocol) -> Self::Future {
        let (_, method, framing) =
            self.0.into_iter().find(|(n, ..)| *n == name).expect("only offered names are agreed");
        ready(Ok((stream, method, framing)))
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
        self.pending.insert(id, Connection { id, relayed, opens, slots });
        Handler { peer, shared: self.shared.clone(), requests, inbound: Arc::default() }
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
}

impl Handler {
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

/// The way back for one open, and the name it asked for.
pub(crate) struct Asked {
    name: &'static str,
    reply: oneshot::Sender<Result<Stream, OpenError>>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Handlers;
    type OutboundProtocol = Handlers;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Asked;

    fn listen_protocol(&self) -> SubstreamProtocol<Handlers> {
        let methods = self.shared.router.as_ref().map(Router::methods).unwrap_or_default();
        let forms = methods.into_iter().flat_map(|method| [(method, Framing::Unary), (method, Framing::Stream)]);
        let served = forms.filter_map(|(method, framing)| Some((protocol(method, framing)?, method, framing)));
        SubstreamProtocol::new(Handlers(served.collect()), ()).with_timeout(self.shared.negotiation_timeout)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Handlers, Asked, Infallible>> {
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
            let upgrade = Handlers(vec![(protocol, method, framing)]);
            let protocol = SubstreamProtocol::new(upgrade, Asked { name, reply });
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: protocol.with_timeout(self.shared.negotiation_timeout),
            });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Handlers, Handlers, (), Asked>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => {
                let (stream, method, framing) = protocol;
                self.accept(stream, method, framing);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info }) => {
                // A caller who left drops the stream, which resets it.
                let _caller_left = info.reply.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                let error = match error {
                    StreamUpgradeError::Timeout => OpenError::Timeout,
                    StreamUpgradeError::NegotiationFailed => OpenError::Unsupported(info.name),
                    StreamUpgradeError::Io(error) => OpenError::Io(error),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                let _caller_left = info.reply.send(Err(error));
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
