//! Headers of native frames.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{MAX_HEADER, MAX_TEXT};
use crate::{Method, chunk::tensor_overhead, frame::FrameError, proto::runtime::Tensor};

/// What a frame is. The order of the variants and of their fields is the wire's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Header {
    /// First frame of the side that opened the stream.
    Hello {
        /// Which of the two streams this is.
        lane: Lane,
    },
    /// Begins a call, with the first bytes of its body.
    Request(RequestHead),
    /// Begins an answer, with the first bytes of its body.
    Answer(AnswerHead),
    /// Ends a call without an answer.
    Error {
        /// The call.
        id: u64,
        /// Why.
        failure: Failure,
    },
    /// Further bytes of a body.
    Chunk {
        /// The call.
        id: u64,
        /// How many.
        bytes: u32,
    },
    /// Allows the other side to send more bytes of bodies on this stream.
    Credit {
        /// How many more.
        bytes: u32,
    },
    /// The caller gave up.
    Cancel {
        /// The call.
        id: u64,
    },
}

/// The two streams of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lane {
    /// Bodies up to 1 MiB, so that they never wait behind larger ones.
    Calls,
    /// Larger bodies, requests and answers.
    Bulk,
}

/// Begins a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestHead {
    /// Number of the call, chosen by the caller; unused before on this connection.
    pub id: u64,
    /// What is called.
    pub method: Method,
    /// How long the caller will wait from now, in microseconds. Clocks differ, durations hardly.
    pub wait_us: u64,
    /// The logical request.
    pub request_id: u128,
    /// The caller's trace.
    pub trace: Option<Trace>,
    /// What the body is.
    pub body: BodyHead,
    /// Bytes of the body in this frame.
    pub bytes: u32,
}

/// Begins an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerHead {
    /// The call.
    pub id: u64,
    /// The server's load.
    pub load: Option<Load>,
    /// What the body is.
    pub body: BodyHead,
    /// Bytes of the body in this frame.
    pub bytes: u32,
}

/// Trace context in W3C's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// 16-byte trace id.
    pub trace_id: u128,
    /// 8-byte id of the calling span.
    pub span_id: u64,
}

/// Load of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Rows waiting for the expert.
    pub waiting_rows: u32,
    /// Microseconds for which the oldest of them has waited.
    pub oldest_wait_us: u64,
}

/// What the bytes of a body are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum BodyHead {
    /// One serialized protobuf message.
    Message {
        /// Its size.
        bytes: u64,
    },
    /// Buffers of tensors, one behind the other.
    Tensors {
        /// The expert asked; empty in answers.
        uid: String,
        /// The tensors in order.
        tensors: Vec<TensorHead>,
    },
}

/// A tensor without its buffer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorHead {
    /// Name without the `torch.` prefix.
    pub dtype: String,
    /// Shape.
    pub size: Vec<u32>,
    /// Whether the sender wants gradients for it.
    pub requires_grad: bool,
    /// A [`crate::Compression`] as a number.
    pub compression: i32,
    /// Bytes of its buffer.
    pub bytes: u64,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Failure {
    /// No expert of this uid here.
    UnknownExpert {
        /// The uid asked for.
        uid: String,
    },
    /// The arguments are wrong.
    Invalid(String),
    /// No room; the call did not run.
    Overloaded {
        /// Rows or calls that wait.
        waiting: u32,
        /// How many may.
        limit: u32,
        /// Microseconds after which to try again.
        retry_after_us: u64,
    },
    /// The deadline passed first.
    Deadline,
    /// Not for this caller, or not served.
    Refused(String),
    /// Applied before, and the answer is no longer remembered.
    AlreadyApplied,
    /// The expert was withdrawn after an error during an optimizer step.
    Poisoned {
        /// The expert.
        uid: String,
        /// What happened.
        reason: String,
    },
    /// The server's own fault.
    Internal(String),
    /// The server is stopping.
    Stopping,
}

impl Header {
    /// The header with its length in front. Fails when it is over [`MAX_HEADER`], as with thousands of tensors.
    pub fn encode(&self) -> Result<Bytes, FrameError> {
        let mut start = Vec::with_capacity(160);
        start.extend_from_slice(&[0; 4]);
        let mut out = postcard::to_extend(self, start).map_err(|error| FrameError::Header(error.to_string()))?;
        let size = out.len() - 4;
        if size > MAX_HEADER {
            return Err(FrameError::TooLarge { size: size as u64, limit: MAX_HEADER });
        }
        out[..4].copy_from_slice(&u32::try_from(size).expect("within the limit").to_le_bytes());
        Ok(out.into())
    }

