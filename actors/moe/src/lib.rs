//! The client of a mixture of experts: beam search, plan, fan-out and join over host tensors. Knows no torch and computes
//! no gate: scores come in, expert outputs come out.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod client;
mod expert_call;
mod mixture;
mod remote;

pub use client::Client;
pub use mixture::{BackwardGather, Chosen, Gather, GridScores, Mixture, MoeConfig, MoeError};
pub use remote::RemoteExpert;
