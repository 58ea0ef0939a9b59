//! The port through which calls arrive.

use std::sync::Arc;

use futures::future::BoxFuture;

use crate::{Answer, Inbound, ServeError};

/// Answers calls of other peers.
pub trait Service: Send + Sync {
    /// Serves one call. The transport drops the future when the caller leaves or the deadline passes; what has not
    /// begun by then never runs.
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>>;
}

/// A service that several connections share.
pub type SharedService = Arc<dyn Service>;
