//! `skep identity new|show`: the key that a peer id is made from.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use skep_dht::RecordKey;
use skep_net::identity::{self, KeyKind};

use super::Failure;
use crate::error::Error;

/// `skep identity …`
#[derive(Debug, Subcommand)]
pub enum Identity {
    /// Make a new key file and print its peer id
    #[command(after_help = "Example:\n  skep identity new server.key --type rsa")]
    New(New),
    /// Print the peer id of a key file
    #[command(after_help = "Example:\n  skep identity show server.key")]
    Show(Show),
}

/// Options of `skep identity new`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct New {
    /// Where to write it; an existing file is not overwritten
    path: PathBuf,
    /// Kind of key: hivemind's Python package reads only rsa
    #[arg(long = "type", value_enum, default_value = "ed25519")]
    kind: Kind,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Kinds of keys.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Ed25519,
    Rsa,
}

/// Options of `skep identity show`.
#[derive(Debug, Args)]
pub struct Show {
    /// A key file
    path: PathBuf,
    /// Print one JSON object: peer_id, type, and for RSA keys the owner of the records that it signs
    #[arg(long)]
    json: bool,
}

impl Identity {
    pub fn run(self) -> Result<(), Failure> {
        let (identity, json) = match self {
            Identity::New(new) => {
                let kind = match new.kind {
                    Kind::Ed25519 => KeyKind::Ed25519,
                    Kind::Rsa => KeyKind::Rsa,
                };
                let identity = identity::generate(kind).map_err(Error::from)?;
                identity::save(&new.path, &identity).map_err(Error::from)?;
                eprintln!("wrote {}", new.path.display());
                (identity, new.json)
            }
            Identity::Show(show) => (identity::load(&show.path).map_err(Error::from)?, show.json),
        };
        if json {
            println!("{:#}", describe(&identity));
        } else {
            println!("{}", identity.peer_id());
        }
        Ok(())
    }
}

fn describe(identity: &identity::Identity) -> serde_json::Value {
    let rsa = identity.rsa_pkcs1_der();
    let kind = if rsa.is_some() { "rsa" } else { "ed25519" };
    let owner = rsa.and_then(|der| RecordKey::from_pkcs1_der(&der).ok());
    let owner = owner.map(|key| String::from_utf8_lossy(&key.owner_marker()).into_owned());
    json!({"peer_id": identity.peer_id().to_string(), "type": kind, "record_owner": owner})
}
