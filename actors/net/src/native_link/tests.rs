//! Both sides of a link against a scripted other side, in virtual time.

use std::{future::poll_fn, task::Poll, time::Duration};

use bytes::Bytes;
use futures::{AsyncReadExt as _, AsyncWriteExt as _, future::BoxFuture};
use libp2p::PeerId;
use skep_kernel::{Deadline, SharedClock, TokioClock, WallTime};
use skep_rpc::{Answer, Body, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, Service, Step, TensorBody};
use skep_wire::{
    Method,
    frame::native::{
        AnswerHead, BodyHead, Event, Failure, Header, Lane as Which, MAX_CHUNK, MAX_HEADER, Pool, Reader, RequestHead,
        TensorHead, Writer,
    },
    proto::runtime::Tensor,
};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::{
    NetConfig, NetLimits,
    budget::Budget,
    inbound::{Door, Server},
    peers::SharedBook,
    pipe::Pipe,
};

fn node(config: &NetConfig, router: Router) -> Arc<Context> {
    let server = Server {
        router,
        clock: Arc::new(TokioClock::starting_at(WallTime(0.0))),
        limits: config.limits.clone(),
        timeouts: config.timeouts.clone(),
        book: SharedBook::new(10),
        counters: Arc::default(),
        door: Arc::new(Door::new(&config.limits)),
    };
    let answers = Arc::new(Budget::new(config.limits.max_answer_bytes));
    Arc::new(Context { server: Arc::new(server), answers, serves: true, pool: Pool::new(POOL_BYTES) })
}

/// The other side of one stream.
struct FarEnd {
    pipe: Pipe,
    reader: Reader,
    writer: Writer<()>,
}

impl FarEnd {
    fn new(pipe: Pipe) -> Self {
        Self { pipe, reader: Reader::new(), writer: Writer::new() }
    }

    /// The next frame; `None` when the stream has ended.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.reader.next_event().unwrap() {
                return Some(event);
            }
            match self.pipe.read(self.reader.space()).await {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.reader.filled(n),
            }
        }
    }

    async fn raw(&mut self, bytes: &[u8]) {
        // The other side may have ended the stream already.
        let _ended = self.pipe.write_all(bytes).await;
    }

    async fn send(&mut self, header: Header) {
        let bytes = header.encode().unwrap();
        self.raw(&bytes).await;
    }

    /// All of a body whose beginning was sent without any of it.
    async fn chunk(&mut self, id: u64, bytes: usize) {
        self.send(Header::Chunk { id, bytes: u32::try_from(bytes).unwrap() }).await;
        self.raw(&vec![7; bytes]).await;
    }

    async fn send_body(&mut self, id: u64, head: Header, body: Bytes) {
        self.writer.body(id, head, vec![body], ()).unwrap();
        while let bytes = self.writer.next_bytes().to_vec()
            && !bytes.is_empty()
        {
            self.writer.wrote(bytes.len());
            self.raw(&bytes).await;
        }
    }
}

fn answer(id: u64, bytes: usize) -> Header {
    let tensor = TensorHead {
        dtype: "uint8".into(),
        size: vec![bytes as u32],
        requires_grad: false,
        compression: 0,
        bytes: bytes as u64,
    };
    let body = BodyHead::Tensors { uid: String::new(), tensors: vec![tensor] };
    Header::Answer(AnswerHead { id, load: None, body, bytes: 0 })
}

/// A header of five bytes a tensor; all together are one byte.
fn tiny_tensors(count: usize) -> BodyHead {
    let tensor = TensorHead { dtype: String::new(), size: vec![], requires_grad: false, compression: 0, bytes: 0 };
    let mut tensors = vec![tensor; count];
    tensors[0].bytes = 1;
    BodyHead::Tensors { uid: String::new(), tensors }
}

/// What a peer of ours never sends.
fn oversize() -> Vec<u8> {
    (MAX_HEADER as u32 + 1).to_le_bytes().to_vec()
}

mod calling {
    use super::*;

    /// A caller with whatever streams it asks for.
    struct Rig {
        clock: SharedClock,
        peer: PeerId,
        book: SharedBook,
        state: watch::Receiver<Native>,
        streams: mpsc::Receiver<(Which, Pipe)>,
    }

