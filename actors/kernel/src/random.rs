//! Seeded randomness: one seed a runtime, a named stream for each actor, so that a run can be repeated.

use std::fmt;

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Where the random streams of one part of a runtime come from. Not for secrets.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seed([u8; 32]);

impl Seed {
    /// A seed that is easy to write down.
    pub fn new(number: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Self(bytes)
    }

    /// A fresh seed from the operating system.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// The seed of a named part. Different names give independent seeds; adding a part changes no other part's.
    pub fn derive(&self, name: &str) -> Self {
        let length = u64::try_from(name.len()).expect("a name's length fits 64 bits");
        let seed = self.absorb(&length.to_le_bytes());
        name.as_bytes().chunks(32).fold(seed, |seed, chunk| seed.absorb(chunk))
    }

    /// The seed of one of many equal parts.
    pub fn derive_nth(&self, number: u64) -> Self {
        self.absorb(b"nth").absorb(&number.to_le_bytes())
    }

    /// This seed as a number, for parts that are seeded by one.
    pub fn number(&self) -> u64 {
        self.rng().next_u64()
    }

    /// A stream that starts from this seed; equal seeds give equal streams.
    pub fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(self.0)
    }

    /// Mixes in up to 32 bytes, then takes a step that cannot be guessed back.
    fn absorb(mut self, bytes: &[u8]) -> Self {
        for (mine, theirs) in self.0.iter_mut().zip(bytes) {
            *mine ^= theirs;
        }
        let mut next = [0; 32];
        self.rng().fill_bytes(&mut next);
        Self(next)
    }
}

impl From<u64> for Seed {
    fn from(number: u64) -> Self {
        Self::new(number)
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seed({self})")
    }
}

/// Hexadecimal, without the zeros at the end.
impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
        self.0[..end].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(seed: Seed) -> u64 {
        seed.rng().next_u64()
    }

    #[test]
    fn equal_names_give_equal_streams_and_different_names_different_ones() {
        let root = Seed::new(0xBEE);
        let long = "a name that is longer than the thirty-two bytes of one step";
        let seeds = [
            root,
            Seed::new(0xBEF),
            root.derive(""),
            root.derive("dht"),
            root.derive("dht\0"),
            root.derive("dht").derive("dht"),
            root.derive(long),
            root.derive(&long[1..]),
            root.derive_nth(0),
            root.derive_nth(1),
        ];
        for (i, a) in seeds.iter().enumerate() {
            assert_eq!(first(*a), first(*a));
            assert!(seeds[..i].iter().all(|b| first(*a) != first(*b)), "{a} repeats another seed's stream");
        }
    }

    #[test]
    fn streams_stay_the_same_from_release_to_release() {
        assert_eq!(first(Seed::new(1).derive("dht")), DHT_OF_ONE);
    }

    const DHT_OF_ONE: u64 = 5_392_400_071_359_554_158;

    #[test]
    fn a_seed_prints_short() {
        assert_eq!(Seed::new(0xBEE).to_string(), "ee0b");
        assert_eq!(Seed::new(0).to_string(), "00");
    }
}
