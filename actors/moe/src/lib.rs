//! The client of a mixture of experts: beam search, plan, fan-out and join over host tensors. Knows no torch and computes
//! no gate: scores come in, expert outputs come out.
//!
//! What decides is free of I/O (`beam`, `plan`, `join`); `hive` and `fan_out` do what it says.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod beam;
mod cache;
mod client;
mod codec;
mod config;
mod expert_call;
mod fan_out;
mod gather;
mod hive;
mod join;
mod mixture;
mod plan;
#[doc(hidden)]
pub mod probe;
mod refresher;
mod remote;
mod scores;

pub use client::Client;
pub use config::MoeConfig;
pub use mixture::{BackwardGather, Chosen, Gather, Mixture, MoeError};
pub use remote::RemoteExpert;
pub use scores::GridScores;
