//! Sends inbound calls to the service of their method.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use futures::future::BoxFuture;
use skep_wire::Method;

use crate::{Answer, Inbound, ServeError, Service, SharedService};

/// A table from method to service. A method without one is refused; a transport does not offer it.
#[derive(Clone, Default)]
pub struct Router {
    routes: Arc<RwLock<BTreeMap<Method, SharedService>>>,
}

impl Router {
    /// A router without routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routes `methods` to `service`, replacing earlier routes.
    pub fn route(&self, methods: &[Method], service: SharedService) {
        let mut routes = self.routes.write().expect("no panic while the routes are held");
        for method in methods {
            routes.insert(*method, service.clone());
        }
    }

    /// Withdraws routes; calls that are being served go on.
    pub fn withdraw(&self, methods: &[Method]) {
        let mut routes = self.routes.write().expect("no panic while the routes are held");
        routes.retain(|method, _| !methods.contains(method));
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
            Some(service) => service.serve(inbound),
            None => {
                let text = format!("{} is not served here", inbound.method);
                Box::pin(async move { Err(ServeError::Refused(text)) })
            }
        }
    }
}
