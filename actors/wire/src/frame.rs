//! Frames of hivemind's wire, sans-IO: bytes in, frames out (docs/wire.md §2, §3).
//!
//! Each framing comes in two forms. A `Decoder` takes bytes in any pieces, for tests and simple readers. `Length` and
//! `Header` with `Frame::decode` let an async reader fill one buffer of the right size and hand it over, so that large
//! bodies are not copied. Lengths are checked before anything is allocated for them.

pub mod stream;
pub mod unary;

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
}

impl From<prost::DecodeError> for FrameError {
    fn from(error: prost::DecodeError) -> Self {
        FrameError::Protobuf(error.to_string())
    }
}
