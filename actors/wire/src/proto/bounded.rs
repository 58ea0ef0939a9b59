//! Decoding of messages from peers, with a bound on what it may allocate.

use bytes::Bytes;
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

/// Reads a message of a peer; byte fields are slices of `bytes`. Refuses messages of more than [`MAX_FIELDS`] fields
/// before anything is allocated.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, MessageError> {
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
