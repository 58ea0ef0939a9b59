//! A decentralized mixture-of-experts runtime. This crate computes nothing itself: it puts the rooms under `actors/`
//! together into a [`Runtime`] to embed, a daemon (`skep serve`), and a command line.
//!
//! Servers host experts (neural-network blocks) and announce them in a DHT that Python hivemind 1.1.12 shares; clients
//! find experts, fan batches out to them, join the answers under deadlines, and train through them.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "daemon")]
pub mod cli;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
mod daemon;
mod error;
#[cfg(feature = "daemon")]
mod http;
pub mod prelude;
mod runtime;
#[cfg(feature = "daemon")]
mod telemetry;

pub use error::Error;
pub use multiaddr::Multiaddr;
pub use runtime::{Experts, Runtime, RuntimeBuilder, Status};
pub use skep_dht as dht;
pub use skep_expert as expert;
pub use skep_kernel as kernel;
pub use skep_moe as moe;
pub use skep_moe::{Client, RemoteExpert};
pub use skep_net as net;
pub use skep_rpc as rpc;
pub use skep_wire as wire;

/// Experts and mixtures as differentiable modules over libtorch.
#[cfg(feature = "torch")]
pub use skep_torch as torch;
/// The libtorch bindings that skep uses: one process holds one libtorch.
#[cfg(feature = "torch")]
pub use skep_torch::tch;
