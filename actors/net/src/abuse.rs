//! What bad peers may send, and that it costs them an error and nobody else anything.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::{
    Stream, Swarm, Transport as _,
    core::{muxing::StreamMuxerBox, upgrade::Version},
    noise, swarm, tcp, yamux,
};
use skep_kernel::TokioClock;
use skep_rpc::{Body, Router, RpcError, Step, Transport as _};
use skep_wire::{
    Framing, Method,
    frame::{
        stream,
        unary::{self, UnaryMessage},
    },
    limits::MAX_UNARY_FRAME,
    proto::{gather_request, runtime::Tensor},
};

use crate::{
    NetConfig, NetLimits,
    busy_poll::BusyPoll,
    common::*,
    io,
    streams::{self, Connections, OpenError, Opened},
};

const ID: unary::CallId = [9; 16];

fn sleeps_at_once() -> Arc<BusyPoll> {
    Arc::new(BusyPoll::new(Arc::new(TokioClock::system()), Duration::ZERO))
}

async fn open(client: &Node, server: &Node, method: Method, framing: Framing) -> Opened {
    client.knows(server);
    client.net.shared().reach(server.peer()).await.unwrap();
    client.net.shared().connections.open(server.peer(), method, framing).await.unwrap()
}

fn request(proto: &str, data: &[u8]) -> Vec<u8> {
    unary::encode_request(&ID, b"anybody", proto, vec![Bytes::copy_from_slice(data)]).unwrap().concat()
}

async fn send(stream: &mut Stream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
}

/// Everything until the stream ends, however it ends.
async fn rest(stream: &mut Stream) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        all.extend_from_slice(&buffer[..n]);
    }
    all
}

async fn unary_error(stream: &mut Stream) -> String {
    let frame = io::read_unary(stream).await.unwrap();
    assert_eq!(frame.call_id, ID);
    match frame.message {
        UnaryMessage::Error(text) => text,
        other => panic!("expected an error, got {other:?}"),
    }
}

#[tokio::test]
async fn a_wrong_handler_name_inside_the_request_gets_an_error() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let mut opened = open(&client, &server, Method::Ping, Framing::Unary).await;
    send(&mut opened.stream, &request("DHTProtocol.rpc_pong", b"")).await;
    let text = unary_error(&mut opened.stream).await;
    assert!(text.starts_with("ValueError(") && text.contains("rpc_pong"), "{text}");
    client.ping(server.peer()).await.unwrap();
}

#[tokio::test]
async fn an_answer_instead_of_a_request_gets_an_error() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let mut opened = open(&client, &server, Method::Ping, Framing::Unary).await;
    send(&mut opened.stream, &unary::encode_response(&ID, vec![]).unwrap().concat()).await;
    assert!(unary_error(&mut opened.stream).await.contains("expected a request"));
}

#[tokio::test]
async fn tensors_that_are_no_protobuf_get_an_error() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let mut opened = open(&client, &server, Method::Forward, Framing::Unary).await;
    send(&mut opened.stream, &request("ConnectionHandler.rpc_forward", &[0xff; 20])).await;
    assert!(unary_error(&mut opened.stream).await.starts_with("ValueError("));
}

