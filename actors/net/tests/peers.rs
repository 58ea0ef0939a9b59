//! Who is found, who is let in, and who is told to others.

mod common;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use common::*;
use libp2p_identity::PeerId;
use skep_net::{NetConfig, NetError, NetLimits, parse_peer_address};
use skep_rpc::{Body, Router, RpcError, ServeError, Service, Step, Transport};
use skep_wire::Method;

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_peer_known_only_by_its_id_is_found_through_others() {
    let (hub, far, client) = (Node::serving(Echo), Node::serving(Echo), Node::client());
    far.knows(&hub);
    far.ping(hub.peer()).await.unwrap();
    eventually("the hub knows both", || hub.net.status().peers_ours == 1).await;
    client.knows(&hub);
    // Identify may still be on its way to the hub; then the first question finds nobody.
    client.ping_until_answered(far.peer()).await;
    assert!(!client.net.is_banned(far.peer()));
}

#[tokio::test]
async fn a_peer_that_never_spoke_our_protocols_is_not_told_to_others() {
    let (hub, silent, client) = (without_experts(NetConfig::default()), Node::serving(Echo), Node::client());
    connect_only(&silent, &hub).await;
    eventually("identify has run", || hub.net.status().peers_known == 1).await;
    assert_eq!(hub.net.status().peers_ours, 0);
    client.knows(&hub);
    let lost = client.ping(silent.peer()).await;
    assert!(matches!(lost, Err(RpcError::Unreachable { step: Step::Resolve, .. })), "{lost:?}");
}

#[tokio::test]
async fn a_peer_that_moved_is_found_at_its_new_address() {
    let (hub, client) = (Node::serving(Echo), Node::client());
    let (key, clock) = (keypair(), clock());
    let start = || skep_net::Net::start(NetConfig::default(), key.clone(), router(Echo), clock.clone()).unwrap();
    let before = start();
    let (peer, old) = (before.local_peer(), before.addresses());
    before.shutdown(client.within(SOON)).await;

    let moved = Node { net: start(), clock: clock.clone() };
    assert_ne!(moved.net.addresses(), old);
    moved.knows(&hub);
    moved.ping(hub.peer()).await.unwrap();
    client.net.add_addresses(peer, old);
    client.knows(&hub);
    client.ping_until_answered(peer).await;
}

