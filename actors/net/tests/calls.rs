//! Calls between two networks: what is sent arrives, what is answered comes back, what is too large is refused.

mod common;

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use common::*;
use futures::future::join_all;
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, Signal};
use skep_net::{Net, NetConfig, NetLimits};
use skep_rpc::{Answer, Body, Router, RpcError, ServeError, Step, Transport};
use skep_wire::{Method, limits::MAX_UNARY_FRAME};

#[tokio::test]
async fn a_message_and_its_answer_cross_the_network() {
    let (server, client) = (Node::serving(Echo), Node::client());
    client.knows(&server);
    let answer = client.call(server.peer(), Method::Find, message(b"who?")).await.unwrap();
    assert_eq!(answer, Answer { body: message(b"who?"), load: None });
    // An empty answer is an answer.
    assert_eq!(client.call(server.peer(), Method::Store, message(b"")).await.unwrap().body, message(b""));
}

#[tokio::test]
async fn the_service_sees_the_authenticated_caller_and_the_method() {
    let (seen_tx, seen) = std::sync::mpsc::sync_channel(6);
    let server = Node::serving(function(move |inbound| {
        seen_tx.send((inbound.peer, inbound.method, inbound.knows_overload)).unwrap();
        Ok(inbound.body)
    }));
    let client = Node::client();
    client.knows(&server);
    for method in Method::ALL {
        let body = if method.carries_tensors() { tensors(&[1]) } else { message(b"x") };
        client.call(server.peer(), method, body).await.unwrap();
        assert_eq!(seen.recv().unwrap(), (client.peer(), method, false));
    }
}

#[tokio::test]
async fn tensors_travel_below_and_above_the_size_that_needs_a_stream() {
    let (server, client) = (Node::serving(Echo), Node::client());
    client.knows(&server);
    // 2 MiB are still one message; above, each tensor travels in pieces of 4 MiB.
    for sizes in [&[0][..], &[3, 0, 5], &[512 << 10], &[(512 << 10) + 1], &[7, 2_500_000, 0, 100], &[1 << 20, 1 << 20]]
    {
        let body = tensors(sizes);
        let answer = client.call(server.peer(), Method::Backward, body.clone()).await.unwrap();
        assert!(buffers(&answer.body) == buffers(&body), "sizes {sizes:?}");
    }
}

#[tokio::test]
async fn errors_of_the_service_read_like_pythons() {
    let server = Node::serving(function(|inbound| {
        Err(match inbound.method {
            Method::Forward => ServeError::UnknownExpert { uid: "nope.1".into() },
            _ => ServeError::Invalid("bad shape".into()),
        })
    }));
    let client = Node::client();
    client.knows(&server);
    let error = |text: &str| Err(RpcError::Remote { text: text.to_owned() });
    assert_eq!(client.call(server.peer(), Method::Forward, tensors(&[1])).await, error("KeyError('nope.1')"));
    assert_eq!(client.call(server.peer(), Method::Forward, tensors(&[1 << 20])).await, error("'nope.1'"));
    assert_eq!(client.call(server.peer(), Method::Info, message(b"")).await, error("ValueError('bad shape')"));
}

#[tokio::test]
async fn an_answer_too_large_for_one_message_names_the_streaming_form() {
    let server = Node::serving(function(|inbound| match inbound.method {
        Method::Forward => Ok(tensors(&[MAX_UNARY_FRAME / 4 + 1])),
        _ => Ok(Body::Message(vec![0; MAX_UNARY_FRAME].into())),
    }));
    let client = Node::client();
    client.knows(&server);
    let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Forward, tensors(&[1])).await else {
        panic!("expected an error")
    };
    assert!(text.contains("ConnectionHandler.rpc_forward_stream"), "{text}");
    let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Find, message(b"")).await else {
        panic!("expected an error")
    };
    assert!(text.contains("4194304"), "{text}");
}

#[tokio::test]
async fn an_oversize_request_is_not_sent() {
    let (server, client) = (Node::serving(Echo), Node::client());
    client.knows(&server);
    let body = Body::Message(vec![0; MAX_UNARY_FRAME].into());
    let refused = client.call(server.peer(), Method::Store, body).await;
    assert!(matches!(refused, Err(RpcError::TooLarge { limit: MAX_UNARY_FRAME, .. })), "{refused:?}");
    assert_eq!(client.net.status().connections, 0);
}

#[tokio::test]
async fn a_stream_over_the_body_limit_gets_a_readable_error() {
    let limits = NetLimits { max_body_bytes: 5 << 20, ..NetLimits::default() };
    let config = NetConfig { limits, ..NetConfig::default() };
    let (server, client) = (Node::start(config, router(Echo)), Node::client());
    client.knows(&server);
    let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Forward, tensors(&[2 << 20])).await else {
        panic!("expected an error")
    };
    assert!(text.contains("5242880"), "{text}");
    assert!(client.call(server.peer(), Method::Forward, tensors(&[1 << 20])).await.is_ok());
}

