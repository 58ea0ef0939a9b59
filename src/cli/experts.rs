//! `skep experts PREFIX`: who is announced, where, and until when.

use clap::Args;
use serde_json::json;
use skep_dht::Listed;
use skep_wire::ExpertPrefix;

use super::{Failure, peer::Peer, wait::Waiting};

const EXAMPLES: &str = "\
Examples:
  skep experts expert. --peer /ip4/127.0.0.1/tcp/31337/p2p/12D3Koo...
  skep experts ffn.0. --peer ADDR --json

Under a bare name, as expert., nothing in the DHT tells which first coordinates
there are: they are tried one after the other, until 512 in a row are absent.";

/// Options of `skep experts`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Experts {
    /// Beginning of the uids, ending in a dot, as in "expert."
    prefix: ExpertPrefix,
    #[command(flatten)]
    peer: Peer,
    /// Print a JSON array of objects with uid, peer, expires_in
    #[arg(long)]
    json: bool,
}

impl Experts {
    pub fn run(self) -> Result<(), Failure> {
        let runtime = self.peer.join()?;
        let waiting = Waiting::on(format!("looking for experts under {}", self.prefix));
        let found = runtime.experts_under(&self.prefix, self.peer.timeout()?)?;
        drop(waiting);
        if found.is_empty() {
            eprintln!("no experts are announced under {}", self.prefix);
        }
        let now = runtime.wall();
        let left = |listed: &Listed| listed.hosted.expiration.0 - now.0;
        if self.json {
            let describe = |listed: &Listed| {
                let peer = listed.hosted.value.to_string();
                json!({"uid": listed.uid.as_str(), "peer": peer, "expires_in": left(listed)})
            };
            println!("{:#}", found.iter().map(describe).collect::<serde_json::Value>());
        } else {
            for listed in &found {
                println!("{}\t{}\texpires in {:.0} s", listed.uid, listed.hosted.value, left(listed));
            }
        }
        Ok(())
    }
}
