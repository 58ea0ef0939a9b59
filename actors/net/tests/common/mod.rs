//! Two or more networks in one process, over loopback.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p_identity::{Keypair, PeerId};
use skep_kernel::{Deadline, SharedClock, TokioClock};
use skep_net::{Net, NetConfig, identity};
use skep_rpc::{
    Answer, Body, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, Service, TensorBody, Transport,
};
use skep_wire::{Method, proto::runtime::Tensor};

pub fn clock() -> SharedClock {
    Arc::new(TokioClock::system())
}

pub fn keypair() -> Keypair {
    identity::generate(identity::KeyKind::Ed25519).unwrap().keypair().clone()
}

/// A network with its clock.
pub struct Node {
    pub net: Net,
    pub clock: SharedClock,
}

impl Node {
    /// On hivemind's wire only, whatever the other side offers.
    pub fn start(config: NetConfig, router: Router) -> Node {
        Node::start_native(NetConfig { native: false, ..config }, router)
    }

    /// On the wire that the configuration says.
    pub fn start_native(config: NetConfig, router: Router) -> Node {
        let clock = clock();
        Node { net: Net::start(config, keypair(), router, clock.clone()).unwrap(), clock }
    }

    pub fn serving(service: impl Service + 'static) -> Node {
        Node::start(NetConfig::default(), router(service))
    }

    pub fn client() -> Node {
        Node::start(NetConfig::client(), Router::new())
    }

    pub fn peer(&self) -> PeerId {
        self.net.local_peer()
    }

    pub fn knows(&self, other: &Node) {
        self.net.add_addresses(other.peer(), other.net.addresses());
    }

    pub fn within(&self, wait: Duration) -> Deadline {
        Deadline::after(self.clock.now(), wait)
    }

    pub fn call_within(
        &self,
        wait: Duration,
        peer: PeerId,
        method: Method,
        body: Body,
    ) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let meta = Meta { deadline: self.within(wait), request_id: RequestId(1), trace: None };
        self.net.call(Call { peer, method, body, meta })
    }

    pub fn call(&self, peer: PeerId, method: Method, body: Body) -> BoxFuture<'static, Result<Answer, RpcError>> {
        self.call_within(Duration::from_secs(30), peer, method, body)
    }

    pub async fn ping(&self, peer: PeerId) -> Result<Answer, RpcError> {
        self.call(peer, Method::Ping, message(b"ping")).await
    }

    /// Pings again and again, for at most a minute.
    pub async fn ping_until_answered(&self, peer: PeerId) {
        let deadline = self.within(Duration::from_secs(60));
        while let Err(error) = self.ping(peer).await {
            let now = self.clock.now();
            assert!(!deadline.has_passed(now), "no answer within a minute: {error}");
            self.clock.sleep_until(now + Duration::from_millis(10)).await;
        }
    }
}

pub fn router(service: impl Service + 'static) -> Router {
    let router = Router::new();
    router.route(&Method::ALL, Arc::new(service));
    router
}

/// Answers with what it was sent.
pub struct Echo;

impl Service for Echo {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let body = match inbound.body {
            Body::Tensors(body) => Body::Tensors(TensorBody { uid: String::new(), ..body }),
            body => body,
        };
        Box::pin(async move { Ok(Answer { body, load: None }) })
    }
}

/// Calls that began, and calls whose future was dropped before it ended.
#[derive(Clone, Default)]
pub struct Never {
    pub began: Arc<AtomicUsize>,
    pub dropped: Arc<AtomicUsize>,
}

struct OnDrop(Arc<AtomicUsize>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Service for Never {
    fn serve(&self, _: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let guard = OnDrop(self.dropped.clone());
        self.began.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            let _guard = guard;
            std::future::pending().await
        })
    }
}

/// A service that is one function.
pub fn function<F: Fn(Inbound) -> Result<Body, ServeError> + Send + Sync>(function: F) -> Fun<F> {
    Fun(function)
}

pub struct Fun<F>(F);

impl<F: Fn(Inbound) -> Result<Body, ServeError> + Send + Sync> Service for Fun<F> {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let result = (self.0)(inbound);
        Box::pin(async move { result.map(|body| Answer { body, load: None }) })
    }
}

pub fn message(bytes: &[u8]) -> Body {
    Body::Message(Bytes::copy_from_slice(bytes))
}

/// Float tensors of these numbers of elements.
pub fn tensors(sizes: &[usize]) -> Body {
    let tensor = |n: &usize| Tensor {
        buffer: (0..4 * n).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into(),
        size: vec![u32::try_from(*n).unwrap()],
        dtype: "float32".to_owned(),
        ..Tensor::default()
    };
    Body::Tensors(TensorBody { uid: "ffn.0".to_owned(), tensors: sizes.iter().map(tensor).collect() })
}

pub fn buffers(body: &Body) -> Vec<Bytes> {
    match body {
        Body::Tensors(body) => body.tensors.iter().map(|tensor| tensor.buffer.clone()).collect(),
        Body::Message(bytes) => vec![bytes.clone()],
    }
}

/// Waits until a condition holds, for at most a minute.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        let clock = clock();
        clock.sleep_until(clock.now() + Duration::from_millis(10)).await;
    }
    panic!("{what}: not within a minute");
}
