//! Protobuf messages of hivemind and libp2p, checked in: no protoc at build time (docs/wire.md §4).
//!
//! Field numbers and presence follow the .proto files; `required` fields of proto2 are always written, for Go refuses a
//! message without them, and read as empty when absent. Byte fields are slices of the message they were read from.
//! What a peer sent is read with [`decode`], which bounds the number of fields.

pub mod auth;
mod bounded;
pub mod crypto;
pub mod dht;
mod gather;
pub mod p2pd;
pub mod runtime;

pub use bounded::{MAX_FIELDS, MessageError, decode};
pub use gather::{gather_request, gather_response};
