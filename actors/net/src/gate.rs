//! Who may be connected: an optional list of peers, a number of connections, and slots kept for peers of ours.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    convert::Infallible,
    task::{Context, Poll, Waker},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
        THandlerOutEvent, ToSwarm, dummy,
    },
};
use tracing::debug;

use crate::peers::SharedBook;

/// Connections to one peer: two simultaneous dials, and one that is dead but not yet noticed.
const MAX_PER_PEER: usize = 4;

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Denied {
    #[error("peer {0} is not among the peers allowed to connect")]
    NotAllowed(PeerId),
    #[error("{limit} connections are open, the limit")]
    Full { limit: usize },
    #[error("{limit} connections with peer {peer} are open, the limit")]
    PerPeer { peer: PeerId, limit: usize },
}

/// The behaviour that decides on connections.
pub(crate) struct Gate {
    allowed: Option<HashSet<PeerId>>,
    max_connections: usize,
    /// Connections that strangers may hold.
    max_strangers: usize,
    book: SharedBook,
    /// Ids grow, so the first is the oldest.
    open: BTreeMap<ConnectionId, PeerId>,
    closing: VecDeque<(ConnectionId, PeerId)>,
    waker: Option<Waker>,
}

impl Gate {
    pub(crate) fn new(allowed: Option<Vec<PeerId>>, max_connections: usize, reserved: usize, book: SharedBook) -> Self {
        Self {
            allowed: allowed.map(HashSet::from_iter),
            max_connections,
            max_strangers: max_connections.saturating_sub(reserved),
            book,
            open: BTreeMap::new(),
            closing: VecDeque::new(),
            waker: None,
        }
    }

    fn admit(&self, peer: PeerId) -> Result<(), Denied> {
        if self.allowed.as_ref().is_some_and(|allowed| !allowed.contains(&peer)) {
            return Err(Denied::NotAllowed(peer));
        }
        if self.open.len() >= self.max_connections {
            return Err(Denied::Full { limit: self.max_connections });
        }
        if self.open.values().filter(|open| **open == peer).count() >= MAX_PER_PEER {
            return Err(Denied::PerPeer { peer, limit: MAX_PER_PEER });
        }
        Ok(())
    }

    /// A new connection may turn out to be a peer of ours, so it gets in. When it is one too many, one goes of a peer that
    /// is not of ours: of one that said so itself, else the oldest.
    fn arrived(&mut self, id: ConnectionId, peer: PeerId) {
        self.open.insert(id, peer);
        let others = self.open.iter().filter(|(_, peer)| !self.book.is_ours(**peer));
        let others: Vec<(ConnectionId, PeerId)> = others.map(|(id, peer)| (*id, *peer)).collect();
        if others.len() <= self.max_strangers {
            return;
        }
        let earlier = || others.iter().filter(|(other, _)| *other != id);
        let victim = earlier().find(|(_, peer)| self.book.is_stranger(*peer)).or_else(|| earlier().next());
        let &(id, peer) = victim.unwrap_or(&others[0]);
        debug!(%peer, limit = self.max_strangers, "closing a connection of a peer that is not of ours");
        self.open.remove(&id);
        self.closing.push_back((id, peer));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.admit(peer).map(|()| dummy::ConnectionHandler).map_err(ConnectionDenied::new)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        peer.map_or(Ok(()), |peer| self.admit(peer)).map(|()| Vec::new()).map_err(ConnectionDenied::new)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.admit(peer).map(|()| dummy::ConnectionHandler).map_err(ConnectionDenied::new)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionEstablished(established) => {
                self.arrived(established.connection_id, established.peer_id);
            }
            FromSwarm::ConnectionClosed(closed) => drop(self.open.remove(&closed.connection_id)),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        match self.closing.pop_front() {
            Some((id, peer_id)) => {
                Poll::Ready(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::One(id) })
            }
            None => {
                self.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gate at which others may hold three connections.
    fn gate() -> (Gate, SharedBook) {
        let book = SharedBook::new(64);
        (Gate::new(None, 8, 5, book.clone()), book)
    }

    fn arrive(gate: &mut Gate, id: usize) -> PeerId {
        let peer = PeerId::random();
        gate.arrived(ConnectionId::new_unchecked(id), peer);
        peer
    }

    fn closed(gate: &mut Gate) -> Vec<PeerId> {
        gate.closing.drain(..).map(|(_, peer)| peer).collect()
    }

    #[test]
    fn who_is_not_of_ours_by_its_own_words_goes_before_those_who_have_said_nothing_yet() {
        let (mut gate, book) = gate();
        let peers: Vec<PeerId> = (0..3).map(|id| arrive(&mut gate, id)).collect();
        book.with(|book| book.foreign(peers[1], true));
        arrive(&mut gate, 3);
        assert_eq!(closed(&mut gate), [peers[1]]);
        arrive(&mut gate, 4);
        assert_eq!(closed(&mut gate), [peers[0]], "else the oldest goes");
    }

    #[test]
    fn a_newcomer_stays_however_full_of_strangers_the_place_is() {
        let (mut gate, book) = gate();
        for id in 0..20 {
            let newcomer = arrive(&mut gate, id);
            assert!(!closed(&mut gate).contains(&newcomer));
            book.with(|book| book.foreign(newcomer, true));
        }
        let ours = arrive(&mut gate, 20);
        closed(&mut gate);
        // It has not spoken yet; strangers that have said what they are go first, even younger ones.
        for id in 21..40 {
            let stranger = arrive(&mut gate, id);
            assert!(!closed(&mut gate).contains(&ours));
            book.with(|book| book.foreign(stranger, true));
        }
    }

    #[test]
    fn peers_of_ours_take_no_place_of_others_and_are_never_closed() {
        let (mut gate, book) = gate();
        let ours: Vec<PeerId> = (0..3).map(|id| arrive(&mut gate, id)).collect();
        for peer in &ours {
            book.with(|book| book.foreign(*peer, true));
            book.with(|book| book.vouch(*peer));
        }
        let others: Vec<PeerId> = (3..7).map(|id| arrive(&mut gate, id)).collect();
        assert_eq!(closed(&mut gate), [others[0]]);
    }
}
