//! `skep bench`: measures this machine's hives with real processes, and beside them what the machine could do at best.
//!
//! Servers and callers are processes of this binary, which end with it. Tables go to stdout, or JSON on request; progress
//! goes to stderr.
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its threads feed and watch other processes")]

mod caller;
mod clients;
mod dht;
mod hops;
mod latency;
mod limit;
mod machine;
mod mixture;
mod moe;
mod network;
mod presets;
pub(super) mod process;
mod progress;
mod report;
mod server;
mod startup;
mod throughput;
mod worker;

use clap::Subcommand;

use super::Failure;

/// Shown by its help.
pub const EXAMPLES: &str = "\
Examples:
  skep bench throughput --preset ffn_small_batch
  skep bench throughput --clients 4 --hidden 512 --batch 32 --backward --json
  skep bench moe --hidden 512
  skep bench network
  skep bench hops
  skep bench dht
  skep bench startup";

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Calls to experts: rate, latency, and what libtorch alone would do
    Throughput(throughput::Throughput),
    /// Steps through a mixture of experts, and the same mixture without a network
    Moe(moe::Moe),
    /// DHT nodes: how fast they join, store and look up
    Dht(dht::Dht),
    /// Calls of all sizes, and bare streams beside them
    Network(network::Network),
    /// One small call: where its time goes, by time stamps
    Hops(hops::Hops),
    /// A server of many experts: how soon it is ready, and what it holds
    Startup(startup::Startup),
    /// A process of a benchmark; it is told on stdin what to do
    #[command(hide = true)]
    Worker,
}

impl Bench {
    pub fn run(self) -> Result<(), Failure> {
        match self {
            Bench::Throughput(throughput) => throughput.run(),
            Bench::Moe(moe) => moe.run(),
            Bench::Dht(dht) => dht.run(),
            Bench::Network(network) => network.run(),
            Bench::Hops(hops) => hops.run(),
            Bench::Startup(startup) => startup.run(),
            Bench::Worker => Ok(worker::work()?),
        }
    }
}
