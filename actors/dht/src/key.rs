//! Keys and ids of the 160-bit space (docs/wire.md §6.1).

/// SHA-1 of a serialized key, or a node's id; 20 bytes, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DhtId(pub [u8; 20]);

/// A hashed key: where a record lives.
pub type DhtKey = DhtId;