    /// Reads a header without its length.
    pub fn decode(bytes: &[u8]) -> Result<Header, FrameError> {
        match postcard::take_from_bytes(bytes) {
            Ok((header, [])) => Ok(header),
            Ok((_, rest)) => Err(FrameError::Header(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(FrameError::Header(error.to_string())),
        }
    }
}

impl BodyHead {
    /// Parts tensors from their buffers, which are the body.
    pub fn of_tensors(uid: String, tensors: Vec<Tensor>) -> (Self, Vec<Bytes>) {
        let part = |tensor: Tensor| {
            let bytes = tensor.buffer.len() as u64;
            let Tensor { buffer, size, requires_grad, dtype, compression, chunks: _ } = tensor;
            (TensorHead { dtype, size, requires_grad, compression, bytes }, buffer)
        };
        let (tensors, buffers) = tensors.into_iter().map(part).unzip();
        (BodyHead::Tensors { uid, tensors }, buffers)
    }

    /// Bytes of the body; saturates.
    pub fn len(&self) -> u64 {
        match self {
            BodyHead::Message { bytes } => *bytes,
            BodyHead::Tensors { tensors, .. } => tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.bytes)),
        }
    }

    /// Memory that this takes beside the body while the body arrives and is served, in bytes, at the most: a header of
    /// [`MAX_HEADER`] bytes may name tens of thousands of tensors.
    pub fn overhead(&self) -> usize {
        match self {
            BodyHead::Message { .. } => 0,
            BodyHead::Tensors { uid, tensors } => {
                let one = |tensor: &TensorHead| tensor_overhead(&tensor.dtype, &tensor.size);
                tensors.iter().fold(uid.len(), |sum, tensor| sum.saturating_add(one(tensor)))
            }
        }
    }

    /// Bytes that this adds to a header at the most.
    pub(super) fn encoded_bound(&self) -> usize {
        match self {
            BodyHead::Message { .. } => 16,
            BodyHead::Tensors { uid, tensors } => {
                let one = |tensor: &TensorHead| tensor.dtype.len() + 5 * tensor.size.len() + 32;
                tensors.iter().fold(uid.len() + 32, |sum, tensor| sum.saturating_add(one(tensor)))
            }
        }
    }

    /// Whether the body has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl TensorHead {
    /// The tensor, its buffer cut from the front of `body` without a copy. `None` when `body` is too short.
    pub fn cut_from(self, body: &mut Bytes) -> Option<Tensor> {
        let bytes = usize::try_from(self.bytes).ok().filter(|bytes| *bytes <= body.len())?;
        Some(Tensor {
            buffer: body.split_to(bytes),
            size: self.size,
            requires_grad: self.requires_grad,
            dtype: self.dtype,
            compression: self.compression,
            chunks: 0,
        })
    }
}

impl Failure {
    /// The same with texts cut to [`MAX_TEXT`] together, so that it fits a header.
    pub fn cut(mut self) -> Self {
        let cut = |text: &mut String, limit: usize| text.truncate(text.floor_char_boundary(limit));
        match &mut self {
            Failure::UnknownExpert { uid: text }
            | Failure::Invalid(text)
            | Failure::Refused(text)
            | Failure::Internal(text) => cut(text, MAX_TEXT),
            Failure::Poisoned { uid, reason } => {
                cut(uid, MAX_TEXT / 2);
                cut(reason, MAX_TEXT / 2);
            }
            Failure::Overloaded { .. } | Failure::Deadline | Failure::AlreadyApplied | Failure::Stopping => {}
        }
        self
    }
}

/// Microseconds as they travel; saturates.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Load {
    /// Load as it travels.
    pub fn new(waiting_rows: u32, oldest_wait: Duration) -> Self {
        Self { waiting_rows, oldest_wait_us: micros(oldest_wait) }
    }

    /// For how long the oldest row has waited.
    pub fn oldest_wait(&self) -> Duration {
        Duration::from_micros(self.oldest_wait_us)
    }
}
