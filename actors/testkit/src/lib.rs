//! The actor test harness: whole hives in one process, on a simulated network, in virtual time, replayed by a seed. No
//! sockets, no threads, no wall clock: servers, DHT nodes and clients are the real ones, only `Transport`, `Clock` and the
//! executors are simulated.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backend;
mod client;
mod clock;
pub mod conformance;
mod device;
mod dht_node;
mod disk;
mod hive;
mod latency;
mod link;
mod logs;
mod moe;
mod names;
mod network;
mod node;
mod probe;
mod process;
mod quiet;
mod report;
mod run;
mod servers;
mod sim;
mod trace;
mod watch;
mod world;

pub use backend::{Recorded, Recording, ScriptedBackend};
pub use client::{Clients, SimClient};
pub use device::{Copied, ScriptedDevice, Span, Work};
pub use dht_node::SimDht;
pub use disk::SimDisk;
pub use hive::Hive;
pub use latency::Latency;
pub use link::Link;
pub use moe::{MoeBuilder, MoeOutput, SimMoe};
pub use names::ExpertNames;
pub use network::{CallUnderWay, SimNetwork, SimTransport, Wire};
pub use node::{Health, Node, Nodes};
pub use probe::{Probe, ProbeActor};
pub use run::Setup;
pub use servers::{Servers, SimServer};
pub use sim::Sim;
pub use trace::{Event, Happening, Trace};

/// The examples of docs/testing.md are compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/testing.md")]
pub struct TestingPage;
