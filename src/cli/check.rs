//! `skep check` and `skep config print`: what a configuration says, without starting anything.

use clap::{Args, Subcommand};

use super::{
    Failure,
    flags::{ConfigFile, ExpertFlags, NodeFlags, ServerFlags, load_config},
};
use crate::config::{Config, Loaded, validate::is_loopback};

const EXAMPLES: &str = "\
Examples:
  skep check --config config/skep.toml
  SKEP_SERVER__UPDATE_PERIOD=10 skep check --config config/skep.toml --num_experts 3";

/// Options of `skep check`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Check {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    node: NodeFlags,
    #[command(flatten)]
    server: ServerFlags,
    #[command(flatten)]
    experts: ExpertFlags,
}

impl Check {
    pub fn run(self) -> Result<(), Failure> {
        let loaded = load_config(&self.file, &self.node, Some(&self.server), Some(&self.experts))?;
        for line in explain(&loaded.config) {
            println!("{line}");
        }
        Ok(())
    }
}

/// What a configuration means, in sentences.
pub fn explain(config: &Config) -> Vec<String> {
    let node = &config.node;
    let mut lines = Vec::new();
    let listen: Vec<String> = node.host_maddrs.iter().map(ToString::to_string).collect();
    lines.push(format!("listens on {}", listen.join(", ")));
    if node.host_maddrs.iter().any(|address| !is_loopback(address)) && node.allow_peers.is_none() {
        lines.push("anybody who reaches these addresses can train the experts (restrict with allow_peers)".to_owned());
    }
    lines.push(match node.initial_peers.len() {
        0 => "starts a network of its own".to_owned(),
        n => format!("joins a network through {n} peer(s), retrying for ever"),
    });
    lines.push(match &node.identity_path {
        Some(path) => format!("its peer id comes from {}", path.display()),
        None => "gets a new peer id at every start (keep one with identity_path)".to_owned(),
    });
    if config.experts.is_empty() {
        lines.push("hosts no experts".to_owned());
    }
    for experts in &config.experts {
        let what = match (&experts.expert_pattern, experts.num_experts) {
            (Some(pattern), Some(n)) => format!("{n} of {pattern}"),
            (Some(pattern), None) => format!("all of {pattern}"),
            (None, _) if experts.expert_uids.is_empty() => "what has checkpoints".to_owned(),
            (None, _) => experts.expert_uids.join(", "),
        };
        lines.push(format!(
            "hosts {what}: {} of width {}, trained by {} on {}",
            experts.expert_cls, experts.hidden_dim, experts.optimizer, experts.device
        ));
    }
    let server = &config.server;
    let holds = server.expiration.unwrap_or(2.0 * server.update_period);
    lines.push(format!("announces every {} s, each time for {holds} s", server.update_period));
    if let Some(folder) = &server.checkpoint_dir {
        let (period, keep) = (server.checkpoint_period, server.keep_checkpoints);
        lines.push(format!("keeps the last {keep} checkpoints in {}, taken every {period} s", folder.display()));
    }
    lines.push(format!("batches {} to {} rows", server.min_batch_size, server.max_batch_size));
    lines
}

/// `skep config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the configuration that results from defaults, file, environment and flags
    Print(Print),
}

const PRINT_EXAMPLES: &str = "\
Examples:
  skep config print > skep.toml
  skep config print --origin --config skep.toml";

/// Options of `skep config print`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = PRINT_EXAMPLES)]
pub struct Print {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    node: NodeFlags,
    #[command(flatten)]
    server: ServerFlags,
    #[command(flatten)]
    experts: ExpertFlags,
    /// Say behind each value where it came from
    #[arg(long)]
    origin: bool,
}

impl ConfigCommand {
    pub fn run(self) -> Result<(), Failure> {
        let ConfigCommand::Print(print) = self;
        let loaded = load_config(&print.file, &print.node, Some(&print.server), Some(&print.experts))?;
        print!("{}", render(&loaded, print.origin));
        Ok(())
    }
}

/// The configuration as TOML, each value followed by its origin when asked.
fn render(loaded: &Loaded, origin: bool) -> String {
    let text = toml_edit::ser::to_string_pretty(&loaded.config).expect("every section is plain TOML");
    if !origin {
        return text;
    }
    let (mut section, mut groups, mut out) = (String::new(), 0, String::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("[[").and_then(|l| l.strip_suffix("]]")) {
            section = format!("{name}.{groups}");
            groups += 1;
        } else if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.to_owned();
        }
        match line.split_once(" = ") {
            Some((key, _)) => out += &format!("{line}  # {}\n", loaded.origin(&format!("{section}.{key}"))),
            None => out += &format!("{line}\n"),
        }
    }
    out
}
