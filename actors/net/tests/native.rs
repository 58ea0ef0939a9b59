//! Calls between two networks that both speak the native wire.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::*;
use futures::future::{BoxFuture, join_all};
use skep_kernel::Deadline;
use skep_net::{NetConfig, NetLimits};
use skep_rpc::{
    Answer, Body, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, ServerLoad, Service, Step, TensorBody,
    TraceContext, Transport,
};
use skep_wire::{Method, proto::runtime::Tensor};
use tokio::sync::Notify;

const SOON: Duration = Duration::from_secs(10);

fn serving(service: impl Service + 'static) -> Node {
    Node::start_native(NetConfig::default(), router(service))
}

fn limited(limits: NetLimits, service: impl Service + 'static) -> Node {
    Node::start_native(NetConfig { limits, ..NetConfig::default() }, router(service))
}

fn client_of(server: &Node) -> Node {
    let client = Node::start_native(NetConfig::client(), Router::new());
    client.knows(server);
    client
}

fn all_native(client: &Node) -> bool {
    let status = client.net.status();
    status.calls_out == status.calls_out_native
}

#[tokio::test]
async fn expert_calls_take_the_native_wire_from_the_first_on_and_dht_calls_never() {
    let server = serving(Echo);
    let client = client_of(&server);
    for method in Method::ALL {
        let body = if method.carries_tensors() { tensors(&[3]) } else { message(b"x") };
        let answer = client.call(server.peer(), method, body.clone()).await.unwrap();
        assert_eq!(buffers(&answer.body), buffers(&body), "{method}");
    }
    assert_eq!((client.net.status().calls_out, client.net.status().calls_out_native), (6, 3));
    assert_eq!((server.net.status().calls_in, server.net.status().calls_in_native), (6, 3));
    assert_eq!(client.net.status().streams_out, 0);
}

#[tokio::test]
async fn hiveminds_wire_is_taken_when_one_side_does_not_speak_the_native_one() {
    let (modern, old) = (serving(Echo), Node::serving(Echo));
    let new_client = client_of(&old);
    let old_client = Node::client();
    old_client.knows(&modern);
    new_client.call(old.peer(), Method::Forward, tensors(&[3])).await.unwrap();
    old_client.call(modern.peer(), Method::Forward, tensors(&[3])).await.unwrap();
    assert_eq!((new_client.net.status().calls_out_native, old_client.net.status().calls_out_native), (0, 0));
}

#[tokio::test]
async fn a_server_that_learns_to_serve_experts_later_is_called_natively_from_then_on() {
    let router = Router::new();
    router.route(&[Method::Ping], Arc::new(Echo));
    let server = Node::start_native(NetConfig::default(), router.clone());
    let client = client_of(&server);
    client.ping(server.peer()).await.unwrap();
    router.route(&Method::ALL, Arc::new(Echo));
    for _ in 0..500 {
        client.call(server.peer(), Method::Forward, tensors(&[3])).await.unwrap();
        if client.net.status().calls_out_native > 0 {
            return;
        }
        client.clock.sleep_until(client.clock.now() + Duration::from_millis(10)).await;
    }
    panic!("the peer's new protocol was not noticed");
}

#[tokio::test]
async fn deadline_request_id_and_trace_of_the_caller_reach_the_service() {
    let (seen_tx, seen) = std::sync::mpsc::sync_channel(1);
    let server = serving(function(move |inbound: Inbound| {
        seen_tx.send((inbound.peer, inbound.knows_overload, inbound.meta)).unwrap();
        Ok(inbound.body)
    }));
    let client = client_of(&server);
    let trace = Some(TraceContext { trace_id: 5 << 100, span_id: 6 });
    let id = RequestId(7 << 90);
    let meta = Meta { deadline: client.within(Duration::from_secs(20)), request_id: id, trace };
    let (peer, method) = (server.peer(), Method::Backward);
    client.net.call(Call { peer, method, body: tensors(&[1]), meta }).await.unwrap();
    let (peer, knows_overload, meta) = seen.recv().unwrap();
    assert_eq!((peer, knows_overload, meta.request_id, meta.trace), (client.peer(), true, id, trace));
    let left = meta.deadline.remaining(server.clock.now());
    assert!((10..=20).contains(&left.as_secs()), "{left:?}");
}

