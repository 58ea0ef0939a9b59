//! Everything that listens to the swarm, composed.

use libp2p::{
    StreamProtocol, Swarm, identify, kad, ping,
    swarm::{self, NetworkBehaviour},
};
use libp2p_identity::Keypair;

use crate::{NetConfig, NetError, gate::Gate, muxer, peers::SharedBook, routing::Routing, streams, transport};

/// hivemind's p2pd finds addresses with IPFS's own Kademlia (docs/wire.md §1.3).
pub(crate) const KAD: StreamProtocol = StreamProtocol::new("/ipfs/kad/1.0.0");
/// Inbound streams whose protocol is being agreed on. A mixture opens one per sample and expert at once.
const MAX_NEGOTIATING: usize = muxer::MAX_STREAMS;

/// The behaviours. Order matters: the gate decides on a connection before the others see it.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    gate: Gate,
    pub(crate) identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(crate) kad: Routing,
    streams: streams::Behaviour,
}

/// Builds the swarm. Must be called inside a tokio runtime.
pub(crate) fn swarm(
    config: &NetConfig,
    identity: &Keypair,
    book: SharedBook,
    streams: streams::Shared,
) -> Result<Swarm<Behaviour>, NetError> {
    let peer = identity.public().to_peer_id();
    let (limits, timeouts) = (&config.limits, &config.timeouts);
    let transport = transport::build(identity, config.tls, timeouts.handshake).map_err(NetError::Start)?;

    let agent = concat!("skep/", env!("CARGO_PKG_VERSION"));
    let identify = identify::Config::new(String::new(), identity.public())
        .with_agent_version(agent.to_owned())
        .with_push_listen_addr_updates(true)
        .with_hide_listen_addrs(!config.announce.is_empty());

    // An address book only: nothing is stored for others, and peers enter it by our hand.
    let mut kad_config = kad::Config::new(KAD);
    kad_config
        .set_kbucket_inserts(kad::BucketInserts::Manual)
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_periodic_bootstrap_interval(None)
        .set_query_timeout(timeouts.resolve);
    let mut kad = kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), kad_config);
    kad.set_mode(Some(if config.client_mode { kad::Mode::Client } else { kad::Mode::Server }));

    let behaviour = Behaviour {
        gate: Gate::new(config.allow_peers.clone(), limits.max_connections, limits.reserved_connections, book),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::default(),
        kad: Routing::new(kad, peer),
        streams: streams::Behaviour::new(streams),
    };
    let swarm_config = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(timeouts.idle)
        .with_max_negotiating_inbound_streams(MAX_NEGOTIATING);
    Ok(Swarm::new(transport, behaviour, peer, swarm_config))
}
