//! What can go wrong with a runtime, and what to do about it.

use std::time::Duration;

use skep_dht::DhtError;
use skep_moe::MoeError;
use skep_net::{NetError, identity::IdentityError};
use skep_rpc::RpcError;
use skep_wire::ExpertUid;

/// An error of the facade. [`help`](Error::help) says what the user can do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Listening, dialling, addresses.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The key file.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A DHT operation.
    #[error(transparent)]
    Dht(#[from] DhtError),
    /// A call to another peer.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// A mixture of experts.
    #[error(transparent)]
    Moe(#[from] MoeError),
    /// Hosting experts.
    #[error(transparent)]
    Server(#[from] skep_expert::ServerError),
    /// The folder of checkpoints.
    #[error(transparent)]
    Checkpoints(#[from] skep_expert::StoreError),
    /// Nobody has announced this expert.
    #[error("no expert {uid} is announced in this network")]
    NoSuchExpert {
        /// The name asked for.
        uid: ExpertUid,
    },
    /// Nothing is stored under a key.
    #[error("nothing is stored under {key:?}")]
    NoSuchRecord {
        /// The key asked for.
        key: String,
    },
    /// No node took a record.
    #[error("no node took the record under {key:?}")]
    NotStored {
        /// Its key.
        key: String,
    },
    /// A value that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not ready in time.
    #[error("not ready after {waited:?}: {waiting_for}")]
    NotReady {
        /// How long was waited.
        waited: Duration,
        /// The step that is not done, with what it last ran into.
        waiting_for: String,
    },
    /// A part of the runtime failed more often than its supervisor restarts it.
    #[error("{part} failed too often: {reason}")]
    Escalated {
        /// The supervised part.
        part: String,
        /// How it last ended.
        reason: String,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was attempted.
        what: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// The system thread did not come to do something: foreign code holds it, or the machine is overloaded.
    #[error("the system thread is stuck; what it carries is cut off")]
    Stuck,
    /// The runtime has stopped.
    #[error("the runtime has stopped")]
    Stopped,
}

impl Error {
    /// Whether trying again may help.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::NotReady { .. } => true,
            Error::Rpc(error) => error.is_transient(),
            Error::Dht(error) => matches!(error, DhtError::Deadline | DhtError::Overloaded { .. }),
            _ => false,
        }
    }

    /// What the user can do, where there is something.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Error::NoSuchExpert { uid } => format!(
                "list what is announced: skep experts {} --peer ADDR; a server announces itself some seconds after \
                 its start",
                uid.root_prefix()
            ),
            Error::NotStored { .. } => {
                "nodes refuse what does not expire later than what is there, and entries that another key owns"
                    .to_owned()
            }
            Error::Identity(IdentityError::Format { .. }) => {
                "give a file that skep or hivemind wrote, or make one: skep identity new FILE".to_owned()
            }
            Error::NotReady { .. } => {
                "check that the peer's address ends in its current /p2p/ id and that it is running; try again"
                    .to_owned()
            }
            Error::Rpc(RpcError::Unreachable { .. }) => {
                "check that the peer runs and listens on an address that is reachable from here".to_owned()
            }
            Error::Rpc(RpcError::Deadline { .. }) => "the server may be overloaded; try a longer --timeout".to_owned(),
            Error::System { what, source }
                if source.kind() == std::io::ErrorKind::AddrInUse && what.starts_with("http.listen") =>
            {
                "another program has this port; give another one in http.listen, or port 0 for a free one".to_owned()
            }
            _ => return None,
        })
    }
}