#[tokio::test]
async fn typed_errors_arrive_as_what_they_are() {
    let (uid, reason) = (String::from("e.1"), String::from("a torn step"));
    let retry_after = Duration::from_micros(1_234_567);
    let errors = [
        ServeError::UnknownExpert { uid: uid.clone() },
        ServeError::Invalid("bad shape".into()),
        ServeError::Overloaded { waiting: 70, limit: 64, retry_after },
        ServeError::Deadline,
        ServeError::Refused("not you".into()),
        ServeError::AlreadyApplied,
        ServeError::Poisoned { uid, reason },
        ServeError::Internal("a bug".into()),
        ServeError::Stopping,
    ];
    let (turn, given) = (AtomicUsize::new(0), errors.clone());
    let server = serving(function(move |_| Err(given[turn.fetch_add(1, Ordering::SeqCst)].clone())));
    let client = client_of(&server);
    for error in errors {
        let got = client.call(server.peer(), Method::Forward, tensors(&[1])).await.unwrap_err();
        match error {
            ServeError::Deadline => assert!(matches!(got, RpcError::Deadline { step: Step::Exchange, .. }), "{got}"),
            other => assert_eq!(got, other.into_rpc(server.peer())),
        }
    }
    assert!(all_native(&client));
}

/// Answers with its load.
struct Loaded;

const LOAD: ServerLoad = ServerLoad { waiting_rows: 12, oldest_wait: Duration::from_micros(3456) };

impl Service for Loaded {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        Box::pin(async move { Ok(Answer { body: inbound.body, load: Some(LOAD) }) })
    }
}

#[tokio::test]
async fn the_servers_load_comes_with_its_answers() {
    let server = serving(Loaded);
    let client = client_of(&server);
    for body in [tensors(&[1]), tensors(&[1 << 19])] {
        assert_eq!(client.call(server.peer(), Method::Forward, body).await.unwrap().load, Some(LOAD));
    }
}

#[tokio::test]
async fn tensors_of_any_size_arrive_as_they_were_sent() {
    let server = serving(Echo);
    let client = client_of(&server);
    let sizes = [
        &[][..],
        &[0],
        &[3, 0, 5],
        &[4000, 80],
        &[(256 << 10) - 1],
        &[(256 << 10) + 1],
        &[7, 2_500_000, 0, 100],
        &[6 << 20],
    ];
    for sizes in sizes {
        let Body::Tensors(mut body) = tensors(sizes) else { panic!("tensors") };
        for (i, tensor) in body.tensors.iter_mut().enumerate() {
            *tensor = Tensor { requires_grad: i % 2 == 0, compression: i as i32, ..tensor.clone() };
        }
        let answer = client.call(server.peer(), Method::Backward, Body::Tensors(body.clone())).await.unwrap();
        let expected = Body::Tensors(TensorBody { uid: String::new(), ..body });
        assert!(answer.body == expected, "sizes {sizes:?}");
    }
    assert!(all_native(&client));
}

/// Answers even calls only after an odd one has come.
#[derive(Clone, Default)]
struct OddFirst(Arc<Notify>);

impl Service for OddFirst {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let odd_came = self.0.clone();
        Box::pin(async move {
            match buffers(&inbound.body)[0].len() {
                4 => odd_came.notify_one(),
                _ => odd_came.notified().await,
            }
            Ok(Answer { body: inbound.body, load: None })
        })
    }
}

#[tokio::test]
async fn answers_come_in_any_order() {
    let server = serving(OddFirst::default());
    let client = client_of(&server);
    let call = |n| client.call(server.peer(), Method::Forward, tensors(&[n]));
    let (first, second) = futures::future::join(call(2), call(1)).await;
    assert_eq!((buffers(&first.unwrap().body)[0].len(), buffers(&second.unwrap().body)[0].len()), (8, 4));
}

#[tokio::test]
async fn more_calls_than_may_be_under_way_wait_their_turn() {
    let server = serving(Echo);
    let client = client_of(&server);
    client.call(server.peer(), Method::Forward, tensors(&[1])).await.unwrap();
    let calls = (0..2000).map(|i| client.call(server.peer(), Method::Forward, tensors(&[i])));
    for (i, answer) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(buffers(&answer.unwrap().body)[0].len(), 4 * i);
    }
    assert!(all_native(&client));
    assert_eq!((client.net.status().connections, server.net.status().serving), (1, 0));
}

#[tokio::test]
async fn many_large_bodies_both_ways_at_once_all_arrive() {
    let server = serving(Echo);
    let client = client_of(&server);
    let calls = (0..8).map(|i| client.call(server.peer(), Method::Forward, tensors(&[(1 << 20) + i])));
    for (i, answer) in join_all(calls).await.into_iter().enumerate() {
        assert!(buffers(&answer.unwrap().body) == buffers(&tensors(&[(1 << 20) + i])));
    }
}

