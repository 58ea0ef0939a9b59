//! What travels between peers, and nothing that makes it travel: no async, no I/O, no clock.
//!
//! Host tensors, expert uids and schemas, hivemind's MessagePack dialect, tensor codecs, protobuf messages, DHT values and
//! sans-IO frames. The wire is that of Python hivemind 1.1.12; golden bytes recorded from it decide (`tests/vectors`).
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod chunk;
pub mod compression;
mod descriptor;
pub mod dht_value;
mod dtype;
pub mod error_text;
pub mod frame;
pub mod limits;
mod method;
pub mod msgpack;
mod nested;
pub mod proto;
mod schema;
mod tensor;
mod uid;

pub use compression::{CodecError, Compression, compress, decompress};
pub use descriptor::TensorDescriptor;
pub use dtype::DType;
pub use method::{Framing, Method};
pub use nested::Nested;
pub use schema::{ExpertInfo, SchemaError};
pub use tensor::{HostTensor, TensorError};
pub use uid::{ExpertPrefix, ExpertUid, UidError};
