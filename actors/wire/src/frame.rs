//! Frames, sans-IO: bytes in, frames out. Those of hivemind's wire (docs/wire.md §2, §3) and of skep's own ([`native`],
//! docs/wire.md §13).
//!
//! Each of hivemind's framings comes in two forms. A `Decoder` takes bytes in any pieces, for tests and simple readers. `Length` and
//! `Header` with `Frame::decode` let an async reader fill one buffer of the right size and hand it over, so that large
//! bodies are not copied. Lengths are checked before anything is allocated for them.

pub mod native;
pub mod stream;
pub mod unary;

use crate::proto::MessageError;

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is no minimal varint of 64 bits.
    #[error("frame length is no valid varint")]
    Length,
    /// The body is longer than the limit.
    #[error("frame of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// Announced or actual length of the body.
        size: u64,
        /// The limit.
        limit: usize,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame, {got} bytes into it")]
    Truncated {
        /// Bytes of the frame that had arrived.
        got: usize,
    },
    /// The body is no protobuf message of the kind.
    #[error("malformed frame: {0}")]
    Protobuf(String),
    /// The call id has not 16 bytes.
    #[error("call id has {0} bytes instead of 16")]
    CallId(usize),
    /// Neither request nor answer.
    #[error("frame holds neither request nor answer")]
    NoMessage,
    /// An answer with neither response nor error.
    #[error("answer holds neither response nor error")]
    NoOutcome,
    /// A stream frame of an unknown kind.
    #[error("unknown stream frame marker {0:#04x}")]
    Marker(u8),
    /// A native frame whose header is none.
    #[error("malformed frame header: {0}")]
    Header(String),
    /// A native frame with more bytes than the receiver had allowed.
    #[error("frame carries {bytes} bytes, allowed are {credit}")]
    OverCredit {
        /// Bytes of a body in the frame.
        bytes: usize,
        /// Bytes that were allowed.
        credit: usize,
    },
    /// A native frame with more bytes of a body than the body has left.
    #[error("frame carries {bytes} bytes of body {id}, which has {left} left")]
    OverBody {
        /// The call.
        id: u64,
        /// Bytes of the body in the frame.
        bytes: usize,
        /// Bytes that the body still misses.
        left: usize,
    },
    /// A native call under the number of one that has not ended.
    #[error("call number {0} is in use")]
    Duplicate(u64),
}

impl From<MessageError> for FrameError {
    fn from(error: MessageError) -> Self {
        FrameError::Protobuf(error.to_string())
    }
}