#[tokio::test]
async fn a_thousand_calls_share_one_connection() {
    let (server, client) = (Node::serving(Echo), Node::client());
    client.knows(&server);
    let calls = (0..1000u32).map(|i| client.call(server.peer(), Method::Find, message(&i.to_be_bytes())));
    let answers = join_all(calls).await;
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().body, message(&(i as u32).to_be_bytes()));
    }
    assert_eq!((client.net.status().connections, server.net.status().connections), (1, 1));
    assert_eq!(client.net.status().streams_out, 0);
}

#[tokio::test]
async fn calls_over_the_limit_are_refused_at_once_and_the_others_go_on() {
    let never = Never::default();
    let limits = NetLimits { max_inbound_calls: 3, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(never.clone()));
    let client = Node::client();
    client.knows(&server);
    let held: Vec<_> =
        (0..3).map(|_| tokio::spawn(client.call(server.peer(), Method::Forward, tensors(&[1])))).collect();
    eventually("three calls are served", || never.began.load(Ordering::SeqCst) == 3).await;
    for body in [tensors(&[1]), tensors(&[(512 << 10) - 100]), tensors(&[2 << 20])] {
        let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Forward, body).await else {
            panic!("expected a refusal")
        };
        assert!(text.contains("overloaded"), "{text}");
    }
    assert_eq!(server.net.status().calls_in_refused, 3);
    assert!(held.iter().all(|call| !call.is_finished()));
    // The DHT has a door of its own.
    let ping = client.call_within(Duration::from_millis(200), server.peer(), Method::Ping, message(b"")).await;
    assert!(matches!(ping, Err(RpcError::Deadline { .. })), "{ping:?}");
    held.iter().for_each(|call| call.abort());
}

