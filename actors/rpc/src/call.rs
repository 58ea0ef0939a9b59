//! One call from peer to peer, as transports and services see it.

use std::{fmt, time::Duration};

use bytes::Bytes;
use libp2p_identity::PeerId;
use serde::{Deserialize, Serialize};
use skep_kernel::Deadline;
use skep_wire::{Method, proto::runtime::Tensor};

/// Identifies one logical request. A retry of the same request keeps it, so that a training step is applied once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u128);

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Trace context in W3C's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// 16-byte trace id.
    pub trace_id: u128,
    /// 8-byte id of the calling span.
    pub span_id: u64,
}

/// What accompanies a call. hivemind's wire drops all but the deadline's effect; the native wire carries it.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// When the caller stops waiting.
    pub deadline: Deadline,
    /// The logical request.
    pub request_id: RequestId,
    /// The caller's trace, if it has one.
    pub trace: Option<TraceContext>,
}

/// What a call or an answer carries.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// One serialized protobuf message: DHT methods and `rpc_info`.
    Message(Bytes),
    /// Tensors to or from an expert: forward and backward.
    Tensors(TensorBody),
}

/// Tensors as they travel, compressed; their buffers are shared, never joined.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorBody {
    /// The expert asked; empty in answers.
    pub uid: String,
    /// Flat inputs, then (backward) flat output gradients; in answers flat outputs or input gradients.
    pub tensors: Vec<Tensor>,
}

impl Body {
    /// Payload bytes without framing.
    pub fn len(&self) -> usize {
        match self {
            Body::Message(bytes) => bytes.len(),
            Body::Tensors(body) => body.tensors.iter().map(|t| t.buffer.len()).sum(),
        }
    }

    /// Whether it carries no payload.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A call on its way out.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who is called.
    pub peer: PeerId,
    /// What is called.
    pub method: Method,
    /// Arguments.
    pub body: Body,
    /// Deadline, request id, trace.
    pub meta: Meta,
}

/// What the server says of its load beside an answer; only the native wire carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerLoad {
    /// Rows waiting in the expert's mailboxes.
    pub waiting_rows: u32,
    /// How long the oldest of them has waited.
    pub oldest_wait: Duration,
}

/// A successful answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Result of the call.
    pub body: Body,
    /// Load of the server, where the wire carries it.
    pub load: Option<ServerLoad>,
}

/// A call as it arrives at a [`Service`](crate::Service).
#[derive(Clone, Debug)]
pub struct Inbound {
    /// The authenticated caller.
    pub peer: PeerId,
    /// What is called.
    pub method: Method,
    /// Arguments.
    pub body: Body,
    /// Deadline, request id, trace; a transport whose wire lacks them makes them up.
    pub meta: Meta,
    /// Whether the caller understands [`ServeError::Overloaded`](crate::ServeError::Overloaded): hivemind's do not,
    /// they wait for room instead.
    pub knows_overload: bool,
}
