//! Options as configuration: each given flag becomes one key of the topmost layer.

use std::path::PathBuf;

use clap::Args;
use figment::value::{Dict, Value};
use serde::Serialize;

use crate::config::{ConfigError, Flags, Loaded, load};

/// Options of every command that reads the configuration.
#[derive(Clone, Debug, Default, Args)]
#[command(rename_all = "snake_case")]
pub struct ConfigFile {
    /// TOML file; config/skep.toml shows every key
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Options of a node: who it is, where it listens, whom it joins.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[command(rename_all = "snake_case", next_help_heading = "Node")]
pub struct NodeFlags {
    /// Addresses to listen on [default: /ip4/127.0.0.1/tcp/0]
    #[arg(long, num_args = 1.., value_name = "MULTIADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    host_maddrs: Option<Vec<String>>,
    /// Addresses that others are told, when they differ from those listened on
    #[arg(long, num_args = 1.., value_name = "MULTIADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    announce_maddrs: Option<Vec<String>>,
    /// Peers of the network to join, each with its /p2p/...
    #[arg(long, num_args = 0.., value_name = "MULTIADDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    initial_peers: Option<Vec<String>>,
    /// File of the private key; made when it does not exist
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    identity_path: Option<PathBuf>,
    /// File of peer ids, one a line: nobody else may connect
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_peers: Option<PathBuf>,
}

/// Options of a node without experts.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[command(rename_all = "snake_case", next_help_heading = "DHT")]
pub struct DhtFlags {
    /// Seconds between reports of what it holds, and between refreshes of its routing table [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_period: Option<f64>,
}

/// Options of a server.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[command(rename_all = "snake_case", next_help_heading = "Server")]
pub struct ServerFlags {
    /// Rows below which a batch waits for more [default: 1]
    #[arg(long, value_name = "ROWS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_batch_size: Option<u32>,
    /// Rows of one batch at the most [default: 16384]
    #[arg(long, value_name = "ROWS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_batch_size: Option<u32>,
    /// Seconds between announcements in the DHT [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    update_period: Option<f64>,
    /// Seconds for which an announcement holds [default: twice update_period]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expiration: Option<f64>,
    /// Folder of checkpoints: experts found there continue from them, and without a pattern or uids just they are hosted
    #[arg(long, value_name = "FOLDER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_dir: Option<PathBuf>,
    /// Seconds between checkpoints of an expert that trains [default: 300]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint_period: Option<f64>,
    /// Checkpoints kept of each expert [default: 3]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    keep_checkpoints: Option<usize>,
    /// Seconds between statistics in the log
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    stats_report_interval: Option<f64>,
}

#[cfg(feature = "torch")]
impl ServerFlags {
    /// Only the folder of checkpoints.
    pub fn checkpoints_in(folder: &std::path::Path) -> Self {
        Self { checkpoint_dir: Some(folder.to_path_buf()), ..Self::default() }
    }
}

/// Options of the hosted experts; any of them replaces the whole [[experts]] list of the file.
#[derive(Clone, Debug, Default, Args, Serialize)]
#[command(rename_all = "snake_case", next_help_heading = "Experts (any of these replaces the file's [[experts]])")]
pub struct ExpertFlags {
    /// How many experts to host [default: all that the pattern names]; alone: the first free of expert.0, expert.1, ...
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_experts: Option<usize>,
    /// Uids to choose from, as in "expert.[0:5]" or "ffn.[0:4].[0:16]"
    #[arg(long, value_name = "PATTERN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expert_pattern: Option<String>,
    /// Uids to host, in full
    #[arg(long, num_args = 1.., value_name = "UID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expert_uids: Option<Vec<String>>,
    /// Module: ffn, transformer, nop, nop_delay, det_dropout [default: ffn]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    expert_cls: Option<String>,
    /// Width of the module's input [default: 1024]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    hidden_dim: Option<i64>,
    /// Dropout probability of a transformer [default: 0.1]
    #[arg(long, value_name = "P")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f64>,
    /// Where it computes: cpu, cuda, cuda:0 [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// sgd, adam, adamw, none [default: sgd]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    optimizer: Option<String>,
    /// Learning rate [default: 0.01 for sgd, 0.001 for the others]
    #[arg(long, value_name = "RATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    learning_rate: Option<f64>,
    /// Share of the last direction that sgd keeps [default: 0]
    #[arg(long, value_name = "SHARE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    momentum: Option<f64>,
    /// What adam and adamw add to the root of the second moment [default: 1e-8]
    #[arg(long, value_name = "EPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    eps: Option<f64>,
    /// Decay of the weights [default: 0, with adamw 0.01]
    #[arg(long, value_name = "RATE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_decay: Option<f64>,
    /// none, linear [default: none]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    scheduler: Option<String>,
    /// Steps of linear warm-up [default: 0]
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_warmup_steps: Option<u64>,
    /// Steps after which the linear schedule reaches zero
    #[arg(long, value_name = "STEPS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_training_steps: Option<u64>,
    /// Largest norm of a step's gradients
    #[arg(long, value_name = "NORM")]
    #[serde(skip_serializing_if = "Option::is_none")]
    clip_grad_norm: Option<f64>,
    /// Compression of inputs: NONE, FLOAT16, MEANSTD_16BIT, QUANTILE_8BIT, UNIFORM_8BIT, BLOCKWISE_8BIT [default: NONE]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    compression: Option<String>,
    /// Makes the initial weights repeatable
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

/// Options of hivemind-server that have nothing to do here.
#[derive(Clone, Debug, Default, Args)]
#[command(rename_all = "snake_case", next_help_heading = "Accepted for hivemind's sake")]
pub struct HivemindFlags {
    /// No effect here: one process serves all experts
    #[arg(long, value_name = "N")]
    num_handlers: Option<usize>,
    /// No effect here: the limit of open files is always raised
    #[arg(long)]
    increase_file_limit: bool,
    #[command(flatten)]
    relays: RelayFlags,
    /// Refused: a Python file cannot be hosted
    #[arg(long, value_name = "FILE")]
    custom_module_path: Option<PathBuf>,
}

/// Options of hivemind about relays, which are not there.
#[derive(Clone, Debug, Default, Args)]
#[command(rename_all = "snake_case", next_help_heading = "Accepted for hivemind's sake")]
pub struct RelayFlags {
    /// No effect here: no relay is used
    #[arg(long)]
    no_relay: bool,
    /// No effect here: no relay is used
    #[arg(long)]
    use_auto_relay: bool,
}

impl RelayFlags {
    /// Says which given options have no effect.
    pub fn warn(&self) {
        no_effect(&[("--no_relay", self.no_relay), ("--use_auto_relay", self.use_auto_relay)]);
    }
}

fn no_effect(options: &[(&str, bool)]) {
    for (name, _) in options.iter().filter(|(_, given)| *given) {
        eprintln!("note: {name} has no effect here");
    }
}

#[cfg(feature = "torch")]
impl HivemindFlags {
    /// Refuses what cannot be done.
    pub fn check(&self) -> Result<(), super::Failure> {
        match &self.custom_module_path {
            None => Ok(()),
            Some(path) => Err(super::Failure::Usage(format!(
                "--custom_module_path {}: a Python file cannot be hosted; export the module as TorchScript \
                 (torch.jit.script(module).save(\"expert.pt\")) and name it in an [[experts]] section: \
                 module = \"expert.pt\"",
                path.display()
            ))),
        }
    }

