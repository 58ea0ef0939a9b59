//! Arithmetic of the 160-bit space (docs/wire.md §6.1).

use std::fmt;

use sha1::{Digest, Sha1};
use skep_wire::msgpack::{self, Value};

use crate::DhtId;

/// Bits of an id.
pub(crate) const BITS: u32 = 160;

impl DhtId {
    /// The id of a key that is bytes: their SHA-1.
    pub fn of_bytes(key: &[u8]) -> Self {
        Self(Sha1::digest(key).into())
    }

    /// The id of a key that is text: the SHA-1 of its MessagePack encoding, header included.
    pub fn of_text(key: &str) -> Self {
        Self::of_value(&Value::from(key))
    }

    /// The id of any key: bytes count as they are, everything else as its MessagePack encoding.
    pub fn of_value(key: &Value) -> Self {
        match key {
            Value::Bin(bytes) => Self::of_bytes(bytes),
            other => Self::of_bytes(&msgpack::serialize(other)),
        }
    }

    /// Reads 20 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Distance to another id: the exclusive or of both, as a number.
    pub fn distance(&self, other: &DhtId) -> DhtId {
        // Two numbers instead of 20 bytes: searches and tables compute little else.
        let ((high, low), (other_high, other_low)) = (self.halves(), other.halves());
        let mut distance = [0; 20];
        distance[..16].copy_from_slice(&(high ^ other_high).to_ne_bytes());
        distance[16..].copy_from_slice(&(low ^ other_low).to_ne_bytes());
        DhtId(distance)
    }

    fn halves(&self) -> (u128, u32) {
        let (high, low) = self.0.split_first_chunk().expect("20 bytes hold 16");
        (u128::from_ne_bytes(*high), u32::from_ne_bytes(low.try_into().expect("20 bytes are 16 and 4")))
    }

    /// How many leading bits both ids share.
    pub fn common_prefix_bits(&self, other: &DhtId) -> u32 {
        let distance = self.distance(other);
        match distance.0.iter().position(|byte| *byte != 0) {
            Some(byte) => 8 * byte as u32 + distance.0[byte].leading_zeros(),
            None => BITS,
        }
    }

    /// The bit so many places after the most significant one.
    pub(crate) fn bit(&self, place: u32) -> bool {
        self.0[(place / 8) as usize] & (0x80 >> (place % 8)) != 0
    }

    /// The same id with that bit set.
    pub(crate) fn with_bit(mut self, place: u32) -> DhtId {
        self.0[(place / 8) as usize] |= 0x80 >> (place % 8);
        self
    }
}

impl fmt::Display for DhtId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
