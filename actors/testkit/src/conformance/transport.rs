//! What every [`Transport`](skep_rpc::Transport) promises, as functions over a factory of two connected ones.
//!
//! ```
//! use std::sync::Arc;
//! use skep_testkit::{Sim, conformance::transport::{self, Connected}};
//!
//! Sim::with_seed(1).run(|sim| async move {
//!     sim.network().max_message(32 << 20);
//!     let make = |router| {
//!         let sim = sim.clone();
//!         async move {
//!             let callee = sim.network().node(router);
//!             let peer = skep_rpc::Transport::local_peer(&callee);
//!             Connected::new(Arc::new(sim.network().client()), peer, sim.clock(), callee)
//!         }
//!     };
//!     transport::ordering(&make).await;
//! });
//! ```

mod cases;
mod services;

use std::{any::Any, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, SharedClock};
use skep_rpc::{Answer, Body, Call, Meta, RequestId, Router, RpcError, SharedTransport, TensorBody};
use skep_wire::{Method, proto::runtime::Tensor};

pub use cases::{cancellation, deadlines, errors, half_close, many_calls, ordering, size_limits};

/// How long anything may take that has no deadline of its own in a case.
const PATIENCE: Duration = Duration::from_secs(30);

/// A caller that knows how to reach a callee.
///
/// ```
/// use std::sync::Arc;
/// use skep_rpc::{Router, Transport};
/// use skep_testkit::{Sim, conformance::transport::{self, Connected}};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let make = |router: Router| {
///         let sim = sim.clone();
///         async move {
///             let callee = sim.network().node(router);
///             Connected::new(Arc::new(sim.network().client()), callee.local_peer(), sim.clock(), callee)
///         }
///     };
///     transport::cancellation(&make).await;
/// });
/// ```
pub struct Connected {
    caller: SharedTransport,
    callee: PeerId,
    clock: SharedClock,
    _keep: Box<dyn Any>,
}

impl Connected {
    /// `caller` reaches `callee`, which serves what the factory was given. `clock` is what deadlines of both count on;
    /// `keep` lives as long as the connection is needed.
    pub fn new(caller: SharedTransport, callee: PeerId, clock: SharedClock, keep: impl Any) -> Self {
        Self { caller, callee, clock, _keep: Box::new(keep) }
    }

    fn call(&self, wait: Duration, method: Method, body: Body) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let deadline = Deadline::after(self.clock.now(), wait);
        let meta = Meta { deadline, request_id: RequestId(1), trace: None };
        self.caller.call(Call { peer: self.callee, method, body, meta })
    }

    async fn ask(&self, text: &str) -> Result<Body, RpcError> {
        let body = Body::Message(Bytes::copy_from_slice(text.as_bytes()));
        self.call(PATIENCE, Method::Ping, body).await.map(|answer| answer.body)
    }

    /// Waits until something holds.
    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Deadline::after(self.clock.now(), PATIENCE);
        while !holds() {
            let now = self.clock.now();
            assert!(!deadline.has_passed(now), "{what}: not within {PATIENCE:?}");
            self.clock.sleep_until(now + Duration::from_millis(5)).await;
        }
    }
}

/// Makes connected pairs: each call gives a new one, whose callee serves what the router routes.
///
/// ```
/// use std::sync::Arc;
/// use skep_rpc::{Router, Transport};
/// use skep_testkit::{Sim, conformance::transport::{self, Connected}};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let make = |router: Router| {
///         let sim = sim.clone();
///         async move {
///             let callee = sim.network().node(router);
///             Connected::new(Arc::new(sim.network().client()), callee.local_peer(), sim.clock(), callee)
///         }
///     };
///     transport::many_calls(&make).await;
/// });
/// ```
pub trait Factory {
    /// One pair.
    fn connect(&self, router: Router) -> impl Future<Output = Connected>;
}

impl<F: Fn(Router) -> Connecting, Connecting: Future<Output = Connected>> Factory for F {
    fn connect(&self, router: Router) -> impl Future<Output = Connected> {
        self(router)
    }
}

/// All cases, one after the other.
///
/// # Panics
/// When one of them fails.
pub async fn all(make: &impl Factory) {
    ordering(make).await;
    deadlines(make).await;
    cancellation(make).await;
    half_close(make).await;
    size_limits(make).await;
    errors(make).await;
    many_calls(make).await;
}

/// A tensor of so many bytes, a multiple of four.
fn tensors(bytes: usize) -> Body {
    let tensor = Tensor {
        buffer: (0..bytes).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into(),
        size: vec![u32::try_from(bytes / 4).expect("a test's tensor is small")],
        dtype: "float32".to_owned(),
        ..Tensor::default()
    };
    Body::Tensors(TensorBody { uid: "ffn.0".to_owned(), tensors: vec![tensor] })
}
