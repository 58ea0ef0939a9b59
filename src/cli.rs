//! The command line: `skep serve`, `dht`, `check`, `config`, `checkpoint`, `identity`, `experts`, `call`,
//! `bench`.
//!
//! stdout carries only what scripts read: for `serve` and `dht` the listen multiaddrs once ready, for the others their
//! result. Everything else goes to stderr. Exit codes: 0 done, 1 failed, 2 usage or configuration, 70 a part of the
//! node failed more often than it is restarted, 75 try again.

#[cfg(feature = "torch")]
mod bench;
mod call;
mod check;
#[cfg(feature = "torch")]
mod checkpoint;
mod dht;
mod experts;
mod flags;
mod identity;
mod peer;
mod records;
#[cfg(feature = "torch")]
mod serve;
mod signals;
mod wait;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{config::ConfigError, error::Error};

const EXAMPLES: &str = "\
Examples:
  skep serve --expert_cls ffn --hidden_dim 512 --num_experts 5 --expert_pattern \"expert.[0:5]\"
  skep serve --config config/skep.toml --initial_peers /ip4/10.0.0.7/tcp/31337/p2p/12D3Koo...
  skep dht --host_maddrs /ip4/0.0.0.0/tcp/31337
  skep experts expert. --peer ADDR
  skep call expert.1 --peer ADDR

Long options may be written with underscores, as hivemind does, or with dashes.";

/// A decentralized mixture of experts: host experts, join a network of them, call them.
#[derive(Debug, Parser)]
#[command(name = "skep", version, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Host experts and announce them
    #[cfg(feature = "torch")]
    Serve(serve::Serve),
    /// Run a DHT node without experts, a bootstrap peer for others; or read and write records
    Dht(dht::Dht),
    /// Read the configuration and say what it means, without starting anything
    Check(check::Check),
    /// Show the configuration
    #[command(subcommand, after_help = "Example:\n  skep config print --origin --config skep.toml")]
    Config(check::ConfigCommand),
    /// Look at checkpoints, and exchange them with hivemind's servers
    #[cfg(feature = "torch")]
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Make or show the key that a peer id is made from
    #[command(subcommand, after_help = "Example:\n  skep identity new server.key")]
    Identity(identity::Identity),
    /// List the experts that are announced under a prefix, and until when
    Experts(experts::Experts),
    /// Send one forward call to an expert: the first thing to try
    Call(call::CallExpert),
    /// Measure this machine's hives, and beside them what the machine could do at best
    #[cfg(feature = "torch")]
    #[command(subcommand, after_help = bench::EXAMPLES)]
    Bench(bench::Bench),
}

/// How a command fails.
#[derive(Debug)]
enum Failure {
    /// Exit code 2.
    Config(Box<ConfigError>),
    /// Exit code 2.
    Usage(String),
    /// Exit code 1, or 75 when trying again may help.
    Run(Error),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::Config(Box::new(error))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Run(error)
    }
}

/// Runs a command line and tells its exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args.into_iter().map(underscored)) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            // Nothing can be told to anybody when stdout and stderr are gone.
            let _closed = error.print();
            return ExitCode::from(code);
        }
    };
    let outcome = match cli.command {
        #[cfg(feature = "torch")]
        Command::Serve(serve) => serve.run(),
        Command::Dht(dht) => dht.run(),
        Command::Check(check) => check.run(),
        Command::Config(config) => config.run(),
        #[cfg(feature = "torch")]
        Command::Checkpoint(checkpoint) => checkpoint.run(),
        Command::Identity(identity) => identity.run(),
        Command::Experts(experts) => experts.run(),
        Command::Call(call) => call.run(),
        #[cfg(feature = "torch")]
        Command::Bench(bench) => bench.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(failure),
    }
}

fn report(failure: Failure) -> ExitCode {
    match failure {
        Failure::Config(error) => {
            miette::set_hook(Box::new(unwrapped)).expect("a process reports once");
            eprintln!("{:?}", miette::Report::new(*error));
            ExitCode::from(2)
        }
        Failure::Usage(text) => {
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
        Failure::Run(error) => {
            eprintln!("error: {error}");
            if let Some(help) = error.help() {
                eprintln!("  help: {help}");
            }
            ExitCode::from(exit_code(&error))
        }
    }
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Escalated { .. } => 70,
        error if error.is_transient() => 75,
        _ => 1,
    }
}

/// Lines are not wrapped, so that paths and addresses can be copied.
fn unwrapped(_: &(dyn miette::Diagnostic + 'static)) -> Box<dyn miette::ReportHandler> {
    Box::new(miette::MietteHandlerOpts::new().wrap_lines(false).build())
}

/// `--hidden-dim` as `--hidden_dim`; values and short options stay as they are.
fn underscored(arg: OsString) -> OsString {
    let Some(text) = arg.to_str().filter(|text| text.starts_with("--") && text.len() > 2) else {
        return arg;
    };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    format!("--{}{value}", name[2..].replace('-', "_")).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_part_that_supervision_gave_up_ends_the_process_with_70() {
        assert_eq!(exit_code(&Error::Escalated { part: "dht".into(), reason: "Panicked".into() }), 70);
        let waiting = Error::NotReady { waited: Default::default(), waiting_for: "the DHT".into() };
        assert_eq!((exit_code(&waiting), exit_code(&Error::Invalid("x".into()))), (75, 1));
    }

    #[test]
    fn options_may_be_written_with_dashes() {
        assert_eq!(underscored("--hidden-dim=5-6".into()), OsString::from("--hidden_dim=5-6"));
        assert_eq!(underscored("--".into()), OsString::from("--"));
        assert_eq!(underscored("a-b".into()), OsString::from("a-b"));
    }
}
