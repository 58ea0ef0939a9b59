//! The address book: where peers listen, and which of them speak our protocols. No I/O, no clock.
//!
//! Only peers of ours enter libp2p's Kademlia table and take the connections kept for such: those given by name, those
//! that answered a call of ours, and those that had one of theirs answered. Neither what a peer says of itself by identify
//! nor a call that a service refuses is enough. So public IPFS nodes, which speak the same `/ipfs/kad/1.0.0`, never fill
//! either.
//!
//! That keeps away who does not speak our protocols, and nobody else: identities cost nothing, and whoever wants to can
//! make a call that is answered, as every client must. What such peers may take is bounded by the number of connections
//! in all and with one peer ([`crate::gate`]), of calls served at once, and by the list of allowed peers, if there is one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use libp2p_identity::PeerId;
use multiaddr::{Multiaddr, Protocol};
use tokio::sync::Notify;

/// Addresses remembered of one peer.
const MAX_ADDRESSES: usize = 16;

/// How a peer takes part in routing, as identify tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Routing {
    /// Identify has not run.
    #[default]
    Unknown,
    /// It answers Kademlia queries.
    Server,
    /// It does not.
    Client,
}

#[derive(Debug, Default)]
struct Known {
    addresses: Vec<Multiaddr>,
    ours: bool,
    named: bool,
    routing: Routing,
    /// By its own words it speaks none of our protocols.
    foreign: bool,
    heard: u64,
}

impl Known {
    /// A named peer may be asked before identify has run: queries start with it.
    fn is_routable(&self) -> bool {
        let routes = self.routing == Routing::Server || (self.routing == Routing::Unknown && self.named);
        self.ours && routes && !self.addresses.is_empty()
    }
}

/// What Kademlia's table should hold of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The peer at these addresses.
    Keep(Vec<Multiaddr>),
    /// Nothing.
    Drop,
}

/// The address book.
#[derive(Debug)]
pub(crate) struct AddressBook {
    max_peers: usize,
    peers: BTreeMap<PeerId, Known>,
    changed: BTreeSet<PeerId>,
    /// Counts what was heard; a peer's count says how long ago that was.
    tick: u64,
}

impl AddressBook {
    pub(crate) fn new(max_peers: usize) -> Self {
        Self { max_peers, peers: BTreeMap::new(), changed: BTreeSet::new(), tick: 0 }
    }

    /// We were told by the user or a configuration where this peer is.
    pub(crate) fn name(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let known = self.known(peer);
        known.ours = true;
        known.named = true;
        // The latest word goes first: the peer may have moved.
        let (newest, older) = (usable(peer, addresses), std::mem::take(&mut known.addresses));
        known.addresses = merged(newest, older);
        self.changed.insert(peer);
    }

    /// Identify told us whether the peer speaks none of our protocols.
    pub(crate) fn foreign(&mut self, peer: PeerId, is_foreign: bool) {
        self.known(peer).foreign = is_foreign;
    }

    /// Whether the peer said that it is none of ours, and did nothing else since.
    pub(crate) fn is_stranger(&self, peer: PeerId) -> bool {
        self.peers.get(&peer).is_some_and(|known| known.foreign && !known.ours)
    }

    /// Identify told us where the peer listens and whether it routes.
    pub(crate) fn identified(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, is_server: bool) {
        let known = self.known(peer);
        let older = if known.named { std::mem::take(&mut known.addresses) } else { Vec::new() };
        known.addresses = merged(usable(peer, addresses), older);
        known.routing = if is_server { Routing::Server } else { Routing::Client };
        self.changed.insert(peer);
    }

    /// A query found these addresses.
    pub(crate) fn found(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let known = self.known(peer);
        let older = std::mem::take(&mut known.addresses);
        known.addresses = merged(usable(peer, addresses), older);
    }

