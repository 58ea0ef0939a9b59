//! The actor test harness: peers of one process on a simulated network, virtual time, scripted experts. No sockets, no
//! threads, no wall clock: a run is replayed by its seed.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backend;
mod network;
mod servers;
mod sim;

pub use backend::{Recorded, Recording, ScriptedBackend};
pub use network::{Latency, SimNetwork, SimTransport, Wire};
pub use servers::{Hive, Servers, SimServer};
pub use sim::{Setup, Sim};