#[tokio::test]
async fn a_node_that_only_asks_serves_nothing_and_has_no_address() {
    let (server, client) = (Node::serving(Echo), Node::start(NetConfig::client(), router(Echo)));
    assert_eq!(client.net.addresses(), []);
    client.knows(&server);
    client.ping(server.peer()).await.unwrap();
    // The server could reach it over the connection that is open, and is refused.
    let refused = server.ping(client.peer()).await;
    assert!(matches!(refused, Err(RpcError::Refused { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_dial_that_fails_says_why() {
    let (server, client) = (Node::serving(Echo), Node::client());
    assert!(matches!(parse_peer_address("127.0.0.1:80"), Err(NetError::Parse { .. })));
    let bare = without_peer(&server);
    assert!(matches!(parse_peer_address(&bare), Err(NetError::NoPeerId { .. })));

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (moved, gone) = (PeerId::random(), PeerId::random());
    for (peer, address, reason) in [
        (moved, bare, format!("is the address of another peer, {}", server.peer())),
        (gone, format!("/ip4/127.0.0.1/tcp/{closed}"), "refused".to_owned()),
    ] {
        let (peer, address) = parse_peer_address(&format!("{address}/p2p/{peer}")).unwrap();
        client.net.add_addresses(peer, vec![address]);
        match client.ping(peer).await {
            Err(RpcError::Unreachable { step: Step::Dial, reason: got, .. }) => assert!(got.contains(&reason), "{got}"),
            other => panic!("{other:?}"),
        }
        assert!(client.net.is_banned(peer));
    }
}

#[tokio::test]
async fn a_port_that_never_speaks_ends_at_the_deadline() {
    let client = Node::client();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}/p2p/{}", silent.local_addr().unwrap().port(), PeerId::random());
    let (peer, address) = parse_peer_address(&address).unwrap();
    client.net.add_addresses(peer, vec![address]);
    let result = client.call_within(Duration::from_millis(200), peer, Method::Ping, message(b"")).await;
    assert!(matches!(result, Err(RpcError::Deadline { step: Step::Dial, .. })), "{result:?}");
}

/// The first address of a node, without its peer id.
fn without_peer(node: &Node) -> String {
    let address = node.net.addresses().remove(0).to_string();
    address.split("/p2p/").next().unwrap().to_owned()
}

/// Connects without speaking any protocol of ours: asks for a method that the server has no route for.
async fn connect_only(stranger: &Node, server: &Node) {
    stranger.knows(server);
    let refused = stranger.call(server.peer(), Method::Forward, tensors(&[1])).await;
    assert!(matches!(refused, Err(RpcError::Refused { .. })), "{refused:?}");
}

/// A node of the DHT without experts.
fn without_experts(config: NetConfig) -> Node {
    let router = Router::new();
    router.route(&[Method::Ping, Method::Store, Method::Find], Arc::new(Echo));
    Node::start(config, router)
}

#[tokio::test]
async fn foreign_bytes_on_the_port_hurt_nobody() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let address = server.net.addresses().remove(0).to_string();
    let port = address.split('/').nth(4).unwrap();
    for bytes in
        [&b"GET / HTTP/1.1\r\nHost: bee\r\n\r\n"[..], &[0xff; 1000], b"\x13/multistream/1.0.0\n\x08/x/y/z\n", b""]
    {
        let mut socket = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
        std::io::Write::write_all(&mut socket, bytes).unwrap();
    }
    client.knows(&server);
    client.ping(server.peer()).await.unwrap();
}

#[tokio::test]
async fn only_peers_on_the_list_are_let_in() {
    let (friend, stranger) = (Node::client(), Node::client());
    let config = NetConfig { allow_peers: Some(vec![friend.peer()]), ..NetConfig::default() };
    let server = Node::start(config, router(Echo));
    for client in [&friend, &stranger] {
        client.knows(&server);
    }
    friend.ping(server.peer()).await.unwrap();
    let refused = stranger.ping(server.peer()).await;
    assert!(matches!(refused, Err(RpcError::Unreachable { .. })), "{refused:?}");
    server.knows(&Node::serving(Echo));
    let refused = server.ping(stranger.peer()).await;
    assert!(
        matches!(&refused, Err(RpcError::Unreachable { step: Step::Prepare, reason, .. }) if reason.contains("allowed")),
        "{refused:?}"
    );
    assert!(!server.net.is_banned(stranger.peer()), "it is our own list");
}

#[tokio::test]
async fn a_peer_for_which_this_node_has_no_connection_left_is_not_banned() {
    let limits = NetLimits { max_connections: 1, reserved_connections: 0, ..NetLimits::default() };
    let client = Node::start(NetConfig { limits, ..NetConfig::client() }, Router::new());
    let (one, other) = (Node::serving(Echo), Node::serving(Echo));
    client.knows(&one);
    client.knows(&other);
    client.ping(one.peer()).await.unwrap();
    let full = client.ping(other.peer()).await;
    assert!(
        matches!(&full, Err(RpcError::Unreachable { step: Step::Prepare, reason, .. }) if reason.contains("limit")),
        "{full:?}"
    );
    assert!(!client.net.is_banned(other.peer()), "it is healthy");
}

#[tokio::test]
async fn a_peer_to_which_all_streams_are_taken_by_other_calls_is_not_banned() {
    let never = Never::default();
    let (server, client) = (Node::serving(never.clone()), Node::client());
    client.knows(&server);
    let calls: Vec<_> = (0..256).map(|_| client.call(server.peer(), Method::Forward, tensors(&[1]))).collect();
    let calls = tokio::spawn(futures::future::join_all(calls));
    eventually("all are served", || never.began.load(Ordering::SeqCst) == 256).await;
    let late = client.call_within(Duration::from_millis(200), server.peer(), Method::Ping, message(b"")).await;
    assert!(matches!(late, Err(RpcError::Deadline { step: Step::Prepare, .. })), "{late:?}");
    assert!(!client.net.is_banned(server.peer()), "it was not even asked");
    calls.abort();
}

#[tokio::test]
async fn strangers_never_take_the_slots_of_peers_of_ours() {
    let limits = NetLimits { max_connections: 8, reserved_connections: 5, ..NetLimits::default() };
    let server = without_experts(NetConfig { limits, ..NetConfig::default() });
    let friends: Vec<_> = (0..4).map(|_| Node::client()).collect();
    for friend in &friends {
        friend.knows(&server);
        friend.ping(server.peer()).await.unwrap();
    }
    let strangers: Vec<_> = (0..12).map(|_| Node::client()).collect();
    for stranger in &strangers {
        connect_only(stranger, &server).await;
    }
    eventually("only three strangers stay", || server.net.status().connections <= 4 + 3).await;
    assert!(friends.iter().all(|friend| friend.net.status().connections == 1));
    let late = Node::client();
    late.knows(&server);
    late.ping(server.peer()).await.unwrap();
}

/// Answers everything but junk.
fn choosy() -> impl Service {
    function(|inbound| match inbound.body {
        Body::Message(bytes) if bytes == "junk" => Err(ServeError::Invalid("junk".to_owned())),
        body => Ok(body),
    })
}

#[tokio::test]
async fn calls_that_are_refused_make_nobody_a_peer_of_ours_on_either_wire() {
    for native in [false, true] {
        let server = Node::start_native(NetConfig { native, ..NetConfig::default() }, router(choosy()));
        let client = Node::start_native(NetConfig { native, ..NetConfig::default() }, router(Echo));
        client.knows(&server);
        for method in [Method::Find, Method::Info] {
            let refused = client.call(server.peer(), method, message(b"junk")).await;
            assert!(matches!(refused, Err(RpcError::Remote { .. })), "{refused:?}");
        }
        assert_eq!(server.net.status().peers_ours, 0, "native: {native}");
        client.call(server.peer(), Method::Info, message(b"no junk")).await.unwrap();
        assert_eq!(server.net.status().peers_ours, 1, "native: {native}");
    }
}

#[tokio::test]
async fn strangers_whose_calls_are_refused_never_take_the_slots_of_peers_of_ours() {
    let limits = NetLimits { max_connections: 8, reserved_connections: 5, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(choosy()));
    let friends: Vec<_> = (0..4).map(|_| Node::client()).collect();
    for friend in &friends {
        friend.knows(&server);
        friend.ping(server.peer()).await.unwrap();
    }
    let strangers: Vec<_> = (0..12).map(|_| Node::client()).collect();
    for stranger in &strangers {
        stranger.knows(&server);
        let refused = stranger.call(server.peer(), Method::Ping, message(b"junk")).await;
        assert!(matches!(refused, Err(RpcError::Remote { .. })), "{refused:?}");
        assert!(server.net.status().connections <= 8);
    }
    eventually("only three strangers stay", || server.net.status().connections <= 4 + 3).await;
    assert_eq!(server.net.status().peers_ours, 4);
    assert!(friends.iter().all(|friend| friend.net.status().connections == 1));
    let late = Node::client();
    late.knows(&server);
    late.ping(server.peer()).await.unwrap();
}

#[tokio::test]
async fn an_rsa_peer_and_an_ed25519_peer_talk() {
    let identity = skep_net::identity::generate(skep_net::identity::KeyKind::Rsa).unwrap();
    assert!(identity.peer_id().to_base58().starts_with("Qm"));
    let (server, clock) = (Node::serving(Echo), clock());
    let rsa = skep_net::Net::start(NetConfig::default(), identity.keypair().clone(), router(Echo), clock.clone());
    let rsa = Node { net: rsa.unwrap(), clock };
    rsa.knows(&server);
    rsa.ping(server.peer()).await.unwrap();
    server.ping(rsa.peer()).await.unwrap();
}

#[tokio::test]
async fn a_node_without_routes_still_helps_others_to_find_each_other() {
    let hub = Node::start(NetConfig::default(), Router::new());
    let (server, client) = (Node::serving(Echo), Node::client());
    hub.knows(&server);
    hub.ping(server.peer()).await.unwrap();
    client.knows(&hub);
    client.ping_until_answered(server.peer()).await;
}