#[tokio::test]
async fn bytes_that_are_no_request_end_their_stream_and_nothing_else() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let mut other_id = request("DHTProtocol.rpc_ping", b"");
    other_id[2] = 15;
    let too_long = {
        let mut length = unsigned_varint::encode::usize_buffer();
        unsigned_varint::encode::usize(MAX_UNARY_FRAME + 1, &mut length).to_vec()
    };
    let foreign: [&[u8]; 5] = [b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64], &other_id, &too_long, &[0]];
    for bytes in foreign {
        let mut opened = open(&client, &server, Method::Ping, Framing::Unary).await;
        send(&mut opened.stream, bytes).await;
        // A frame may be shorter than it says: only its end tells.
        opened.stream.close().await.unwrap();
        assert_eq!(rest(&mut opened.stream).await, b"", "{bytes:?}");
    }
    for bytes in [&[2; 9][..], &[0, 0xff, 0, 0, 0, 0, 0, 0, 0], &[0, 0, 0, 0, 0, 0, 0x50, 0, 0]] {
        let mut opened = open(&client, &server, Method::Forward, Framing::Stream).await;
        send(&mut opened.stream, bytes).await;
        assert_eq!(rest(&mut opened.stream).await, b"", "{bytes:?}");
    }
    client.ping(server.peer()).await.unwrap();
    assert_eq!(server.net.status().connections, 1);
    eventually("nothing is left", || server.net.status().serving == 0).await;
}

#[tokio::test]
async fn half_a_close_or_a_late_byte_means_that_the_caller_left() {
    let never = Never::default();
    let (server, client) = (Node::serving(never.clone()), Node::client());
    for (n, closes) in [true, false].into_iter().enumerate() {
        let mut opened = open(&client, &server, Method::Ping, Framing::Unary).await;
        send(&mut opened.stream, &request("DHTProtocol.rpc_ping", b"")).await;
        eventually("the call is served", || never.began.load(Ordering::SeqCst) == n + 1).await;
        if closes {
            opened.stream.close().await.unwrap()
        } else {
            send(&mut opened.stream, &[0]).await
        }
        eventually("the work is dropped", || never.dropped.load(Ordering::SeqCst) == n + 1).await;
        assert_eq!(rest(&mut opened.stream).await, b"");
    }
}

/// A stream dropped on one side only may be reset, which takes the end of an answer along.
#[tokio::test]
async fn an_answered_stream_lives_until_its_caller_closes_it() {
    let limits = NetLimits { max_inbound_streams: 1, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(Echo));
    let client = Node::client();
    let mut answered = open(&client, &server, Method::Ping, Framing::Unary).await;
    send(&mut answered.stream, &request("DHTProtocol.rpc_ping", b"hello")).await;
    assert!(rest(&mut answered.stream).await.ends_with(b"hello"));
    let mut another = open(&client, &server, Method::Ping, Framing::Unary).await;
    assert_eq!(rest(&mut another.stream).await, b"");
    assert_eq!(server.net.status().streams_in_refused, 1);
    answered.stream.close().await.unwrap();
    client.ping_until_answered(server.peer()).await;
}

