//! `skep serve`: hosts experts until it is told to stop.

use clap::Args;

use super::{
    Failure,
    flags::{ConfigFile, ExpertFlags, HivemindFlags, NodeFlags, ServerFlags, load_config},
    signals,
};
use crate::{config::ConfigError, daemon, error::Error, telemetry};

const EXAMPLES: &str = "\
Examples:
  skep serve --expert_cls ffn --hidden_dim 512 --num_experts 5 --expert_pattern \"expert.[0:5]\"
  skep serve --num_experts 10 --expert_pattern \"expert.[5:250]\" --initial_peers ADDR
  skep serve --config config/skep.toml

Prints its addresses on stdout, one a line, when its experts are ready and announced. \
SIGINT or SIGTERM ends it in order, a second one at once.";

/// Options of `skep serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Serve {
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    experts: ExpertFlags,
    #[command(flatten)]
    server: ServerFlags,
    #[command(flatten)]
    node: NodeFlags,
    #[command(flatten)]
    hivemind: HivemindFlags,
    /// End at once when stdin closes: whoever started this holds the other end
    #[arg(long = "end_with_stdin", hide = true)]
    end_with_stdin: bool,
}

impl Serve {
    pub fn run(self) -> Result<(), Failure> {
        self.hivemind.check()?;
        let mut config = load_config(&self.file, &self.node, Some(&self.server), Some(&self.experts))?.config;
        if config.experts.is_empty() && config.server.checkpoint_dir.is_some() {
            config.experts.push(Default::default());
        }
        if config.experts.is_empty() {
            return Err(ConfigError::plain(
                "nothing to host",
                "say what: skep serve --expert_cls ffn --hidden_dim 512 --expert_pattern \"expert.[0:5]\"; \
                 a node without experts is `skep dht`",
            )
            .into());
        }
        telemetry::start(&config.log)?;
        self.hivemind.warn();
        let signal = signals::first_signal()?;
        if self.end_with_stdin {
            let failed = |source| Error::System { what: "cannot watch stdin".to_owned(), source };
            super::bench::process::end_with_stdin(|_| ()).map_err(failed)?;
        }
        let builder = daemon::server(&config)?;
        Ok(daemon::run(builder, &config, &signal)?)
    }
}
