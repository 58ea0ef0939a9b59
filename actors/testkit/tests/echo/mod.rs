//! A service that echoes, and calls to it.
#![allow(dead_code, reason = "each test uses its own part")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, SharedClock};
use skep_rpc::{Answer, Body, Call, Inbound, Meta, RequestId, Router, ServeError, Service, Transport};
use skep_testkit::{Sim, SimTransport};
use skep_wire::Method;

pub const SECOND: Duration = Duration::from_secs(1);
pub const TENTH: Duration = Duration::from_millis(100);

/// Echoes after a while, and lists what it was told.
#[derive(Clone)]
pub struct Echo {
    clock: SharedClock,
    takes: Duration,
    pub heard: Arc<Mutex<Vec<Body>>>,
}

impl Echo {
    pub fn new(sim: &Sim, takes: Duration) -> Self {
        Self { clock: sim.clock(), takes, heard: Arc::default() }
    }

    pub fn serve(&self, sim: &Sim) -> SimTransport {
        let router = Router::new();
        router.route(&[Method::Ping], Arc::new(self.clone()));
        sim.network().node(router)
    }
}

impl Service for Echo {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        self.heard.lock().unwrap().push(inbound.body.clone());
        let (clock, until) = (self.clock.clone(), self.clock.now() + self.takes);
        Box::pin(async move {
            clock.sleep_until(until).await;
            assert_ne!(inbound.body, Body::Message("panic".into()), "ordered");
            Ok(Answer { body: inbound.body, load: None })
        })
    }
}

/// A peer that echoes after a while.
pub fn echo(sim: &Sim, takes: Duration) -> SimTransport {
    Echo::new(sim, takes).serve(sim)
}

/// A call that has a second.
pub fn call(sim: &Sim, peer: PeerId, text: &'static str) -> Call {
    let meta = Meta { deadline: Deadline::after(sim.now(), SECOND), request_id: RequestId(1), trace: None };
    Call { peer, method: Method::Ping, body: Body::Message(Bytes::from_static(text.as_bytes())), meta }
}

/// One call to a peer of the test; whether it was answered.
pub async fn asks(sim: &Sim, client: &SimTransport, server: &SimTransport) -> bool {
    client.call(call(sim, server.local_peer(), "hi")).await.is_ok()
}