    impl Rig {
        fn new() -> Self {
            Self::with(NetConfig::default())
        }

        fn with(config: NetConfig) -> Self {
            let node = node(&config, Router::new());
            let (clock, peer, book) = (node.server.clock.clone(), PeerId::random(), node.server.book.clone());
            #[allow(clippy::disallowed_methods, reason = "never simulated")]
            let (tell, state) = watch::channel(Native::Unknown);
            let (give, streams) = mpsc::channel(100);
            let mut caller = Caller::new(node, peer, tell);
            tokio::spawn(async move {
                caller.identified(true);
                loop {
                    let which = poll_fn(|cx| caller.poll(cx)).await;
                    let (ours, theirs) = Pipe::pair(64 << 10);
                    caller.opened(which, ours);
                    give.send((which, theirs)).await.unwrap();
                }
            });
            Self { clock, peer, book, state, streams }
        }

        /// The link, and the far ends of its streams behind their greetings.
        async fn link(&mut self) -> (Arc<Link>, [FarEnd; 2]) {
            let mut ends = Vec::new();
            for which in [Which::Calls, Which::Bulk] {
                let (opened, pipe) = self.streams.recv().await.unwrap();
                assert_eq!(opened, which);
                ends.push(FarEnd::new(pipe));
            }
            let state = self.state.wait_for(|state| matches!(state, Native::Ready(_))).await.unwrap().clone();
            let Native::Ready(link) = state else { unreachable!("waited for") };
            for (end, which) in ends.iter_mut().zip([Which::Calls, Which::Bulk]) {
                assert_eq!(end.next().await, Some(Event::Hello(which)));
            }
            (link, ends.try_into().ok().expect("two"))
        }

        fn call(&self, link: &Arc<Link>, bytes: usize, wait: Duration) -> link::Waiting {
            self.try_call(link, bytes, wait).unwrap()
        }

