//! Decoding of messages from peers, with a bound on what it may allocate.

use bytes::Buf;
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, decode_key, skip_field},
};

/// Fields at the top level of one message, repeated ones counted each time they occur. Without a bound an empty tensor,
/// two bytes on the wire, would cost more than a hundred in memory, two million times per frame. A store request has three
/// fields per record, so that this many are room for whatever fits a frame with records of real size.
pub const MAX_FIELDS: usize = 1 << 17;

/// Why bytes are no message that is accepted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MessageError {
    /// No such protobuf message.
    #[error("malformed message: {0}")]
    Protobuf(#[from] DecodeError),
    /// More fields than [`MAX_FIELDS`].
    #[error("message has more than {MAX_FIELDS} fields")]
    TooManyFields,
}

/// Reads a message of a peer. Refuses messages of more than [`MAX_FIELDS`] fields before anything is allocated.
///
/// Byte fields are slices of `bytes` when these are [`Bytes`](bytes::Bytes), and keep all of them in memory; they are
/// copies when `bytes` is a `&[u8]`.
#[allow(clippy::disallowed_methods, reason = "the number of fields is bounded here")]
pub fn decode<M: Message + Default>(bytes: impl Buf + AsRef<[u8]>) -> Result<M, MessageError> {
    let mut rest = bytes.as_ref();
    let mut fields = 0;
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest)?;
        skip_field(wire_type, tag, &mut rest, DecodeContext::default())?;
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(MessageError::TooManyFields);
        }
    }
    Ok(M::decode(bytes)?)
}
