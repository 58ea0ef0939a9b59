//! The swarm's loop: listens, dials, looks for peers, keeps Kademlia's table to peers of ours.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
};

use futures::{FutureExt as _, StreamExt as _};
use libp2p::{
    Multiaddr, PeerId, Swarm, TransportError,
    core::transport::ListenerId,
    identify, kad, ping,
    swarm::{
        DialError, SwarmEvent,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use multiaddr::Protocol;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{RpcError, Step};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info};

use crate::{
    NetError,
    behaviour::{Behaviour, BehaviourEvent, KAD},
    listen,
    native_link::NATIVE,
    net::Shared,
    peers::Entry,
};

/// Callers that may wait for one peer at once.
const MAX_WAITING: usize = 4096;

/// What calls ask of the swarm: to connect to a peer wherever it is.
pub(crate) struct Wanted {
    pub(crate) peer: PeerId,
    pub(crate) reply: oneshot::Sender<Result<(), RpcError>>,
}

/// A peer that callers want to be connected to.
#[derive(Default)]
struct Reach {
    waiting: Vec<oneshot::Sender<Result<(), RpcError>>>,
    /// The query for its addresses, while it runs.
    query: Option<kad::QueryId>,
    /// Whether the network was asked already.
    asked: bool,
    /// Why the addresses that were known did not do, and whose fault that is.
    dial_failure: Option<(Step, String)>,
}

/// The swarm and what it is busy with.
pub(crate) struct Node {
    swarm: Swarm<Behaviour>,
    shared: Arc<Shared>,
    wanted: mpsc::Receiver<Wanted>,
    reaching: BTreeMap<PeerId, Reach>,
}

impl Node {
    /// Binds the listen sockets; returns once each has an address.
    pub(crate) async fn listen(
        mut swarm: Swarm<Behaviour>,
        shared: Arc<Shared>,
        wanted: mpsc::Receiver<Wanted>,
    ) -> Result<Self, NetError> {
        let config = &shared.config;
        let addresses = if config.client_mode { &[][..] } else { &config.listen[..] };
        let mut unbound: HashMap<ListenerId, Multiaddr> = HashMap::new();
        for address in addresses {
            listen::refuse_taken(address)?;
        }
        for address in addresses {
            let listener = swarm.listen_on(address.clone()).map_err(|error| listen::refused(address, error))?;
            unbound.insert(listener, address.clone());
        }
        for address in &config.announce {
            swarm.add_external_address(without_peer(address.clone()));
        }
        let mut node = Self { swarm, shared, wanted, reaching: BTreeMap::new() };
        while !unbound.is_empty() {
            let event = node.swarm.select_next_some().await;
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } => drop(unbound.remove(listener_id)),
                SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                    if let Some(address) = unbound.remove(listener_id) {
                        let reason =
                            reason.as_ref().err().map_or("the listener closed".to_owned(), ToString::to_string);
                        return Err(NetError::Listen { address, source: io::Error::other(reason) });
                    }
                }
                _ => {}
            }
            node.on_event(event);
        }
        // A wildcard's further interfaces report right behind the first.
        while let Some(Some(event)) = node.swarm.next().now_or_never() {
            node.on_event(event);
        }
        Ok(node)
    }

    /// Runs until told to stop; then answers what is being served, and closes connections, by the deadline.
    pub(crate) async fn run(mut self, mut stop: mpsc::Receiver<Deadline>) {
        let deadline = loop {
            tokio::select! {
                biased;
                deadline = stop.recv() => break deadline,
                wanted = self.wanted.recv() => match wanted {
                    Some(Wanted { peer, reply }) => self.reach(peer, reply),
                    // Unreachable while `shared` holds a sender, and a reason to stop all the same.
                    None => break None,
                },
                () = self.shared.book.changed() => self.update_table(),
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        };
        if let Some(deadline) = deadline {
            let clock = self.shared.clock.clone();
            if before(&*clock, deadline, self.drain()).await.is_err() {
                info!("the network stopped before all calls were answered");
            }
        }
    }

    async fn drain(&mut self) {
        let shared = self.shared.clone();
        let mut idle = std::pin::pin!(shared.door.empty());
        loop {
            tokio::select! {
                biased;
                () = &mut idle => break,
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // An error says that the peer has just left.
            let _left_already = self.swarm.disconnect_peer_id(peer);
        }
        while self.swarm.connected_peers().next().is_some() {
            let event = self.swarm.select_next_some().await;
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::NewListenAddr { address, .. } => {
                info!(%address, "listening");
                self.shared.listening.write().expect(UNPOISONED).push(address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                info!(%address, "no longer listening");
                self.shared.listening.write().expect(UNPOISONED).retain(|known| *known != address);
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "a listener closed");
                self.shared.listening.write().expect(UNPOISONED).retain(|known| !addresses.contains(known));
            }
            SwarmEvent::ConnectionEstablished { peer_id, .. } => self.reached(peer_id),
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), error, .. } => {
                self.on_dial_failure(peer, error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                debug!(from = %send_back_addr, %error, "an incoming connection failed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. })) => {
                let (is_server, is_foreign) = (info.protocols.contains(&KAD), is_foreign(&info));
                self.shared.book.with(|book| {
                    book.identified(peer_id, info.listen_addrs, is_server);
                    book.foreign(peer_id, is_foreign);
                });
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event { peer, connection, result: Err(error) })) => {
                if matches!(error, ping::Failure::Timeout | ping::Failure::Other { .. }) {
                    debug!(%peer, %error, "closing a connection that does not answer pings");
                    self.swarm.close_connection(connection);
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed {
                id,
                result: kad::QueryResult::GetClosestPeers(result),
                step,
                ..
            })) if step.last => self.on_query_end(id, result),
            _ => {}
        }
    }

    /// Brings Kademlia's table in line with the address book.
    fn update_table(&mut self) {
        let changes = self.shared.book.with(|book| book.take_changes());
        let kad = &mut self.swarm.behaviour_mut().kad;
        for (peer, entry) in changes {
            match entry {
                Entry::Keep(addresses) => {
                    for address in addresses {
                        kad.add_address(&peer, address);
                    }
                }
                Entry::Drop => drop(kad.remove_peer(&peer)),
            }
        }
    }

    /// Concurrent callers share one dial.
    fn reach(&mut self, peer: PeerId, reply: oneshot::Sender<Result<(), RpcError>>) {
        if self.swarm.is_connected(&peer) {
            let _caller_left = reply.send(Ok(()));
            return;
        }
        let is_new = !self.reaching.contains_key(&peer);
        let reach = self.reaching.entry(peer).or_default();
        reach.waiting.retain(|reply| !reply.is_closed());
        if reach.waiting.len() >= MAX_WAITING {
            let reason = format!("{MAX_WAITING} calls wait for a connection already");
            let _caller_left = reply.send(Err(RpcError::Unreachable { peer, step: Step::Prepare, reason }));
            return;
        }
        reach.waiting.push(reply);
        if is_new {
            self.dial(peer);
        }
    }

    fn dial(&mut self, peer: PeerId) {
        let addresses = self.shared.book.with(|book| book.addresses(peer));
        let dial = DialOpts::peer_id(peer)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .build();
        match self.swarm.dial(dial) {
            Ok(()) => {}
            Err(DialError::DialPeerConditionFalse(_)) if self.swarm.is_connected(&peer) => self.reached(peer),
            // Somebody else's dial is under way; its end is ours too.
            Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => self.on_dial_failure(peer, error),
        }
    }

    fn on_dial_failure(&mut self, peer: PeerId, error: DialError) {
        let Some(reach) = self.reaching.get_mut(&peer) else { return };
        if reach.query.is_some() {
            // The query dials too; its end decides.
            return;
        }
        let reason = dial_reason(&error);
        debug!(%peer, %reason, "dialling failed");
        match error {
            DialError::NoAddresses => {}
            DialError::Denied { .. } | DialError::LocalPeerId { .. } | DialError::Aborted => {
                return self.failed(peer, Step::Prepare, reason);
            }
            _ => {
                let step = if is_ours(&error) { Step::Prepare } else { Step::Dial };
                reach.dial_failure = Some((step, reason));
            }
        }
        if reach.asked {
            return match reach.dial_failure.take() {
                Some((step, reason)) => self.failed(peer, step, reason),
                None => self.failed(peer, Step::Resolve, "no peer we know knows its address".to_owned()),
            };
        }
        reach.asked = true;
        let kad = &mut self.swarm.behaviour_mut().kad;
        // With its old addresses in the table the query would dial those, and give the peer up before others tell new ones.
        // Identify puts it back.
        kad.remove_peer(&peer);
        reach.query = Some(kad.get_closest_peers(peer));
    }

    fn on_query_end(&mut self, id: kad::QueryId, result: kad::GetClosestPeersResult) {
        let Some(peer) = self.reaching.iter().find(|(_, reach)| reach.query == Some(id)).map(|(peer, _)| *peer) else {
            return;
        };
        let peers = match result {
            Ok(closest) => closest.peers,
            Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
        };
        if let Some(found) = peers.into_iter().find(|found| found.peer_id == peer) {
            self.shared.book.with(|book| book.found(peer, found.addrs));
        }
        if let Some(reach) = self.reaching.get_mut(&peer) {
            reach.query = None;
        }
        self.dial(peer);
    }

    fn reached(&mut self, peer: PeerId) {
        let Some(reach) = self.reaching.remove(&peer) else { return };
        if let Some(mut query) = reach.query.and_then(|id| self.swarm.behaviour_mut().kad.query_mut(&id)) {
            query.finish();
        }
        for reply in reach.waiting {
            let _caller_left = reply.send(Ok(()));
        }
    }

    fn failed(&mut self, peer: PeerId, step: Step, reason: String) {
        for reply in self.reaching.remove(&peer).map(|reach| reach.waiting).unwrap_or_default() {
            let _caller_left = reply.send(Err(RpcError::Unreachable { peer, step, reason: reason.clone() }));
        }
    }
}

