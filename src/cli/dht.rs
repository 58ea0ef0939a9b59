//! `skep dht`: a node without experts, for others to join the network through.

use clap::Args;

use super::{
    Failure,
    flags::{ConfigFile, NodeFlags, load_config},
    signals,
};
use crate::{daemon, telemetry};

const EXAMPLES: &str = "\
Examples:
  skep dht --host_maddrs /ip4/0.0.0.0/tcp/31337 --identity_path dht.key
  skep dht --initial_peers /ip4/10.0.0.7/tcp/31337/p2p/12D3Koo...

Prints its addresses on stdout, one a line, when it is ready.";

/// Options of `skep dht`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DhtNode {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    node: NodeFlags,
}

impl DhtNode {
    pub fn run(self) -> Result<(), Failure> {
        let mut config = load_config(&self.file, &self.node, None, None)?.config;
        config.experts.clear();
        telemetry::start(&config.log)?;
        let signal = signals::first_signal()?;
        let builder = daemon::node(&config)?;
        Ok(daemon::run(builder, &config, &signal)?)
    }
}
