//! What most programs need: `use skep::prelude::*`.

use std::time::Duration;

pub use skep_moe::MoeConfig;
#[cfg(feature = "torch")]
pub use skep_torch::{Adam, AdamW, Ffn, MixtureOfExperts, Nop, Sgd, SwitchConfig, SwitchMixtureOfExperts};

pub use crate::{Experts, Runtime};

/// So many seconds.
pub const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// So many milliseconds.
pub const fn millis(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}
