//! libp2p, and nobody else knows it. No experts, no DHT of hivemind's, no actors: [`Net`] carries calls between peers as
//! a [`skep_rpc::Transport`] and hands the calls of others to a [`skep_rpc::Router`].
//!
//! The wire is that of Python hivemind 1.1.12 (TCP, noise, yamux; one substream per call); between peers that both speak
//! it, expert calls travel on skep's own (docs/wire.md §13). Everything of the network runs on one thread, `skep-net`, and
//! its workers.
#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![allow(
    clippy::disallowed_types,
    reason = "it is never simulated, and its watches also tell that the other side is gone"
)]

#[cfg(test)]
extern crate self as skep_net;

#[cfg(test)]
mod abuse;
mod behaviour;
mod budget;
mod busy_poll;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
mod config;
mod error;
mod gate;
pub mod identity;
mod inbound;
mod io;
mod listen;
mod muxer;
mod native_link;
mod net;
mod node;
mod outbound;
mod peers;
#[cfg(test)]
mod pipe;
pub mod probe;
mod routing;
mod security;
mod slashless;
mod status;
mod streams;
mod transport;

pub use config::{NetConfig, NetLimits, NetTimeouts};
pub use error::NetError;
pub use net::{Net, parse_peer_address};
pub use status::NetStatus;
