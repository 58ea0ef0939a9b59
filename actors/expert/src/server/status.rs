//! What a server says of itself, and why it fails.

use serde::Serialize;
use skep_wire::ExpertUid;

use crate::{BackendError, ConfigError, ExpertStatus};

/// A snapshot of a server; feeds status pages, tests and exporters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServerStatus {
    /// Whether experts are built and, given a DHT, announced.
    pub ready: bool,
    /// Why it is not ready.
    pub trouble: Option<String>,
    /// Calls being served.
    pub calls: usize,
    /// The experts in the order of their names.
    pub experts: Vec<ExpertStatus>,
}

/// Why a server does not start, is not ready or does not stop in time.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Two experts of one name.
    #[error("expert {0} is to be hosted twice")]
    DuplicateUid(ExpertUid),
    /// A configuration that cannot work.
    #[error("[server] {0}")]
    Config(#[from] ConfigError),
    /// The machine gives no threads.
    #[error("cannot start executor threads: {0}")]
    Threads(String),
    /// A backend could not be made.
    #[error("expert {uid} cannot be built: {error}")]
    Build {
        /// The expert.
        uid: ExpertUid,
        /// What its factory said.
        error: BackendError,
    },
    /// An actor of the server cannot be supervised.
    #[error("cannot start the server's actors: {0}")]
    Supervision(String),
    /// A bug in the server.
    #[error("the server panicked: {0}")]
    Panicked(String),
    /// The runtime that should run the server has stopped.
    #[error("the runtime has stopped")]
    RuntimeStopped,
    /// Not ready before the deadline.
    #[error("the server is not ready: {0}")]
    NotReady(String),
    /// The server is stopping or has stopped.
    #[error("the server is stopping")]
    Stopping,
    /// The last checkpoints of some experts were not written; their older ones are as they were.
    #[error("the last steps of {} are in no checkpoint: {reason}", join(.uids))]
    Unsaved {
        /// The experts.
        uids: Vec<ExpertUid>,
        /// What happened to the first of them.
        reason: String,
    },
    /// Executors were still busy at the deadline; they end after their batch.
    #[error("{unfinished} accepted tasks were not finished before the deadline and got an error")]
    Unfinished {
        /// Tasks that got an error, or whose batch still runs.
        unfinished: usize,
    },
}

fn join(uids: &[ExpertUid]) -> String {
    uids.iter().map(ExpertUid::as_str).collect::<Vec<_>>().join(", ")
}