#[tokio::test]
async fn a_streamed_request_that_makes_no_sense_gets_a_bare_error() {
    let (server, client) = (Node::serving(Echo), Node::client());
    let piece = |uid: &str, dtype: &str| {
        let tensor = Tensor { buffer: vec![1; 4].into(), size: vec![1], dtype: dtype.to_owned(), ..Tensor::default() };
        stream::encode_message(gather_request(uid, &[tensor])).unwrap().concat()
    };
    let nonsense = [
        ([piece("a.0", "float32"), piece("b.0", "float32")], "two experts"),
        ([piece("a.0", ""), piece("a.0", "float32")], "no dtype"),
        ([stream::encode_message(vec![Bytes::from_static(&[0xff; 9])]).unwrap().concat(), vec![]], "Protobuf"),
    ];
    for (messages, reason) in nonsense {
        let mut opened = open(&client, &server, Method::Forward, Framing::Stream).await;
        send(&mut opened.stream, &[messages.concat(), stream::END.to_vec()].concat()).await;
        let answer = rest(&mut opened.stream).await;
        let mut decoder = stream::Decoder::new();
        decoder.push(&answer);
        match decoder.next_frame().unwrap() {
            Some(stream::Frame::Error(text)) => assert!(text.contains(reason) && !text.contains('('), "{text}"),
            other => panic!("expected an error frame, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn streams_over_the_limit_of_a_connection_are_reset_and_counted() {
    let limits = NetLimits { max_inbound_streams: 10, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(Echo));
    let client = Node::client();
    let mut silent = Vec::new();
    for _ in 0..13 {
        silent.push(open(&client, &server, Method::Ping, Framing::Unary).await);
    }
    eventually("three are reset", || server.net.status().streams_in_refused == 3).await;
    silent.clear();
    // The server learns of the ends one by one.
    client.ping_until_answered(server.peer()).await;
}

#[tokio::test]
async fn a_request_that_never_comes_is_given_up() {
    let mut config = NetConfig::default();
    config.timeouts.read_request = Duration::from_millis(100);
    let (server, client) = (Node::start(config, router(Echo)), Node::client());
    for framing in [Framing::Unary, Framing::Stream] {
        let mut opened = open(&client, &server, Method::Forward, framing).await;
        send(&mut opened.stream, &[0]).await;
        assert_eq!(rest(&mut opened.stream).await, b"");
    }
}

#[tokio::test]
async fn requests_that_never_fit_the_byte_budget_are_drained_and_told_so() {
    let limits = NetLimits { max_inbound_bytes: 100_000, max_body_bytes: 100_000, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(Echo));
    let client = Node::client();
    client.knows(&server);
    for n in [100_000, 1 << 20] {
        let text = remote_error(&client, &server, tensors(&[n])).await;
        assert!(text.contains("over the limit of 100000"), "{text}");
    }
    client.call(server.peer(), Method::Forward, tensors(&[1000])).await.unwrap();
}

#[tokio::test]
async fn requests_for_which_others_hold_the_bytes_are_drained_and_refused() {
    let never = Never::default();
    let limits = NetLimits { max_inbound_bytes: 6 << 20, max_body_bytes: 6 << 20, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(never.clone()));
    let client = Node::client();
    client.knows(&server);
    let held = tokio::spawn(client.call(server.peer(), Method::Forward, tensors(&[1 << 20])));
    eventually("a call is served", || never.began.load(Ordering::SeqCst) == 1).await;
    // In one message and in several.
    for n in [(2 << 20) / 4, 1 << 20] {
        let text = remote_error(&client, &server, tensors(&[n, n / 16])).await;
        assert!(text.contains("overloaded"), "{text}");
    }
    held.abort();
}

/// A tensor of two bytes becomes a hundred times as much in memory.
#[tokio::test]
async fn what_messages_become_in_memory_is_counted_and_not_only_their_bytes() {
    let limits = NetLimits { max_inbound_bytes: 1 << 20, max_body_bytes: 1 << 20, ..NetLimits::default() };
    let server = Node::start(NetConfig { limits, ..NetConfig::default() }, router(Echo));
    let client = Node::client();
    let empty = vec![Tensor { dtype: "x".to_owned(), ..Tensor::default() }; 10_000];
    let bytes = gather_request("a.0", &empty).concat();
    assert!(bytes.len() < 100_000);

    let mut unary = open(&client, &server, Method::Forward, Framing::Unary).await;
    send(&mut unary.stream, &request("ConnectionHandler.rpc_forward", &bytes)).await;
    let text = unary_error(&mut unary.stream).await;
    assert!(text.contains("over the limit of 1048576"), "{text}");

    let mut streamed = open(&client, &server, Method::Forward, Framing::Stream).await;
    let one = stream::encode_message(gather_request("a.0", &empty[..1])).unwrap().concat();
    for _ in 0..10_000 {
        send(&mut streamed.stream, &one).await;
    }
    send(&mut streamed.stream, &stream::END).await;
    let mut decoder = stream::Decoder::new();
    decoder.push(&rest(&mut streamed.stream).await);
    let Ok(Some(stream::Frame::Error(text))) = decoder.next_frame() else { panic!("expected an error frame") };
    assert!(text.contains("1048576") || text.contains("overloaded"), "{text}");
    eventually("nothing is held", || server.net.shared().door.free_bytes() == 1 << 20).await;
}

async fn remote_error(client: &Node, server: &Node, body: Body) -> String {
    match client.call(server.peer(), Method::Forward, body).await {
        Err(RpcError::Remote { text }) => text,
        other => panic!("expected a remote error, got {:?}", other.map(drop)),
    }
}

/// A peer that never says by identify what it speaks.
#[tokio::test]
async fn a_backward_call_never_goes_out_without_its_id_for_want_of_a_word() {
    let key = keypair();
    let (seen_by, seen) = std::sync::mpsc::sync_channel(10);
    let behaviour = streams::Behaviour::new(streams::Shared {
        busy_poll: sleeps_at_once(),
        connections: Arc::default(),
        router: Some(router(Echo)),
        max_inbound_streams: 10,
        negotiation_timeout: Duration::from_secs(5),
        native: None,
        // The stream is dropped: no call is answered.
        accept: Box::new(move |accepted| seen_by.send(accepted.method).unwrap()),
    });
    let transport = crate::transport::build(&key, false, Duration::from_secs(5)).unwrap();
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(Duration::from_secs(60));
    let peer = key.public().to_peer_id();
    let mut mute = Swarm::new(transport, behaviour, peer, config);
    mute.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
    let address = loop {
        if let swarm::SwarmEvent::NewListenAddr { address, .. } = mute.select_next_some().await {
            break address;
        }
    };
    let mute = tokio::spawn(async move { while mute.next().await.is_some() {} });

    let client = Node::start_native(NetConfig::client(), Router::new());
    client.net.add_addresses(peer, vec![address]);
    let wait = Duration::from_millis(2500);
    let late = client.call_within(wait, peer, Method::Backward, tensors(&[1])).await;
    assert!(matches!(late, Err(RpcError::Deadline { step: Step::OpenStream, .. })), "{late:?}");
    assert!(seen.try_recv().is_err(), "nothing was sent");
    // What trains nothing takes the other wire.
    client.call(peer, Method::Forward, tensors(&[1])).await.unwrap_err();
    assert_eq!(seen.recv().unwrap(), Method::Forward);
    mute.abort();
}

/// A peer without our muxer wrapper: its proposals carry the reserved prefix on the wire.
#[tokio::test]
async fn a_remote_that_spells_the_reserved_prefix_is_refused() {
    let server = Node::serving(Echo);
    let key = keypair();
    let transport = tcp::tokio::Transport::default()
        .upgrade(Version::V1)
        .authenticate(noise::Config::new(&key).unwrap())
        .multiplex(yamux::Config::default())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
        .boxed();
    let connections = Arc::<Connections>::default();
    let behaviour = streams::Behaviour::new(streams::Shared {
        busy_poll: sleeps_at_once(),
        connections: connections.clone(),
        router: None::<Router>,
        max_inbound_streams: 1,
        negotiation_timeout: Duration::from_secs(5),
        native: None,
        accept: Box::new(drop),
    });
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(Duration::from_secs(60));
    let mut stock = Swarm::new(transport, behaviour, key.public().to_peer_id(), config);
    stock.dial(server.net.addresses().remove(0)).unwrap();
    let peer = server.peer();
    let opened = async {
        loop {
            match connections.open(peer, Method::Ping, Framing::Unary).await {
                Err(OpenError::NotConnected) => tokio::task::yield_now().await,
                opened => break opened.map(drop),
            }
        }
    };
    let refused = tokio::select! {
        biased;
        opened = opened => opened,
        () = async { loop { stock.next().await; } } => unreachable!("the loop never ends"),
        () = server.clock.sleep_until(server.within(Duration::from_secs(60)).moment()) => panic!("not within a minute"),
    };
    assert!(matches!(refused, Err(OpenError::Unsupported(_) | OpenError::Io(_))), "{refused:?}");
    assert_eq!(server.net.status().calls_in, 0);
}
