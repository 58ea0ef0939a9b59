//! Serves other nodes: reads their calls, asks the actor, writes its answers. Parsing stays off the actor's thread.

use std::sync::Arc;

use futures::future::BoxFuture;
use skep_kernel::{AskError, Deadline};
use skep_rpc::{Answer, Body, Inbound, ServeError, Service};
use skep_wire::Method;

use crate::{core::message::Request, handle::NodeContext, messages::InboundCall};

/// The methods that a member of the DHT serves.
pub(crate) const METHODS: [Method; 3] = [Method::Ping, Method::Store, Method::Find];

/// The service behind them. An answer takes at most twice `wait_timeout`, whatever the caller would wait.
pub(crate) struct DhtService {
    pub shared: Arc<NodeContext>,
}

impl Service for DhtService {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        Box::pin(serve(self.shared.clone(), inbound))
    }
}

async fn serve(shared: Arc<NodeContext>, inbound: Inbound) -> Result<Answer, ServeError> {
    let Inbound { peer, method, body, meta, .. } = inbound;
    let Body::Message(bytes) = body else {
        return Err(ServeError::Invalid(format!("{method} takes one message, not tensors")));
    };
    let request = Request::decode(method, &bytes).map_err(|error| ServeError::Invalid(error.to_string()))?;
    let clock = &*shared.clock;
    let deadline = meta.deadline.min(Deadline::after(clock.now(), shared.config.wait() * 2));
    let asked = shared.inbound.ask(clock, deadline, |reply| InboundCall { peer, request, reply }).await;
    let response = asked.map_err(|error| match error {
        AskError::Full { capacity } => overloaded(&shared, capacity),
        AskError::Elapsed => ServeError::Deadline,
        AskError::Gone | AskError::WouldDeadlock => ServeError::Stopping,
    })??;
    Ok(Answer { body: Body::Message(response.encode()), load: None })
}

/// The refusal of a call when as many as may be are waiting.
pub(crate) fn overloaded(shared: &NodeContext, limit: usize) -> ServeError {
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    ServeError::Overloaded { waiting: limit, limit, retry_after: shared.config.wait() }
}