#[tokio::test]
async fn both_sides_of_one_connection_call_each_other() {
    let (one, other) = (serving(Echo), serving(Echo));
    one.knows(&other);
    one.call(other.peer(), Method::Forward, tensors(&[1])).await.unwrap();
    other.call(one.peer(), Method::Forward, tensors(&[1])).await.unwrap();
    assert!(all_native(&one) && all_native(&other));
    assert_eq!(one.net.status().connections, 1);
}

#[tokio::test]
async fn a_caller_who_gives_up_takes_the_work_along() {
    let never = Never::default();
    let server = serving(never.clone());
    let client = client_of(&server);
    for (n, body) in [tensors(&[1]), tensors(&[1 << 20])].into_iter().enumerate() {
        let call = tokio::spawn(client.call(server.peer(), Method::Forward, body));
        eventually("the call is served", || never.began.load(Ordering::SeqCst) == n + 1).await;
        assert_eq!(never.dropped.load(Ordering::SeqCst), n);
        call.abort();
        eventually("the work is dropped", || never.dropped.load(Ordering::SeqCst) == n + 1).await;
    }
    assert_eq!((server.net.status().calls_in_left, server.net.status().serving), (2, 0));
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_and_takes_the_work_along() {
    let never = Never::default();
    let server = serving(never.clone());
    let client = client_of(&server);
    for n in 1..=2 {
        let start = client.clock.now();
        let wait = Duration::from_millis(500);
        let result = client.call_within(wait, server.peer(), Method::Forward, tensors(&[1])).await;
        assert!(matches!(result, Err(RpcError::Deadline { .. })), "{result:?}");
        assert!((500..3000).contains(&client.clock.now().since(start).as_millis()));
        eventually("the work is dropped", || never.dropped.load(Ordering::SeqCst) == n).await;
    }
    assert!(!client.net.is_banned(server.peer()), "a slow expert does not make a dead peer");
}

#[tokio::test]
async fn calls_of_a_link_that_is_lost_fail_as_unreachable() {
    let never = Never::default();
    let server = serving(never.clone());
    let client = client_of(&server);
    let calls = (0..3).map(|_| client.call(server.peer(), Method::Backward, tensors(&[1])));
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    eventually("the calls are served", || never.began.load(Ordering::SeqCst) == 3).await;
    let peer = server.peer();
    drop(server);
    for result in calls.await.unwrap() {
        assert!(
            matches!(&result, Err(RpcError::Unreachable { step: Step::Exchange, peer: lost, .. }) if *lost == peer),
            "{result:?}"
        );
    }
}

#[tokio::test]
async fn calls_over_the_limit_are_refused_with_a_time_to_come_back() {
    let never = Never::default();
    let server = limited(NetLimits { max_inbound_calls: 3, ..NetLimits::default() }, never.clone());
    let client = client_of(&server);
    let call = |body| client.call(server.peer(), Method::Forward, body);
    let held: Vec<_> = (0..3).map(|_| tokio::spawn(call(tensors(&[1])))).collect();
    eventually("three calls are served", || never.began.load(Ordering::SeqCst) == 3).await;
    for body in [tensors(&[1]), tensors(&[2 << 20])] {
        let refused = call(body).await;
        assert!(
            matches!(refused, Err(RpcError::Overloaded { waiting: 3, limit: 3, retry_after }) if !retry_after.is_zero()),
            "{refused:?}"
        );
    }
    assert_eq!(server.net.status().calls_in_refused, 2);
    assert!(held.iter().all(|call| !call.is_finished()));
    held.iter().for_each(|call| call.abort());
    eventually("the door is free", || server.net.status().serving == 0).await;
}

#[tokio::test]
async fn a_request_that_finds_no_memory_is_refused_and_the_next_is_served() {
    let (never, bytes) = (Never::default(), 3 << 20);
    let limits = NetLimits { max_inbound_bytes: bytes, max_body_bytes: bytes, ..NetLimits::default() };
    let server = limited(limits, never.clone());
    let client = client_of(&server);
    let call = || client.call(server.peer(), Method::Forward, tensors(&[1 << 19]));
    let held = tokio::spawn(call());
    eventually("a call is served", || never.began.load(Ordering::SeqCst) == 1).await;
    let refused = call().await;
    assert!(matches!(refused, Err(RpcError::Overloaded { .. })), "{refused:?}");
    held.abort();
    eventually("its work is dropped", || server.net.status().serving == 0).await;
    let _next = tokio::spawn(call());
    eventually("the next is served", || never.began.load(Ordering::SeqCst) == 2).await;
}

#[tokio::test]
async fn a_request_that_never_fits_is_not_asked_to_come_again() {
    let bytes = 3 << 20;
    let server = limited(NetLimits { max_inbound_bytes: bytes, max_body_bytes: bytes, ..NetLimits::default() }, Echo);
    let client = client_of(&server);
    // The body alone would fit.
    let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Forward, tensors(&[bytes / 4])).await
    else {
        panic!("expected an error")
    };
    assert!(text.contains("over the limit of 3145728"), "{text}");
}