    /// The peer answered a call of ours, or had one of its own answered. Cheap when that is known.
    pub(crate) fn vouch(&mut self, peer: PeerId) {
        let known = self.known(peer);
        if !known.ours {
            known.ours = true;
            self.changed.insert(peer);
        }
    }

    /// Whether the peer speaks our protocols.
    pub(crate) fn is_ours(&self, peer: PeerId) -> bool {
        self.peers.get(&peer).is_some_and(|known| known.ours)
    }

    pub(crate) fn addresses(&self, peer: PeerId) -> Vec<Multiaddr> {
        self.peers.get(&peer).map(|known| known.addresses.clone()).unwrap_or_default()
    }

    /// Peers remembered, and how many of them are ours.
    pub(crate) fn count(&self) -> (usize, usize) {
        (self.peers.len(), self.peers.values().filter(|known| known.ours).count())
    }

    /// What changed for Kademlia's table since the last call.
    pub(crate) fn take_changes(&mut self) -> Vec<(PeerId, Entry)> {
        let entry = |peer: PeerId| match self.peers.get(&peer) {
            Some(known) if known.is_routable() => (peer, Entry::Keep(known.addresses.clone())),
            _ => (peer, Entry::Drop),
        };
        std::mem::take(&mut self.changed).into_iter().map(entry).collect()
    }

    fn known(&mut self, peer: PeerId) -> &mut Known {
        if !self.peers.contains_key(&peer) && self.peers.len() >= self.max_peers {
            self.forget_one();
        }
        self.tick += 1;
        let known = self.peers.entry(peer).or_default();
        known.heard = self.tick;
        known
    }

    /// Strangers go first, then those unheard of for longest.
    fn forget_one(&mut self) {
        let oldest = self.peers.iter().min_by_key(|(_, known)| (known.named, known.ours, known.heard));
        if let Some(peer) = oldest.map(|(peer, _)| *peer) {
            self.peers.remove(&peer);
            self.changed.insert(peer);
        }
    }
}

fn merged(newest: Vec<Multiaddr>, older: Vec<Multiaddr>) -> Vec<Multiaddr> {
    let mut out = Vec::with_capacity(MAX_ADDRESSES);
    for address in newest.into_iter().chain(older) {
        if out.len() < MAX_ADDRESSES && !out.contains(&address) {
            out.push(address);
        }
    }
    out
}

fn usable(peer: PeerId, addresses: Vec<Multiaddr>) -> Vec<Multiaddr> {
    addresses.into_iter().filter_map(|address| dialable(peer, address)).collect()
}

/// The address without its `/p2p/` end; `None` when it is another peer's, or one that we cannot dial.
fn dialable(peer: PeerId, mut address: Multiaddr) -> Option<Multiaddr> {
    if let Some(Protocol::P2p(named)) = address.iter().last() {
        if named != peer {
            return None;
        }
        address.pop();
    }
    let mut parts = address.iter();
    let host_is_fine = match parts.next()? {
        Protocol::Ip4(ip) => is_unicast(ip.into()),
        Protocol::Ip6(ip) => is_unicast(ip.into()),
        Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) => true,
        _ => false,
    };
    let port_is_fine = matches!(parts.next(), Some(Protocol::Tcp(port)) if port != 0);
    (host_is_fine && port_is_fine && parts.next().is_none()).then_some(address)
}

