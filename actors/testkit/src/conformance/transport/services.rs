//! What callees of the suite do.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use skep_kernel::SharedClock;
use skep_rpc::{Answer, Body, Inbound, Router, ServeError, Service, TensorBody};
use skep_wire::Method;

/// A router on which one service serves every method.
pub(super) fn router(service: impl Service + 'static) -> Router {
    let router = Router::new();
    router.route(&Method::ALL, Arc::new(service));
    router
}

/// Answers with what it was sent, and keeps a list of that.
#[derive(Clone, Default)]
pub(super) struct Echo {
    heard: Arc<Mutex<Vec<Body>>>,
}

impl Echo {
    pub fn heard(&self) -> Vec<Body> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Service for Echo {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(inbound.body.clone());
        let body = without_uid(inbound.body);
        Box::pin(async move { Ok(Answer { body, load: None }) })
    }
}

/// Answers name no expert.
fn without_uid(body: Body) -> Body {
    match body {
        Body::Tensors(body) => Body::Tensors(TensorBody { uid: String::new(), ..body }),
        body => body,
    }
}

/// Answers after a while with what it was sent; counts those that it began and those that were dropped.
#[derive(Clone)]
pub(super) struct Slow {
    clock: SharedClock,
    takes: Duration,
    began: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
}

impl Slow {
    pub fn new(clock: SharedClock, takes: Duration) -> Self {
        Self { clock, takes, began: Arc::default(), dropped: Arc::default() }
    }

    pub fn began(&self) -> usize {
        self.began.load(Ordering::SeqCst)
    }

    pub fn dropped(&self) -> usize {
        self.dropped.load(Ordering::SeqCst)
    }
}

/// Counts a call that is dropped before its end.
struct Unfinished {
    dropped: Arc<AtomicUsize>,
    is_done: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_done {
            self.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Service for Slow {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        self.began.fetch_add(1, Ordering::SeqCst);
        let unfinished = Unfinished { dropped: self.dropped.clone(), is_done: false };
        let (clock, takes) = (self.clock.clone(), self.takes);
        Box::pin(async move {
            let mut unfinished = unfinished;
            clock.sleep_until(clock.now() + takes).await;
            unfinished.is_done = true;
            Ok(Answer { body: without_uid(inbound.body), load: None })
        })
    }
}

/// Fails in the way that it is asked for.
pub(super) struct Failing;

impl Service for Failing {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let outcome = match inbound.body {
            Body::Message(text) if &*text == b"unknown" => Err(ServeError::UnknownExpert { uid: "ffn.7".to_owned() }),
            Body::Message(text) if &*text == b"invalid" => Err(ServeError::Invalid("odd shape".to_owned())),
            Body::Message(text) if &*text == b"internal" => Err(ServeError::Internal("broken inside".to_owned())),
            Body::Message(text) if &*text == b"panic" => panic!("ordered panic"),
            body => Ok(Answer { body, load: None }),
        };
        Box::pin(async move { outcome })
    }
}