#[tokio::test]
async fn a_request_over_the_body_limit_gets_a_readable_error() {
    let server = limited(NetLimits { max_body_bytes: 5 << 20, ..NetLimits::default() }, Echo);
    let client = client_of(&server);
    let Err(RpcError::Remote { text }) = client.call(server.peer(), Method::Forward, tensors(&[2 << 20])).await else {
        panic!("expected an error")
    };
    assert!(text.contains("5242880"), "{text}");
    client.call(server.peer(), Method::Forward, tensors(&[1 << 20])).await.unwrap();
}

#[tokio::test]
async fn an_answer_over_the_callers_limit_is_not_taken() {
    let server = serving(function(|_| Ok(tensors(&[2 << 20]))));
    let limits = NetLimits { max_body_bytes: 5 << 20, ..NetLimits::default() };
    let client = Node::start_native(NetConfig { limits, ..NetConfig::client() }, Router::new());
    client.knows(&server);
    let refused = client.call(server.peer(), Method::Forward, tensors(&[1])).await;
    assert_eq!(refused, Err(RpcError::TooLarge { size: 8 << 20, limit: 5 << 20 }));
    let refused = client.call(server.peer(), Method::Info, message(b"x")).await;
    assert!(matches!(refused, Err(RpcError::TooLarge { .. } | RpcError::Malformed { .. })), "{refused:?}");
    assert!(all_native(&client));
}

#[tokio::test]
async fn a_service_that_panics_costs_only_its_caller_an_answer() {
    let server = serving(function(|inbound: Inbound| match buffers(&inbound.body)[0].is_empty() {
        true => panic!("a bug in a service"),
        false => Ok(inbound.body),
    }));
    let client = client_of(&server);
    let failed = client.call(server.peer(), Method::Forward, tensors(&[0])).await;
    assert!(matches!(&failed, Err(RpcError::Remote { text }) if text.contains("panicked")), "{failed:?}");
    client.call(server.peer(), Method::Forward, tensors(&[1])).await.unwrap();
    assert_eq!(server.net.status().serving, 0);
}

/// Answers once it is told to.
#[derive(Clone, Default)]
struct Gate(Arc<Notify>, Arc<AtomicUsize>);

impl Service for Gate {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let gate = self.clone();
        gate.1.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            gate.0.notified().await;
            Ok(Answer { body: inbound.body, load: None })
        })
    }
}

#[tokio::test]
async fn what_is_being_served_is_answered_before_the_network_stops() {
    let gate = Gate::default();
    let server = serving(gate.clone());
    let client = client_of(&server);
    let size = 3 << 20;
    let call = tokio::spawn(client.call(server.peer(), Method::Forward, tensors(&[size])));
    eventually("the call is served", || gate.1.load(Ordering::SeqCst) == 1).await;
    let deadline: Deadline = server.within(SOON);
    let stop = server.net.shutdown(deadline);
    let late = async {
        let refused = client.call(server.peer(), Method::Forward, tensors(&[1])).await;
        gate.0.notify_one();
        refused
    };
    let ((), refused) = futures::future::join(stop, late).await;
    assert!(matches!(&refused, Err(RpcError::Remote { text }) if text.contains("stopping")), "{refused:?}");
    assert!(buffers(&call.await.unwrap().unwrap().body) == buffers(&tensors(&[size])));
}

#[tokio::test]
async fn a_call_to_a_peer_that_cannot_be_reached_says_so() {
    let client = Node::start_native(NetConfig::client(), Router::new());
    let nobody = libp2p_identity::PeerId::random();
    let result = client.call(nobody, Method::Forward, tensors(&[1])).await;
    assert!(matches!(result, Err(RpcError::Unreachable { step: Step::Resolve, .. })), "{result:?}");
}
