//! Ten times as many strangers as peers of ours: plain libp2p nodes that speak IPFS's Kademlia and nothing of ours.

mod common;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use common::*;
use futures::{StreamExt, future::join_all};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, identify, kad, noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use skep_net::{NetConfig, NetLimits};
use skep_rpc::Transport;

const OURS: usize = 5;
const STRANGERS: usize = 50;
/// Connections that strangers may hold with one of ours.
const SLOTS_OF_STRANGERS: usize = 6;
/// How often a stranger whose connection was closed comes again.
const RETURNS: usize = 3;

#[derive(NetworkBehaviour)]
struct Plain {
    identify: identify::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
}

fn stranger() -> Swarm<Plain> {
    let name = StreamProtocol::new("/ipfs/kad/1.0.0");
    let behaviour = |key: &libp2p::identity::Keypair| {
        let peer = key.public().to_peer_id();
        let mut kad = kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), kad::Config::new(name));
        kad.set_mode(Some(kad::Mode::Server));
        Plain { identify: identify::Behaviour::new(identify::Config::new("ipfs/0.1.0".into(), key.public())), kad }
    };
    let tcp = SwarmBuilder::with_new_identity().with_tokio().with_tcp(
        tcp::Config::default(),
        noise::Config::new,
        yamux::Config::default,
    );
    let mut swarm = tcp.unwrap().with_behaviour(behaviour).unwrap().build();
    swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
    swarm
}

/// Comes to every one of ours, asks them for peers and gives them records, and notes whom they name.
async fn wander(mut swarm: Swarm<Plain>, ours: Vec<(PeerId, Multiaddr)>, named: Arc<Mutex<BTreeSet<PeerId>>>) {
    for (peer, address) in &ours {
        swarm.behaviour_mut().kad.add_address(peer, address.clone());
        swarm.dial(address.clone()).unwrap();
    }
    let mut returns = RETURNS;
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::ConnectionEstablished { .. } => {
                swarm.behaviour_mut().kad.get_closest_peers(PeerId::random());
                let record = kad::Record::new(PeerId::random().to_bytes(), vec![7; 100]);
                let _there_may_be_nobody = swarm.behaviour_mut().kad.put_record(record, kad::Quorum::One);
            }
            SwarmEvent::ConnectionClosed { peer_id, .. } if returns > 0 => {
                returns -= 1;
                let _dialled_already = swarm.dial(peer_id);
            }
            SwarmEvent::Behaviour(PlainEvent::Kad(kad::Event::OutboundQueryProgressed {
                result: kad::QueryResult::GetClosestPeers(Ok(closest)),
                ..
            })) => named.lock().unwrap().extend(closest.peers.into_iter().map(|peer| peer.peer_id)),
            _ => {}
        }
    }
}

#[tokio::test]
async fn ten_times_as_many_strangers_enter_no_table_and_take_no_slot_of_ours() {
    let limits =
        NetLimits { max_connections: SLOTS_OF_STRANGERS + 20, reserved_connections: 20, ..NetLimits::default() };
    let start = || Node::start(NetConfig { limits: limits.clone(), ..NetConfig::default() }, router(Echo));
    let ours: Vec<Node> = (0..OURS).map(|_| start()).collect();
    for node in &ours[1..] {
        node.knows(&ours[0]);
        node.ping(ours[0].peer()).await.unwrap();
    }

    let addresses: Vec<_> = ours.iter().map(|node| (node.peer(), node.net.addresses().remove(0))).collect();
    let named = Arc::<Mutex<BTreeSet<PeerId>>>::default();
    let mut strangers = tokio::task::JoinSet::new();
    for _ in 0..STRANGERS {
        strangers.spawn(wander(stranger(), addresses.clone(), named.clone()));
    }
    eventually("every one of ours has met most strangers", || {
        ours.iter().all(|node| node.net.status().peers_known > STRANGERS * 3 / 4)
    })
    .await;
    eventually("strangers were told of peers", || !named.lock().unwrap().is_empty()).await;

    // Everybody of ours still reaches everybody of ours, by ids alone; so does one who comes late.
    let late = start();
    late.knows(&ours[0]);
    late.ping(ours[0].peer()).await.unwrap();
    for node in ours.iter().chain([&late]) {
        let others = ours.iter().filter(|other| other.peer() != node.peer());
        for answer in join_all(others.map(|other| node.ping(other.peer()))).await {
            answer.unwrap();
        }
    }
    let known: BTreeSet<PeerId> = ours.iter().chain([&late]).map(Node::peer).collect();
    let named = named.lock().unwrap().clone();
    assert!(named.is_subset(&known), "strangers are told of strangers: {:?}", named.difference(&known));
    for node in &ours {
        let status = node.net.status();
        assert_eq!(status.peers_ours, OURS, "the others and the late one: {status:?}");
        // Two peers that dial each other at once have two connections.
        assert!(status.connections <= SLOTS_OF_STRANGERS + 2 * OURS, "{status:?}");
    }
    strangers.shutdown().await;
    ours[1].ping(ours[4].peer()).await.unwrap();
}
