//! Sends inbound calls to the service of their method.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::future::BoxFuture;
use skep_kernel::panics::contain_future;
use skep_wire::Method;
use tracing::error;

use crate::{Answer, Inbound, ServeError, Service, SharedService};

/// A table from method to service. A method without one is refused; a transport does not offer it.
#[derive(Clone, Default)]
pub struct Router {
    routes: Arc<RwLock<BTreeMap<Method, SharedService>>>,
    version: Arc<AtomicU64>,
}

impl Router {
    /// A router without routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routes `methods` to `service`, replacing earlier routes.
    pub fn route(&self, methods: &[Method], service: SharedService) {
        let mut routes = self.routes.write().expect("no panic while the routes are held");
        let replaced: Vec<_> = methods.iter().map(|method| routes.insert(*method, service.clone())).collect();
        // A service may panic when it is dropped: never while the routes are held.
        drop(routes);
        self.version.fetch_add(1, Ordering::Release);
        drop(replaced);
    }

    /// Withdraws routes; calls that are being served go on.
    pub fn withdraw(&self, methods: &[Method]) {
        let mut routes = self.routes.write().expect("no panic while the routes are held");
        let withdrawn: Vec<_> = methods.iter().map(|method| routes.remove(method)).collect();
        drop(routes);
        self.version.fetch_add(1, Ordering::Release);
        drop(withdrawn);
    }

    /// A number that changes when routes do.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The methods that have a route.
    pub fn methods(&self) -> Vec<Method> {
        self.routes.read().expect("no panic while the routes are held").keys().copied().collect()
    }
}

impl Service for Router {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let route = self.routes.read().expect("no panic while the routes are held").get(&inbound.method).cloned();
        match route {
            // A panic must cost its own caller an answer and nobody else anything. This is the one place that sees to it:
            // transports and callers of this process come through here.
            Some(service) => Box::pin(async move {
                let (peer, method) = (inbound.peer, inbound.method);
                let served = contain_future(async { service.serve(inbound).await }).await;
                served.unwrap_or_else(|panic| {
                    error!(%peer, %method, panic, "a service panicked");
                    Err(ServeError::Internal(format!("{method} failed: its service panicked: {panic}")))
                })
            }),
            None => {
                let text = format!("{} is not served here", inbound.method);
                Box::pin(async move { Err(ServeError::Refused(text)) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::Arc,
    };

    use libp2p_identity::PeerId;
    use skep_kernel::{Deadline, Moment};

    use super::*;
    use crate::{Body, Meta, RequestId};

    /// Answers with nothing; panics when dropped, if told so.
    struct Fragile(bool);

    impl Service for Fragile {
        fn serve(&self, _: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
            Box::pin(async { Ok(Answer { body: Body::Message(Default::default()), load: None }) })
        }
    }

    impl Drop for Fragile {
        fn drop(&mut self) {
            assert!(!self.0, "told to");
        }
    }

    async fn call(router: &Router, method: Method) -> Result<Answer, ServeError> {
        let meta = Meta { deadline: Deadline::at(Moment::START), request_id: RequestId(1), trace: None };
        let body = Body::Message(Default::default());
        let inbound = Inbound { peer: PeerId::random(), method, body, meta, knows_overload: true };
        router.serve(inbound).await
    }

    /// Panics at once, or when its answer is awaited.
    struct Broken {
        at_once: bool,
    }

    impl Service for Broken {
        fn serve(&self, _: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
            assert!(!self.at_once, "told to");
            Box::pin(async { panic!("told to") })
        }
    }

    #[tokio::test]
    async fn a_service_that_panics_is_an_error_that_names_it() {
        let router = Router::new();
        for at_once in [true, false] {
            router.route(&[Method::Forward], Arc::new(Broken { at_once }));
            let text = "rpc_forward failed: its service panicked: told to".to_owned();
            assert_eq!(call(&router, Method::Forward).await, Err(ServeError::Internal(text)));
        }
    }

    #[tokio::test]
    async fn a_service_that_panics_when_dropped_leaves_the_other_routes_alone() {
        let router = Router::new();
        router.route(&[Method::Ping], Arc::new(Fragile(false)));
        router.route(&[Method::Forward], Arc::new(Fragile(true)));
        let replace = || router.route(&[Method::Forward], Arc::new(Fragile(true)));
        assert!(catch_unwind(AssertUnwindSafe(replace)).is_err());
        assert!(call(&router, Method::Forward).await.is_ok() && call(&router, Method::Ping).await.is_ok());
        assert!(catch_unwind(AssertUnwindSafe(|| router.withdraw(&[Method::Forward]))).is_err());
        assert!(matches!(call(&router, Method::Forward).await, Err(ServeError::Refused(_))));
        assert!(call(&router, Method::Ping).await.is_ok());
    }
}
