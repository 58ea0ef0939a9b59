//! `skep check` and `skep config print`: what a configuration says, without starting anything.

use clap::{Args, Subcommand};
use miette::Diagnostic as _;
use serde_json::{Value, json};

use super::{
    Failure,
    flags::{ConfigFile, ExpertFlags, NodeFlags, ServerFlags, load_config},
};
use crate::config::{Config, Loaded, validate::is_loopback};

const EXAMPLES: &str = "\
Examples:
  skep check --config config/skep.toml
  SKEP_SERVER__UPDATE_PERIOD=10 skep check --config config/skep.toml --num_experts 3
  skep check --config config/skep.toml --json";

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
    /// Print one JSON object, also when the configuration is wrong
    #[arg(long)]
    json: bool,
}

impl Check {
    pub fn run(self) -> Result<(), Failure> {
        match load_config(&self.file, &self.node, Some(&self.server), Some(&self.experts)) {
            Ok(loaded) if self.json => {
                println!("{:#}", json!({"valid": true, "means": explain(&loaded.config)}));
                Ok(())
            }
            Ok(loaded) => {
                explain(&loaded.config).iter().for_each(|line| println!("{line}"));
                Ok(())
            }
            Err(error) => {
                if self.json {
                    let help = error.help().map(|help| help.to_string());
                    println!("{:#}", json!({"valid": false, "error": error.to_string(), "help": help}));
                }
                Err(error.into())
            }
        }
    }
}

/// What a configuration means, in sentences.
pub fn explain(config: &Config) -> Vec<String> {
    let node = &config.node;
    let mut lines = Vec::new();
    let listen: Vec<String> = node.host_maddrs.iter().map(ToString::to_string).collect();
    lines.push(format!("listens on {}", listen.join(", ")));
    if node.host_maddrs.iter().any(|address| !is_loopback(address)) && node.allow_peers.is_none() {
        let risk = if config.experts.is_empty() { "store records" } else { "train the experts" };
        lines.push(format!("anybody who reaches these addresses can {risk} (restrict with allow_peers)"));
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
            (None, Some(n)) if experts.expert_uids.is_empty() => {
                format!("the first {n} free of expert.0, expert.1, ...")
            }
            (None, _) if experts.expert_uids.is_empty() => "what has checkpoints".to_owned(),
            (None, _) => experts.expert_uids.join(", "),
        };
        let module = match &experts.module {
            Some(file) => file.display().to_string(),
            None => format!("{} of width {}", experts.expert_cls, experts.hidden_dim),
        };
        lines.push(format!("hosts {what}: {module}, trained by {} on {}", experts.optimizer, experts.device));
    }
    let server = &config.server;
    let holds = server.expiration.unwrap_or(2.0 * server.update_period);
    lines.push(format!("announces every {} s, each time for {holds} s", server.update_period));
    if let Some(folder) = &server.checkpoint_dir {
        let (period, keep) = (server.checkpoint_period, server.keep_checkpoints);
        lines.push(format!("keeps the last {keep} checkpoints in {}, taken every {period} s", folder.display()));
    }
    lines.push(format!("batches {} to {} rows", server.min_batch_size, server.max_batch_size));
    let http = &config.http;
    lines.push(match http.enabled {
        true => format!("tells its state at http://{} (/live, /ready, /status, /metrics)", http.listen),
        false => "has no status page (http.enabled)".to_owned(),
    });
    if http.enabled && !http.listen.ip().is_loopback() {
        lines.push("anybody who reaches the status page can read it".to_owned());
    }
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
  skep config print --origin --config skep.toml
  skep config print --json";

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
    /// Print one JSON object; with --origin each value is an object of value and origin
    #[arg(long)]
    json: bool,
}

impl ConfigCommand {
    pub fn run(self) -> Result<(), Failure> {
        let ConfigCommand::Print(print) = self;
        let loaded = load_config(&print.file, &print.node, Some(&print.server), Some(&print.experts))?;
        if print.json {
            let config = serde_json::to_value(&loaded.config).expect("every section is plain JSON");
            println!("{:#}", if print.origin { with_origins(config, "", &loaded) } else { config });
        } else {
            print!("{}", render(&loaded, print.origin));
        }
        Ok(())
    }
}

/// Each value, beside where it came from.
fn with_origins(value: Value, path: &str, loaded: &Loaded) -> Value {
    let at = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(keys) => {
            keys.into_iter().map(|(key, value)| (key.clone(), with_origins(value, &at(&key), loaded))).collect()
        }
        Value::Array(items) if path == "experts" => {
            items.into_iter().enumerate().map(|(i, item)| with_origins(item, &at(&i.to_string()), loaded)).collect()
        }
        value => json!({"value": value, "origin": loaded.origin(path)}),
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
            section = if name == "experts" { format!("{name}.{groups}") } else { name.to_owned() };
            groups += usize::from(name == "experts");
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
