//! Options of commands that ask a running network.

use std::time::Duration;

use clap::Args;
use multiaddr::Multiaddr;

use super::{Failure, wait::Waiting};
use crate::{Runtime, RuntimeBuilder, runtime::peer_of};

/// Whom to ask, and for how long.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct Peer {
    /// A peer of the network with its /p2p/..., as it prints it when it is ready
    #[arg(long, required = true, num_args = 1.., value_name = "MULTIADDR", env = "SKEP_PEER", value_parser = address)]
    peer: Vec<Multiaddr>,
    /// Seconds to wait in all
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    timeout: f64,
}

fn address(text: &str) -> Result<Multiaddr, String> {
    text.parse().map_err(|error| format!("{error}; one looks like /ip4/10.0.0.7/tcp/31337/p2p/12D3Koo..."))
}

impl Peer {
    /// The wait as a duration.
    pub fn timeout(&self) -> Result<Duration, Failure> {
        Duration::try_from_secs_f64(self.timeout)
            .ok()
            .filter(|wait| !wait.is_zero())
            .ok_or_else(|| Failure::Usage(format!("--timeout {}: give a number of seconds above 0", self.timeout)))
    }

    /// Joins the network as a client.
    pub fn join(&self) -> Result<Runtime, Failure> {
        self.join_as(|builder| builder)
    }

    /// Joins the network as a client with more said about it.
    pub fn join_as(&self, said: impl FnOnce(RuntimeBuilder) -> RuntimeBuilder) -> Result<Runtime, Failure> {
        if let Some(address) = self.peer.iter().find(|address| peer_of(address).is_none()) {
            return Err(Failure::Usage(format!(
                "--peer {address} does not say which peer is there; end it with /p2p/ and the peer id"
            )));
        }
        let _waiting = Waiting::on("joining the network");
        let builder = Runtime::builder().client_mode().initial_peers(self.peer.clone());
        Ok(said(builder).start_timeout(self.timeout()?).start()?)
    }
}
