//! How calls fail, on the calling and on the serving side.

use std::time::Duration;

use libp2p_identity::PeerId;
use serde::{Deserialize, Serialize};
use skep_wire::error_text::PythonError;

/// The part of a call that failed, or during which the deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    /// This node's own limits, its list of peers or its machine were in the way; nothing reached the peer.
    Prepare,
    /// No address of the peer is known.
    Resolve,
    /// No connection came about.
    Dial,
    /// The connection refused a stream.
    OpenStream,
    /// The connection ended during the call.
    Exchange,
    /// The DHT did not say who is to be called.
    Search,
    /// This process's own threads were late.
    Schedule,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::Prepare => "preparing the call here",
            Step::Resolve => "finding its address",
            Step::Dial => "dialling",
            Step::OpenStream => "opening a stream",
            Step::Exchange => "exchanging messages",
            Step::Search => "searching the DHT",
            Step::Schedule => "waiting for a thread of this process",
        })
    }
}

/// Why a call brought no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// The peer could not be reached or went away.
    #[error("peer {peer} is unreachable: {step} failed: {reason}")]
    Unreachable {
        /// Who was called.
        peer: PeerId,
        /// What failed.
        step: Step,
        /// The transport's words.
        reason: String,
    },
    /// The peer answers but does not serve this method, or does not serve us.
    #[error("peer {peer} refused the call: {reason}")]
    Refused {
        /// Who was called.
        peer: PeerId,
        /// Why.
        reason: String,
    },
    /// The server's queues are full; the call did not run.
    #[error("overloaded: {waiting} rows waiting, limit {limit}; retry in {retry_after:?}")]
    Overloaded {
        /// Rows that wait.
        waiting: u32,
        /// Rows that may wait.
        limit: u32,
        /// When a retry makes sense.
        retry_after: Duration,
    },
    /// The deadline passed first.
    #[error("no answer from {peer} before the deadline ({waited:?} waited, at last {step})")]
    Deadline {
        /// Who was called; this node itself where no peer was known yet.
        peer: PeerId,
        /// What was under way when the deadline passed.
        step: Step,
        /// Time from the call to the deadline.
        waited: Duration,
    },
    /// The caller gave up or the runtime stops.
    #[error("cancelled")]
    Cancelled,
    /// The handler failed; its text as sent, for hivemind's servers the `repr` of a Python exception.
    #[error("remote error: {text}")]
    Remote {
        /// The peer's words.
        text: String,
    },
    /// A request with this id was applied before and its answer is no longer remembered.
    #[error("a request with this id was already applied; its answer is no longer remembered")]
    AlreadyApplied,
    /// The expert was withdrawn after an error during an optimizer step.
    #[error("the expert is poisoned: an optimizer step failed half way")]
    Poisoned,
    /// The peer sent what is no valid answer.
    #[error("malformed answer from {peer}: {reason}")]
    Malformed {
        /// Who was called.
        peer: PeerId,
        /// What is wrong with it.
        reason: String,
    },
    /// A message over a limit; it was not sent, or not read.
    #[error("message of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// Answers that arrive, or that nobody has taken yet, hold all the memory there is for them. The peer may have run
    /// the call.
    #[error(
        "no room for an answer of {size} bytes: answers under way may take {limit} together; make fewer calls at once, \
         or raise max_answer_bytes"
    )]
    NoRoom {
        /// Its size, as far as it is known.
        size: usize,
        /// Bytes for all answers together.
        limit: usize,
    },
    /// The arguments make no call; nothing was sent.
    #[error("{reason}")]
    Invalid {
        /// What is wrong with them.
        reason: String,
    },
    /// A synchronous call from one of skep's own threads, which would wait for itself.
    #[error("a synchronous call from one of skep's own threads would wait for itself; use the async form")]
    WouldDeadlock,
}

impl RpcError {
    /// Whether the call failed for reasons of this node: it says nothing about the peer.
    pub fn is_local(&self) -> bool {
        match self {
            RpcError::Unreachable { step, .. } | RpcError::Deadline { step, .. } => {
                matches!(step, Step::Prepare | Step::Search | Step::Schedule)
            }
            RpcError::Cancelled | RpcError::NoRoom { .. } | RpcError::Invalid { .. } | RpcError::WouldDeadlock => true,
            _ => false,
        }
    }

    /// Whether trying another peer, or the same one later, may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, RpcError::Unreachable { .. } | RpcError::Overloaded { .. } | RpcError::Deadline { .. })
    }
}

/// Why a service gives no answer. On hivemind's wire it travels as a Python exception's text.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ServeError {
    /// No expert of this name here.
    #[error("no expert {uid} here")]
    UnknownExpert {
        /// The name asked for.
        uid: String,
    },
    /// Shapes, dtypes, values or bytes that the method does not take.
    #[error("{0}")]
    Invalid(String),
    /// Queues are full; the call did not run.
    #[error("overloaded: {waiting} rows waiting, limit {limit}; retry in {retry_after:?}")]
    Overloaded {
        /// Rows that wait.
        waiting: u32,
        /// Rows that may wait.
        limit: u32,
        /// When a retry makes sense.
        retry_after: Duration,
    },
    /// The deadline passed before the call ran.
    #[error("deadline passed before the call ran")]
    Deadline,
    /// The caller may not call this.
    #[error("{0}")]
    Refused(String),
    /// A request with this id was applied before and its answer is no longer remembered.
    #[error("a request with this id was already applied; its answer is no longer remembered")]
    AlreadyApplied,
    /// The expert was withdrawn after an error during an optimizer step.
    #[error("expert {uid} is poisoned: {reason}")]
    Poisoned {
        /// The expert.
        uid: String,
        /// What happened.
        reason: String,
    },
    /// The server's own fault.
    #[error("{0}")]
    Internal(String),
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
}

impl ServeError {
    /// The Python exception and message that carry it on hivemind's wire.
    pub fn as_python(&self) -> (PythonError, String) {
        match self {
            ServeError::UnknownExpert { uid } => (PythonError::KeyError, uid.clone()),
            ServeError::Invalid(text) => (PythonError::ValueError, text.clone()),
            ServeError::Overloaded { .. } | ServeError::Deadline => (PythonError::TimeoutError, self.to_string()),
            _ => (PythonError::RuntimeError, self.to_string()),
        }
    }

    /// The error that a caller on a wire with typed errors gets.
    pub fn into_rpc(self, peer: PeerId) -> RpcError {
        match self {
            ServeError::Overloaded { waiting, limit, retry_after } => {
                RpcError::Overloaded { waiting, limit, retry_after }
            }
            ServeError::Refused(reason) => RpcError::Refused { peer, reason },
            ServeError::AlreadyApplied => RpcError::AlreadyApplied,
            ServeError::Poisoned { .. } => RpcError::Poisoned,
            ServeError::UnknownExpert { uid } => RpcError::Remote { text: format!("KeyError('{uid}')") },
            other => RpcError::Remote { text: other.to_string() },
        }
    }
}
