//! Calls on skep's own wire (docs/wire.md §13), between peers that both speak it.
//!
//! Each connection carries at most one link per direction: two long-lived substreams that the calling side opens as soon
//! as identify has told that the other side offers the protocol. [`Caller`] and [`Servant`] live in the connection's own
//! task and are polled with it, so a call passes no task but that one: the caller puts it in the [`Link`]'s queue and
//! wakes the connection, which writes it out; the answer wakes the caller.

mod alarm;
mod caller;
mod calls;
mod convert;
mod lane;
mod linger;
mod link;
mod servant;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use libp2p::StreamProtocol;
use skep_rpc::{Answer, RpcError};
use skep_wire::frame::{
    FrameError,
    native::{PROTOCOL, Pool},
};

pub(crate) use caller::Caller;
pub(crate) use linger::Linger;
pub(crate) use link::{Link, Native};
pub(crate) use servant::Servant;

use crate::{
    budget::{Budget, Held},
    inbound::Server,
};

/// Memory of large bodies that is kept for the next ones, of all links together.
pub(crate) const POOL_BYTES: usize = 64 << 20;

/// The protocol's name.
pub(crate) const NATIVE: StreamProtocol = StreamProtocol::new(PROTOCOL);

/// What links need of the node.
pub(crate) struct Context {
    pub(crate) server: Arc<Server>,
    /// Memory for answers to our calls.
    pub(crate) answers: Arc<Budget>,
    /// Whether calls of others are served.
    pub(crate) serves: bool,
    /// Memory of large bodies of all links.
    pub(crate) pool: Arc<Pool>,
}

/// How a call of ours ended. Its answer holds memory until the caller has it.
type Ended = Result<(Answer, Held), RpcError>;

/// Why a link ended.
#[derive(Clone, Debug, thiserror::Error)]
enum Broken {
    #[error("the connection closed")]
    Closed,
    #[error("the peer closed the stream")]
    Ended,
    #[error("{0}")]
    Io(String),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("the peer sent {0}, which is not its to send")]
    Unexpected(&'static str),
    #[error("the peer does not take what is sent to it")]
    Stuck,
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Broken::Io(error.to_string())
    }
}
