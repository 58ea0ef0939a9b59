//! A behaviour that opens and accepts raw substreams under any name, hivemind's handler names included, and that houses
//! the links of skep's own wire ([`crate::native_link`]) in the tasks of their connections.
//!
//! Opens go from the caller straight to the task of a connection, many at once; the swarm's task is not involved.
//! Accepted substreams go to one function. None is dropped in silence: over the limit of a connection it is reset,
//! counted and logged.

mod handler;

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Stream,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent,
        ToSwarm,
    },
};
use skep_kernel::Moment;
use skep_rpc::Router;
use skep_wire::{Framing, Method};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use self::handler::Handler;
pub(crate) use self::handler::Purpose;
use crate::{
    busy_poll::BusyPoll,
    native_link::{self, Link, Native},
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

/// One of the substreams that we may have open on a connection.
pub(crate) struct OutboundSlot {
    permit: OwnedSemaphorePermit,
    opens: mpsc::Sender<Open>,
}

impl OutboundSlot {
    /// Opens a substream; dropping the future gives up.
    pub(crate) async fn open(self, purpose: Purpose) -> Result<Opened, OpenError> {
        let (reply, opened) = oneshot::channel();
        self.opens.send(Open { purpose, reply }).await.map_err(|_| OpenError::Closed)?;
        let stream = opened.await.map_err(|_| OpenError::Closed)??;
        Ok(Opened { stream, slot: self.permit })
    }
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
    purpose: Purpose,
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
    /// Opens a substream for one call to a connected peer.
    #[cfg(test)]
    pub(crate) async fn open(&self, peer: PeerId, method: Method, framing: Framing) -> Result<Opened, OpenError> {
        self.slot(peer).await?.open(Purpose::Call(method, framing)).await
    }

    /// Waits until one more substream may be opened to a connected peer, as long as the caller does.
    pub(crate) async fn slot(&self, peer: PeerId) -> Result<OutboundSlot, OpenError> {
        let Connection { slots, opens, .. } = self.best(peer).ok_or(OpenError::NotConnected)?;
        let permit = slots.acquire_owned().await.map_err(|_| OpenError::Closed)?;
        Ok(OutboundSlot { permit, opens })
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

    /// Peers that are connected, in the order of their ids.
    pub(crate) fn peers(&self) -> Vec<PeerId> {
        let mut peers: Vec<PeerId> = self.read().keys().copied().collect();
        peers.sort_unstable();
        peers
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

/// What every connection's handler shares.
pub(crate) struct Shared {
    pub(crate) connections: Arc<Connections>,
    /// Handlers are offered while the router has a route for them.
    pub(crate) router: Option<Router>,
    pub(crate) max_inbound_streams: usize,
    pub(crate) negotiation_timeout: Duration,
    pub(crate) accept: Box<dyn Fn(Accepted) + Send + Sync>,
    /// Told of each turn of a connection's task.
    pub(crate) busy_poll: Arc<BusyPoll>,
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
        let (handler, connection) = Handler::new(self.shared.clone(), id, peer, relayed);
        self.pending.insert(id, connection);
        handler
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
