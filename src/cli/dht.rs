//! `skep dht`: a node without experts, for others to join the network through; and commands that read and write records.

use clap::{Args, Subcommand};

use super::{
    Failure,
    flags::{ConfigFile, DhtFlags, NodeFlags, RelayFlags, load_dht_config},
    records, signals,
};
use crate::{daemon, telemetry};

const EXAMPLES: &str = "\
Examples:
  skep dht --host_maddrs /ip4/0.0.0.0/tcp/31337 --identity_path dht.key
  skep dht --initial_peers /ip4/10.0.0.7/tcp/31337/p2p/12D3Koo...
  skep dht get expert.1 --peer ADDR

Without a command it is a node: it prints its addresses on stdout, one a line, when it is ready, and tells the log every \
--refresh_period what it holds.";

/// `skep dht …`
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Dht {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    node: DhtNode,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what is stored under a key
    Get(records::Get),
    /// Store a value for some time
    Store(records::Store),
    /// List the subkeys of a dictionary
    Keys(records::Keys),
}

/// Options of a node.
#[derive(Debug, Args)]
struct DhtNode {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    node: NodeFlags,
    #[command(flatten)]
    dht: DhtFlags,
    #[command(flatten)]
    relays: RelayFlags,
}

impl Dht {
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            None => self.node.run(),
            Some(Command::Get(get)) => get.run(),
            Some(Command::Store(store)) => store.run(),
            Some(Command::Keys(keys)) => keys.run(),
        }
    }
}

impl DhtNode {
    fn run(self) -> Result<(), Failure> {
        let mut config = load_dht_config(&self.file, &self.node, &self.dht)?.config;
        config.experts.clear();
        telemetry::start(&config.log)?;
        self.relays.warn();
        let signal = signals::first_signal()?;
        let builder = daemon::node(&config)?;
        Ok(daemon::run(builder, &config, &signal)?)
    }
}