const UNPOISONED: &str = "no panic while addresses are held";

fn without_peer(address: Multiaddr) -> Multiaddr {
    address.into_iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect()
}

fn dial_reason(error: &DialError) -> String {
    match error {
        DialError::Transport(tried) => {
            let lines =
                tried.iter().map(|(address, error)| format!("{}: {}", without_peer(address.clone()), innermost(error)));
            lines.collect::<Vec<_>>().join("; ")
        }
        DialError::WrongPeerId { obtained, address } => {
            format!("{} is the address of another peer, {obtained}", without_peer(address.clone()))
        }
        DialError::Denied { cause } => innermost(cause),
        DialError::NoAddresses => "no address is known".to_owned(),
        other => other.to_string(),
    }
}

/// Whether every address failed because of this machine: it has no network, or no more files or ports to spare.
fn is_ours(error: &DialError) -> bool {
    let DialError::Transport(tried) = error else { return false };
    !tried.is_empty()
        && tried.iter().all(|(_, error)| match error {
            TransportError::Other(error) => is_of_this_machine(listen::root(error)),
            TransportError::MultiaddrNotSupported(_) => false,
        })
}

fn is_of_this_machine(error: &io::Error) -> bool {
    /// "Too many open files": of the system, of the process. They have no kind of their own.
    const NO_MORE_FILES: [i32; 2] = [23, 24];
    let has_no_files = cfg!(unix) && error.raw_os_error().is_some_and(|code| NO_MORE_FILES.contains(&code));
    let kinds = [io::ErrorKind::NetworkDown, io::ErrorKind::NetworkUnreachable, io::ErrorKind::AddrNotAvailable];
    has_no_files || kinds.contains(&error.kind())
}

/// The words of the innermost cause; what wraps it repeats them.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Whether a peer says that it speaks none of our protocols. hivemind's names are none that identify can carry, but its
/// daemon says what it is.
fn is_foreign(info: &identify::Info) -> bool {
    let is_known = ["skep/", "p2pd/"].iter().any(|agent| info.agent_version.starts_with(agent));
    !is_known && !info.protocols.contains(&NATIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(errors: Vec<io::Error>) -> DialError {
        let address: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        DialError::Transport(errors.into_iter().map(|error| (address.clone(), TransportError::Other(error))).collect())
    }

    #[test]
    fn what_this_machine_lacks_is_not_the_peers_fault() {
        let wrapped = |error: io::Error| io::Error::other(io::Error::other(error));
        let no_files = || io::Error::from_raw_os_error(24);
        let no_network = || io::Error::from(io::ErrorKind::NetworkUnreachable);
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(is_ours(&failed(vec![no_files()])) && is_ours(&failed(vec![wrapped(no_network()), no_files()])));
        assert!(!is_ours(&failed(vec![refused()])) && !is_ours(&failed(vec![no_network(), wrapped(refused())])));
        assert!(!is_ours(&failed(vec![])) && !is_ours(&DialError::NoAddresses));
    }
}