fn is_unicast(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

/// The address book of one node, shared by the swarm and by calls. The swarm is told when it changed.
#[derive(Clone)]
pub(crate) struct SharedBook(Arc<(Mutex<AddressBook>, Notify)>);

impl SharedBook {
    pub(crate) fn new(max_peers: usize) -> Self {
        Self(Arc::new((Mutex::new(AddressBook::new(max_peers)), Notify::new())))
    }

    /// Reads or changes the book; wakes the swarm if Kademlia's table should change too.
    pub(crate) fn with<R>(&self, act: impl FnOnce(&mut AddressBook) -> R) -> R {
        let mut book = self.lock();
        let result = act(&mut book);
        if !book.changed.is_empty() {
            self.0.1.notify_one();
        }
        result
    }

    /// Completes when something changed.
    pub(crate) async fn changed(&self) {
        self.0.1.notified().await;
    }

    pub(crate) fn is_ours(&self, peer: PeerId) -> bool {
        self.lock().is_ours(peer)
    }

    pub(crate) fn is_stranger(&self, peer: PeerId) -> bool {
        self.lock().is_stranger(peer)
    }

    fn lock(&self) -> MutexGuard<'_, AddressBook> {
        self.0.0.lock().expect("no panic while the address book is held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn strangers_never_enter_the_table_until_they_speak_our_protocols() {
        let (mut book, peer) = (AddressBook::new(10), PeerId::random());
        book.identified(peer, addresses(&["/ip4/10.0.0.1/tcp/1"]), true);
        assert_eq!(book.take_changes(), [(peer, Entry::Drop)]);
        book.vouch(peer);
        assert_eq!(book.take_changes(), [(peer, Entry::Keep(addresses(&["/ip4/10.0.0.1/tcp/1"])))]);
        book.vouch(peer);
        assert_eq!(book.take_changes(), []);
    }

    #[test]
    fn a_named_peer_is_asked_at_once_but_not_after_it_turns_out_to_be_a_client() {
        let (mut book, peer) = (AddressBook::new(10), PeerId::random());
        let at = addresses(&["/ip4/10.0.0.1/tcp/1"]);
        book.name(peer, at.clone());
        assert_eq!(book.take_changes(), [(peer, Entry::Keep(at.clone()))]);
        book.identified(peer, vec![], false);
        assert_eq!(book.take_changes(), [(peer, Entry::Drop)]);
        assert_eq!(book.addresses(peer), at);
    }

    #[test]
    fn addresses_that_cannot_be_dialled_are_ignored() {
        let (mut book, peer, other) = (AddressBook::new(10), PeerId::random(), PeerId::random());
        let texts = [
            "/ip4/0.0.0.0/tcp/1",
            "/ip4/10.0.0.1/tcp/0",
            "/ip4/10.0.0.1/udp/1/quic-v1",
            "/ip4/224.0.0.1/tcp/1",
            "/ip4/10.0.0.1/tcp/1/ws",
            &format!("/ip4/10.0.0.2/tcp/1/p2p/{other}"),
            &format!("/ip4/10.0.0.3/tcp/1/p2p/{other}/p2p-circuit/p2p/{peer}"),
            &format!("/dns4/bee.example/tcp/1/p2p/{peer}"),
        ];
        book.identified(peer, addresses(&texts), true);
        assert_eq!(book.addresses(peer), addresses(&["/dns4/bee.example/tcp/1"]));
    }

    #[test]
    fn a_peer_keeps_sixteen_addresses_the_latest_first() {
        let (mut book, peer) = (AddressBook::new(10), PeerId::random());
        for port in 1..=40 {
            book.found(peer, addresses(&[&format!("/ip4/10.0.0.1/tcp/{port}")]));
        }
        assert_eq!(book.addresses(peer).len(), MAX_ADDRESSES);
        assert_eq!(book.addresses(peer)[0], "/ip4/10.0.0.1/tcp/40".parse::<Multiaddr>().unwrap());
    }

    #[test]
    fn over_the_limit_strangers_are_forgotten_first() {
        let mut book = AddressBook::new(3);
        let (ours, named) = (PeerId::random(), PeerId::random());
        book.vouch(ours);
        book.name(named, vec![]);
        for _ in 0..10 {
            book.identified(PeerId::random(), addresses(&["/ip4/10.0.0.1/tcp/1"]), true);
        }
        assert_eq!(book.count(), (3, 2));
        assert!(book.is_ours(ours) && book.is_ours(named));
    }
}