    /// Says which given options have no effect.
    pub fn warn(&self) {
        no_effect(&[
            ("--num_handlers", self.num_handlers.is_some()),
            ("--increase_file_limit", self.increase_file_limit),
        ]);
        self.relays.warn();
    }
}

/// Layers defaults, file, environment and the flags of a node without experts.
pub fn load_dht_config(file: &ConfigFile, node: &NodeFlags, dht: &DhtFlags) -> Result<Loaded, ConfigError> {
    let mut flags = Dict::new();
    add(&mut flags, "node", dict(node));
    add(&mut flags, "dht", dict(dht));
    load(file.config.as_deref(), Flags(flags))
}

/// Layers defaults, file, environment and these flags.
pub fn load_config(
    file: &ConfigFile,
    node: &NodeFlags,
    server: Option<&ServerFlags>,
    experts: Option<&ExpertFlags>,
) -> Result<Loaded, ConfigError> {
    let mut flags = Dict::new();
    add(&mut flags, "node", dict(node));
    if let Some(server) = server {
        add(&mut flags, "server", dict(server));
    }
    if let Some(experts) = experts.map(dict).filter(|given| !given.is_empty()) {
        flags.insert("experts".to_owned(), Value::from(vec![Value::from(experts)]));
    }
    load(file.config.as_deref(), Flags(flags))
}

fn add(flags: &mut Dict, section: &str, given: Dict) {
    if !given.is_empty() {
        flags.insert(section.to_owned(), Value::from(given));
    }
}

fn dict(flags: &impl Serialize) -> Dict {
    let value = Value::serialize(flags).expect("flags are strings, numbers and lists");
    value.into_dict().expect("a struct serializes as a dict")
}
