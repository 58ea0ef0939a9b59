//! What one asks a DHT node, and what it answers.

use std::collections::BTreeMap;

use bytes::Bytes;
use libp2p_identity::PeerId;
use serde::Serialize;
use skep_kernel::{AskError, Deadline, Reply, WallTime};
use skep_rpc::ServeError;
use skep_wire::{ExpertPrefix, ExpertUid};

use crate::{
    DhtKey,
    core::{
        message::{Request, Response},
        node::Outcome,
    },
};

/// A value as it is stored: serialized, with the wall time at which it expires.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed<T> {
    /// The value.
    pub value: T,
    /// Seconds since the epoch until which it is valid.
    pub expiration: WallTime,
}

/// What is stored under a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// One value: MessagePack bytes.
    Regular(Bytes),
    /// Values by subkey, both MessagePack bytes, each with its own expiration.
    Dictionary(BTreeMap<Bytes, Timed<Bytes>>),
}

/// One value to store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreItem {
    /// Where.
    pub key: DhtKey,
    /// Serialized subkey for an entry of a dictionary; `None` for a regular value.
    pub subkey: Option<Bytes>,
    /// Serialized value.
    pub value: Bytes,
    /// When it expires.
    pub expiration: WallTime,
}

/// How thoroughly to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freshness {
    /// Any value that has not expired will do; caches count.
    #[default]
    Valid,
    /// Search the network for the latest value.
    Latest,
}

/// The next coordinates that exist under a prefix, each with one expert that proves it and the peer that hosts it.
/// A one-dimensional grid has the expert itself under its coordinate.
pub type Successors = BTreeMap<u64, (ExpertUid, PeerId)>;

/// Who hosts an expert, and until when the record holds.
pub type Hosted = Timed<PeerId>;

/// Successors of several prefixes; a prefix without any maps to an empty table.
pub type SuccessorTable = BTreeMap<ExpertPrefix, Successors>;

/// What a DHT node says of itself: for status pages, tests and exporters.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DhtStatus {
    /// Id of the node in the 160-bit space, hexadecimal.
    pub node_id: String,
    /// Whether there was nobody to join, or somebody answered.
    pub joined: bool,
    /// What went wrong last while joining.
    pub problem: Option<String>,
    /// Rounds in which every initial peer was asked in vain since the last success.
    pub failed_rounds: u32,
    /// Nodes in the routing table.
    pub nodes: usize,
    /// Peers banned now.
    pub banned: usize,
    /// Records held for the network.
    pub records: usize,
    /// Their bytes.
    pub record_bytes: usize,
    /// Records in the cache.
    pub cached: usize,
    /// Their bytes.
    pub cached_bytes: usize,
    /// Calls to other nodes under way.
    pub calls: usize,
    /// Commands of this process under way.
    pub commands: usize,
    /// Times the actor was started.
    pub starts: u32,
}

/// What the handle asks of the actor.
pub(crate) enum Command {
    Get { keys: Vec<DhtKey>, freshness: Freshness, deadline: Deadline, reply: Reply<Vec<Option<Timed<Stored>>>> },
    Store { items: Vec<StoreItem>, deadline: Deadline, reply: Reply<Vec<Outcome>> },
}

/// What another node asks of the actor.
pub(crate) struct InboundCall {
    pub peer: PeerId,
    pub request: Request,
    pub reply: Reply<Result<Response, ServeError>>,
}

/// Why a DHT operation failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DhtError {
    /// The deadline passed first.
    #[error("the DHT did not answer before the deadline")]
    Deadline,
    /// The DHT node's queue is full.
    #[error("the DHT node is overloaded ({capacity} requests waiting)")]
    Overloaded {
        /// Requests that may wait.
        capacity: usize,
    },
    /// The DHT node has stopped.
    #[error("the DHT node has stopped")]
    Stopped,
    /// A synchronous call from one of skep's own threads.
    #[error("a synchronous call from one of skep's own threads would wait for itself; use the async form")]
    WouldDeadlock,
    /// No bootstrap peer could be joined.
    #[error("cannot join the DHT: {0}")]
    Bootstrap(String),
    /// Experts are not announced where others find them.
    #[error("of {wanted} experts {stored} are stored, {elsewhere} of them with other nodes")]
    NotAnnounced {
        /// Experts to announce.
        wanted: usize,
        /// Those stored anywhere.
        stored: usize,
        /// Those stored with other nodes.
        elsewhere: usize,
    },
    /// Our clock and the network's differ too much.
    #[error(
        "this machine's clock is {skew:.1} s off against {peer}; hivemind's DHT tolerates 3 s: synchronize the clock"
    )]
    ClockSkew {
        /// Ours minus theirs, in seconds.
        skew: f64,
        /// Who noticed.
        peer: PeerId,
    },
}

impl From<AskError> for DhtError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Full { capacity } => DhtError::Overloaded { capacity },
            AskError::Elapsed => DhtError::Deadline,
            AskError::Gone => DhtError::Stopped,
            AskError::WouldDeadlock => DhtError::WouldDeadlock,
        }
    }
}
