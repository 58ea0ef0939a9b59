//! Logs of the daemon, on stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::{config::Log, error::Error};

/// What is of use only to those who look into libp2p itself; a filter that names these crates wins.
const QUIET: &str = "libp2p_swarm=warn,libp2p_kad=error,libp2p_identify=error";

/// Starts logging as `[log]` says; `RUST_LOG` wins over its filter.
pub fn start(log: &Log) -> Result<(), Error> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(filter) => filter,
        Err(_) => format!("{QUIET},{}", log.filter),
    };
    let filter = EnvFilter::try_new(&filter)
        .map_err(|error| Error::Invalid(format!("log.filter {filter:?} is no filter: {error}")))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match log.format.as_str() {
        "json" => builder.json().try_init(),
        _ => builder.try_init(),
    };
    started.map_err(|error| Error::Invalid(format!("cannot start logging: {error}")))
}