#[tokio::test]
async fn a_caller_who_gives_up_is_noticed_by_the_service() {
    let never = Never::default();
    let (server, client) = (Node::serving(never.clone()), Node::client());
    client.knows(&server);
    for body in [tensors(&[1]), tensors(&[1 << 20])] {
        let (began, dropped) = (never.began.load(Ordering::SeqCst), never.dropped.load(Ordering::SeqCst));
        let call = tokio::spawn(client.call(server.peer(), Method::Forward, body));
        eventually("the call is served", || never.began.load(Ordering::SeqCst) == began + 1).await;
        assert_eq!(never.dropped.load(Ordering::SeqCst), dropped);
        call.abort();
        eventually("the work is dropped", || never.dropped.load(Ordering::SeqCst) == dropped + 1).await;
    }
    assert_eq!(server.net.status().calls_in_left, 2);
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_and_takes_the_work_along() {
    let never = Never::default();
    let (server, client) = (Node::serving(never.clone()), Node::client());
    client.knows(&server);
    let start = client.clock.now();
    let result = client.call_within(Duration::from_millis(300), server.peer(), Method::Find, message(b"")).await;
    assert!(matches!(result, Err(RpcError::Deadline { .. })), "{result:?}");
    assert!((300..2000).contains(&client.clock.now().since(start).as_millis()));
    assert!(client.net.is_banned(server.peer()));
    eventually("the work is dropped", || never.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_service_that_panics_costs_only_its_caller_an_answer() {
    let server = Node::serving(function(|inbound| match inbound.body.is_empty() {
        true => panic!("a bug in a service"),
        false => Ok(inbound.body),
    }));
    let client = Node::client();
    client.knows(&server);
    let failed = client.call(server.peer(), Method::Find, message(b"")).await;
    assert!(matches!(&failed, Err(RpcError::Remote { text }) if text.contains("panicked")), "{failed:?}");
    assert!(client.call(server.peer(), Method::Find, message(b"x")).await.is_ok());
    // Nor does one that is asked by its own process.
    let failed = server.call(server.peer(), Method::Find, message(b"")).await;
    assert!(matches!(&failed, Err(RpcError::Remote { text }) if text.contains("panicked")), "{failed:?}");
}

#[tokio::test]
async fn a_method_without_a_route_is_refused_and_offered_once_it_has_one() {
    let router = Router::new();
    let (server, client) = (Node::start(NetConfig::default(), router.clone()), Node::client());
    client.knows(&server);
    let refused = client.ping(server.peer()).await;
    assert!(
        matches!(&refused, Err(RpcError::Refused { reason, .. }) if reason.contains("DHTProtocol.rpc_ping")),
        "{refused:?}"
    );
    router.route(&[Method::Ping], Arc::new(Echo));
    client.ping(server.peer()).await.unwrap();
    router.withdraw(&[Method::Ping]);
    assert!(matches!(client.ping(server.peer()).await, Err(RpcError::Refused { .. })));
}

#[tokio::test]
async fn a_node_calls_itself_without_the_network() {
    let node = Node::serving(Echo);
    assert_eq!(node.ping(node.peer()).await.unwrap().body, message(b"ping"));
}

#[tokio::test]
async fn an_unknown_peer_is_unreachable_and_banned_for_a_while() {
    let client = Node::client();
    let nobody = PeerId::random();
    let result = client.ping(nobody).await;
    assert!(matches!(result, Err(RpcError::Unreachable { step: Step::Resolve, .. })), "{result:?}");
    assert!(client.net.is_banned(nobody));
    assert_eq!(client.net.status().banned, [nobody.to_base58()]);
}

#[tokio::test]
async fn concurrent_calls_to_an_unconnected_peer_share_one_dial() {
    let (server, client) = (Node::serving(Echo), Node::client());
    client.knows(&server);
    let answers = join_all((0..50).map(|_| client.ping(server.peer()))).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(server.net.status().connections, 1);
}

#[tokio::test]
async fn a_peer_that_came_back_with_the_same_identity_is_reached_again() {
    let (client, key, clock) = (Node::client(), keypair(), clock());
    let start = |config| Net::start(config, key.clone(), router(Echo), clock.clone()).unwrap();
    let first = start(NetConfig::default());
    let (peer, address) = (first.local_peer(), first.addresses().remove(0));
    client.net.add_addresses(peer, vec![address.clone()]);
    client.ping(peer).await.unwrap();
    first.shutdown(Deadline::after(clock.now(), Duration::from_secs(5))).await;
    let gone = client.ping(peer).await;
    assert!(matches!(gone, Err(RpcError::Unreachable { step: Step::Dial, .. })), "{gone:?}");
    let _again = start(NetConfig { listen: vec![address], ..NetConfig::default() });
    client.ping(peer).await.unwrap();
    assert!(!client.net.is_banned(peer));
}

#[tokio::test]
async fn shutdown_answers_what_is_being_served_and_lets_nothing_new_in() {
    let release = Signal::new(false);
    struct Held(Signal<bool>);
    impl skep_rpc::Service for Held {
        fn serve(&self, inbound: skep_rpc::Inbound) -> futures::future::BoxFuture<'static, Result<Answer, ServeError>> {
            let release = self.0.clone();
            Box::pin(async move {
                release.until(|released| released.then_some(())).await;
                Ok(Answer { body: inbound.body, load: None })
            })
        }
    }
    let (server, client) = (Node::serving(Held(release.clone())), Node::client());
    client.knows(&server);
    let peer = server.peer();
    let call = tokio::spawn(client.call(peer, Method::Forward, tensors(&[100_000])));
    eventually("the call is served", || server.net.status().serving == 1).await;
    let shutdown = server.net.shutdown(server.within(Duration::from_secs(10)));
    let refused = async {
        let refused = client.call(peer, Method::Forward, tensors(&[1])).await;
        release.set(true);
        refused
    };
    // `join!` polls in order: the door is shut before the call is made.
    let ((), refused) = tokio::join!(shutdown, refused);
    assert!(matches!(&refused, Err(RpcError::Remote { text }) if text.contains("stopping")), "{refused:?}");
    assert_eq!(buffers(&call.await.unwrap().unwrap().body), buffers(&tensors(&[100_000])));
    assert!(matches!(client.ping(peer).await, Err(RpcError::Unreachable { .. })));
}

#[tokio::test]
async fn a_shutdown_ends_at_its_deadline_though_a_call_never_does() {
    let never = Never::default();
    let (server, client) = (Node::serving(never.clone()), Node::client());
    client.knows(&server);
    let call = tokio::spawn(client.call(server.peer(), Method::Forward, tensors(&[1])));
    eventually("the call is served", || never.began.load(Ordering::SeqCst) == 1).await;
    let start = server.clock.now();
    server.net.shutdown(server.within(Duration::from_millis(300))).await;
    assert!((300..3000).contains(&server.clock.now().since(start).as_millis()));
    let cut_off = call.await.unwrap();
    assert!(matches!(cut_off, Err(RpcError::Unreachable { step: Step::Exchange, .. })), "{cut_off:?}");
    assert_eq!(never.dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn many_peers_at_once_all_get_their_own_answers() {
    let server = Node::serving(function(|inbound| Ok(message(&inbound.peer.to_bytes()))));
    let clients: Vec<_> = (0..20).map(|_| Node::client()).collect();
    clients.iter().for_each(|client| client.knows(&server));
    let answers = join_all(clients.iter().map(|client| client.ping(server.peer()))).await;
    for (client, answer) in clients.iter().zip(&answers) {
        assert_eq!(answer.as_ref().unwrap().body, message(&client.peer().to_bytes()));
    }
    assert_eq!(clients.iter().map(Node::peer).collect::<BTreeSet<_>>().len(), 20);
}