        fn try_call(&self, link: &Arc<Link>, bytes: usize, wait: Duration) -> Result<link::Waiting, RpcError> {
            let tensor = Tensor { buffer: vec![7; bytes].into(), dtype: "uint8".into(), ..Tensor::default() };
            let body = Body::Tensors(TensorBody { uid: "e.0".into(), tensors: vec![tensor] });
            let now = self.clock.now();
            let meta = Meta { deadline: Deadline::after(now, wait), request_id: RequestId(5), trace: None };
            link.clone().call(now, Call { peer: self.peer, method: Method::Forward, body, meta })
        }
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn small_calls_and_large_ones_take_different_streams_and_answers_either() {
        let mut rig = Rig::new();
        let (link, [mut calls, mut bulk]) = rig.link().await;
        let (small, large) = (rig.call(&link, 10, LONG), rig.call(&link, MAX_CHUNK + 1, LONG));
        assert!(matches!(calls.next().await, Some(Event::Request(RequestHead { id: 0, .. }))));
        assert!(matches!(bulk.next().await, Some(Event::Request(RequestHead { id: 1, .. }))));
        assert!(matches!(bulk.next().await, Some(Event::Body { id: 1, bytes }) if bytes.len() == MAX_CHUNK + 1));
        bulk.send_body(0, answer(0, 3), Bytes::from_static(b"abc")).await;
        calls.send_body(1, answer(1, 1), Bytes::from_static(b"d")).await;
        let Body::Tensors(body) = small.await.unwrap().body else { panic!("tensors") };
        assert_eq!(body.tensors[0].buffer, "abc");
        assert_eq!(large.await.unwrap().body.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn offering_the_wire_makes_nobody_a_peer_of_ours() {
        let mut rig = Rig::new();
        let _open = rig.link().await;
        assert!(!rig.book.is_ours(rig.peer));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_at_its_deadline_and_the_peer_is_told() {
        let mut rig = Rig::new();
        let (link, [mut calls, mut bulk]) = rig.link().await;
        let begin = rig.clock.now();
        let late = rig.call(&link, MAX_CHUNK + 1, Duration::from_millis(500));
        let later = rig.call(&link, 10, Duration::from_secs(2));
        let sooner = rig.call(&link, 10, Duration::from_millis(100));
        for (call, after) in [(sooner, 100), (late, 500), (later, 2000)] {
            let waited = Duration::from_millis(after);
            assert_eq!(call.await, Err(RpcError::Deadline { peer: rig.peer, step: Step::Exchange, waited }));
            let passed = rig.clock.now() - begin;
            assert!(passed >= waited && passed < waited + Duration::from_millis(2), "{passed:?}");
        }
        // Each is cancelled behind its request, on the same stream.
        let mut cancelled = Vec::new();
        while cancelled.len() < 2 {
            if let Event::Cancel(id) = calls.next().await.expect("the stream goes on") {
                cancelled.push(id);
            }
        }
        assert_eq!(cancelled, [2, 1]);
        while bulk.next().await.expect("the stream goes on") != Event::Cancel(0) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_caller_left_before_it_was_sent_is_not_sent() {
        let mut rig = Rig::new();
        let (link, [mut calls, _bulk]) = rig.link().await;
        drop(rig.call(&link, 10, LONG));
        let _next = rig.call(&link, 10, LONG);
        assert!(matches!(calls.next().await, Some(Event::Request(RequestHead { id: 1, .. }))));
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_nobody_waits_for_are_read_and_forgotten() {
        let mut rig = Rig::new();
        let (link, [mut calls, _bulk]) = rig.link().await;
        let call = rig.call(&link, 10, LONG);
        calls.send_body(77, answer(77, 5), Bytes::from_static(b"hello")).await;
        calls.send(Header::Error { id: 78, failure: Failure::Deadline }).await;
        calls.send_body(0, answer(0, 1), Bytes::from_static(b"x")).await;
        assert_eq!(call.await.unwrap().body.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_begun_on_both_streams_ends_the_link() {
        let mut rig = Rig::new();
        let (link, [mut calls, mut bulk]) = rig.link().await;
        let call = rig.call(&link, 10, LONG);
        assert!(matches!(calls.next().await, Some(Event::Request(RequestHead { id: 0, .. }))));
        calls.send(answer(0, 10)).await;
        bulk.send(answer(0, 100)).await;
        let ended = call.await;
        assert!(matches!(ended, Err(RpcError::Malformed { .. })), "{ended:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_find_no_memory_fail_before_their_bodies_come_and_the_others_go_on() {
        const SIZE: usize = 400 << 10;
        let limits = NetLimits { max_answer_bytes: 1 << 20, max_body_bytes: 1 << 20, ..NetLimits::default() };
        let mut rig = Rig::with(NetConfig { limits, ..NetConfig::default() });
        let (link, [mut calls, _bulk]) = rig.link().await;
        let (first, second) = (rig.call(&link, 10, LONG), rig.call(&link, 10, LONG));
        let (third, fourth) = (rig.call(&link, 10, LONG), rig.call(&link, 10, LONG));
        calls.send(answer(0, SIZE)).await;
        calls.send(answer(1, SIZE)).await;
        calls.send(answer(2, SIZE)).await;
        assert_eq!(third.await, Err(RpcError::NoRoom { size: SIZE, limit: 1 << 20 }));
        while calls.next().await.expect("the stream goes on") != Event::Cancel(2) {}
        // An answer that has come holds its memory until it is taken.
        calls.chunk(0, SIZE).await;
        calls.send(answer(3, SIZE)).await;
        assert_eq!(fourth.await, Err(RpcError::NoRoom { size: SIZE, limit: 1 << 20 }));
        assert_eq!(first.await.unwrap().body.len(), SIZE);
        let fifth = rig.call(&link, 10, LONG);
        calls.send(answer(4, SIZE)).await;
        calls.chunk(4, SIZE).await;
        calls.chunk(1, SIZE).await;
        assert_eq!(fifth.await.unwrap().body.len(), SIZE);
        assert_eq!(second.await.unwrap().body.len(), SIZE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_of_many_tensors_counts_with_what_they_become_in_memory() {
        let limits = NetLimits { max_answer_bytes: 1 << 20, max_body_bytes: 1 << 20, ..NetLimits::default() };
        let mut rig = Rig::with(NetConfig { limits, ..NetConfig::default() });
        let (link, [mut calls, _bulk]) = rig.link().await;
        let call = rig.call(&link, 10, LONG);
        let body = tiny_tensors(5000);
        calls.send(Header::Answer(AnswerHead { id: 0, load: None, body, bytes: 0 })).await;
        assert_eq!(call.await, Err(RpcError::TooLarge { size: 1, limit: 1 << 20 }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_no_requests_is_given_up_long_before_their_deadlines() {
        let config = NetConfig::default();
        let patience = config.timeouts.write_answer;
        let mut rig = Rig::with(config);
        let (link, ends) = rig.link().await;
        let hour = Duration::from_secs(3600);
        let (call, begin) = (rig.call(&link, 200 << 10, hour), rig.clock.now());
        let lost = call.await;
        assert!(matches!(lost, Err(RpcError::Unreachable { step: Step::Exchange, .. })), "{lost:?}");
        let passed = rig.clock.now() - begin;
        assert!(passed >= patience && passed < patience + Duration::from_secs(1), "{passed:?}");
        drop(ends);
        // What takes its bytes again is asked again, on streams of its own.
        let (link, [mut calls, _bulk]) = rig.link().await;
        let call = rig.call(&link, 10, hour);
        calls.next().await.unwrap();
        calls.send_body(0, answer(0, 1), Bytes::from_static(b"x")).await;
        call.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_its_requests_and_thinks_long_is_not_given_up() {
        let mut rig = Rig::new();
        let (link, [mut calls, _bulk]) = rig.link().await;
        let call = rig.call(&link, 10, Duration::from_secs(3600));
        while !matches!(calls.next().await.unwrap(), Event::Body { .. }) {}
        rig.clock.sleep_until(rig.clock.now() + Duration::from_secs(3000)).await;
        calls.send_body(0, answer(0, 1), Bytes::from_static(b"x")).await;
        call.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_link_fails_what_was_sent_as_unreachable_and_says_what_was_not() {
        let mut rig = Rig::new();
        let (link, [mut calls, bulk]) = rig.link().await;
        let all: Vec<_> = (0..300).map(|_| rig.call(&link, 10, LONG)).collect();
        for _ in 0..2 * 256 {
            calls.next().await.unwrap();
        }
        drop((calls, bulk));
        let mut steps = Vec::new();
        for call in all {
            match call.await {
                Err(RpcError::Unreachable { peer, step, .. }) if peer == rig.peer => steps.push(step),
                other => panic!("{other:?}"),
            }
        }
        assert!(steps[..256].iter().all(|step| *step == Step::Exchange));
        assert!(steps[256..].iter().all(|step| *step == Step::OpenStream));
        let late = rig.try_call(&link, 10, LONG).map(drop);
        assert!(matches!(late, Err(RpcError::Unreachable { step: Step::OpenStream, .. })), "{late:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_breaks_the_rules_gets_three_more_links_and_then_none() {
        let mut rig = Rig::new();
        let request = RequestHead {
            id: 0,
            method: Method::Info,
            wait_us: 1,
            request_id: 0,
            trace: None,
            body: BodyHead::Message { bytes: 0 },
            bytes: 0,
        };
        let frames = [
            oversize(),
            Header::Hello { lane: Which::Calls }.encode().unwrap().to_vec(),
            Header::Request(request).encode().unwrap().to_vec(),
            Header::Cancel { id: 0 }.encode().unwrap().to_vec(),
        ];
        for frame in frames {
            let (link, [mut calls, _bulk]) = rig.link().await;
            let call = rig.call(&link, 10, LONG);
            calls.next().await.unwrap();
            calls.raw(&frame).await;
            let failed = call.await;
            assert!(matches!(failed, Err(RpcError::Malformed { .. })), "{failed:?}");
        }
        rig.state.wait_for(|state| matches!(state, Native::Absent)).await.unwrap();
        assert!(rig.streams.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_of_the_wrong_form_is_malformed_and_costs_the_others_nothing() {
        let mut rig = Rig::new();
        let (link, [mut calls, _bulk]) = rig.link().await;
        let (one, other) = (rig.call(&link, 10, LONG), rig.call(&link, 10, LONG));
        let body = BodyHead::Message { bytes: 1 };
        let head = Header::Answer(AnswerHead { id: 0, load: None, body, bytes: 0 });
        calls.send_body(0, head, Bytes::from_static(b"x")).await;
        assert!(matches!(one.await, Err(RpcError::Malformed { .. })));
        calls.send_body(1, answer(1, 1), Bytes::from_static(b"x")).await;
        other.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn calls_over_the_limit_of_a_link_are_refused() {
        let mut rig = Rig::new();
        let (link, _ends) = rig.link().await;
        let all: Vec<_> = (0..4096).map(|_| rig.call(&link, 1, LONG)).collect();
        let refused = rig.try_call(&link, 1, LONG).map(drop);
        assert!(matches!(refused, Err(RpcError::Overloaded { limit: 4096, .. })), "{refused:?}");
        drop(all);
        tokio::task::yield_now().await;
        rig.try_call(&link, 1, LONG).map(drop).unwrap();
    }
}

mod serving {
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
            Box::pin(async move { Ok(Answer { body: inbound.body, load: None }) })
        }
    }

    /// A servant to which the test opens streams.
    struct Rig {
        node: Arc<Context>,
        open: mpsc::Sender<Pipe>,
    }

    impl Rig {
        fn new(config: &NetConfig) -> Self {
            let router = Router::new();
            router.route(&Method::ALL, Arc::new(Echo));
            let node = node(config, router);
            let mut servant = Servant::new(node.clone(), PeerId::random());
            let (open, mut opened) = mpsc::channel(10);
            tokio::spawn(poll_fn(move |cx| {
                loop {
                    servant.poll(cx);
                    match opened.poll_recv(cx) {
                        Poll::Ready(Some(pipe)) => servant.accept(pipe),
                        Poll::Ready(None) => return Poll::Ready(()),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }));
            Self { node, open }
        }

        async fn open(&self) -> FarEnd {
            let (ours, theirs) = Pipe::pair(64 << 10);
            self.open.send(theirs).await.unwrap();
            FarEnd::new(ours)
        }

        async fn greeted(&self, lane: Which) -> FarEnd {
            let mut end = self.open().await;
            end.send(Header::Hello { lane }).await;
            end
        }

        fn inside(&self) -> usize {
            self.node.server.door.inside()
        }
    }

    fn request(id: u64, method: Method, bytes: u64) -> Header {
        let body = BodyHead::Message { bytes };
        Header::Request(RequestHead { id, method, wait_us: 5_000_000, request_id: 1, trace: None, body, bytes: 0 })
    }

    async fn is_served(end: &mut FarEnd, id: u64) {
        end.send_body(id, request(id, Method::Info, 2), Bytes::from_static(b"hi")).await;
        assert!(matches!(end.next().await, Some(Event::Answer(AnswerHead { id: got, .. })) if got == id));
        assert!(matches!(end.next().await, Some(Event::Body { id: got, bytes }) if got == id && bytes == "hi"));
    }

    async fn until_inside(rig: &Rig, calls: usize) {
        while rig.inside() != calls {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancellation_on_the_other_stream_drops_the_body_that_had_begun() {
        let rig = Rig::new(&NetConfig::default());
        let (mut calls, mut bulk) = (rig.greeted(Which::Calls).await, rig.greeted(Which::Bulk).await);
        calls.send(request(1, Method::Info, 10)).await;
        calls.send(Header::Chunk { id: 1, bytes: 4 }).await;
        calls.raw(b"half").await;
        until_inside(&rig, 1).await;
        bulk.send(Header::Cancel { id: 1 }).await;
        until_inside(&rig, 0).await;
        // The same number again, on the other stream; the rest of the first body belongs to nothing.
        bulk.send(request(1, Method::Info, 2)).await;
        until_inside(&rig, 1).await;
        calls.send(Header::Chunk { id: 1, bytes: 6 }).await;
        calls.raw(b" later").await;
        bulk.send(Header::Chunk { id: 1, bytes: 2 }).await;
        bulk.raw(b"hi").await;
        assert!(matches!(calls.next().await, Some(Event::Answer(AnswerHead { id: 1, .. }))));
        assert!(matches!(calls.next().await, Some(Event::Body { id: 1, bytes }) if bytes == "hi"));
        is_served(&mut calls, 2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_break_the_rules_end_the_link_and_nothing_else() {
        let rig = Rig::new(&NetConfig::default());
        let begin = request(1, Method::Info, 10).encode().unwrap().to_vec();
        let answer = answer(1, 0).encode().unwrap().to_vec();
        let error = Header::Error { id: 1, failure: Failure::Deadline }.encode().unwrap().to_vec();
        let hello = Header::Hello { lane: Which::Calls }.encode().unwrap().to_vec();
        let over = Header::Chunk { id: 1, bytes: 11 }.encode().unwrap().to_vec();
        let foreign = b"GET / HTTP/1.1\r\n\r\n".to_vec();
        for bytes in [oversize(), [&begin[..], &begin].concat(), answer, error, hello, [begin, over].concat(), foreign]
        {
            let mut end = rig.greeted(Which::Calls).await;
            is_served(&mut end, 0).await;
            end.raw(&bytes).await;
            assert_eq!(end.next().await, None, "{bytes:?}");
            assert_eq!(rig.inside(), 0);
        }
        is_served(&mut rig.greeted(Which::Calls).await, 0).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_a_greeting_is_ended() {
        let rig = Rig::new(&NetConfig::default());
        let mut end = rig.open().await;
        end.send(Header::Cancel { id: 3 }).await;
        assert_eq!(end.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_of_the_dht_are_refused_on_this_wire() {
        let rig = Rig::new(&NetConfig::default());
        let mut end = rig.greeted(Which::Calls).await;
        end.send_body(0, request(0, Method::Find, 2), Bytes::from_static(b"hi")).await;
        assert!(matches!(end.next().await, Some(Event::Error { id: 0, failure: Failure::Refused(_) })));
        is_served(&mut end, 1).await;
    }

    #[tokio::test(start_paused = true)]
    async fn requests_of_many_tensors_count_with_what_they_become_in_memory() {
        let limits = NetLimits { max_inbound_bytes: 4 << 20, max_body_bytes: 1 << 20, ..NetLimits::default() };
        let rig = Rig::new(&NetConfig { limits, ..NetConfig::default() });
        let mut end = rig.greeted(Which::Calls).await;
        let request = |id, tensors| {
            let body = tiny_tensors(tensors);
            let method = Method::Forward;
            Header::Request(RequestHead { id, method, wait_us: 5_000_000, request_id: 1, trace: None, body, bytes: 0 })
        };
        end.send(request(0, 26_000)).await;
        let refused = end.next().await;
        assert!(matches!(&refused, Some(Event::Error { id: 0, failure: Failure::Invalid(_) })), "{refused:?}");
        // They wait for their byte with what they hold.
        end.send(request(1, 10_000)).await;
        end.send(request(2, 10_000)).await;
        let refused = end.next().await;
        assert!(matches!(&refused, Some(Event::Error { id: 2, failure: Failure::Overloaded { .. } })), "{refused:?}");
        assert_eq!(rig.inside(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_costs_its_call_only() {
        let rig = Rig::new(&NetConfig::default());
        let mut end = rig.greeted(Which::Calls).await;
        end.send(request(0, Method::Info, 1 << 20)).await;
        is_served(&mut end, 1).await;
        assert_eq!(rig.inside(), 1);
        assert_eq!(end.next().await, Some(Event::Error { id: 0, failure: Failure::Deadline }));
        assert_eq!(rig.inside(), 0);
        is_served(&mut end, 2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_no_answers_is_given_up() {
        let config = NetConfig::default();
        let rig = Rig::new(&config);
        let mut end = rig.greeted(Which::Calls).await;
        let size = 200 << 10;
        end.send_body(0, request(0, Method::Info, size), Bytes::from(vec![1; size as usize])).await;
        let clock = rig.node.server.clock.clone();
        clock.sleep_until(clock.now() + config.timeouts.write_answer / 2).await;
        assert_eq!(rig.inside(), 1, "the answer is not out");
        clock.sleep_until(clock.now() + config.timeouts.write_answer).await;
        assert_eq!(rig.inside(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_opens_its_streams_anew_is_served() {
        let rig = Rig::new(&NetConfig::default());
        let (mut calls, mut bulk) = (rig.greeted(Which::Calls).await, rig.greeted(Which::Bulk).await);
        is_served(&mut calls, 0).await;
        let mut again = rig.greeted(Which::Calls).await;
        is_served(&mut again, 0).await;
        assert_eq!((calls.next().await, bulk.next().await), (None, None));
    }
}
