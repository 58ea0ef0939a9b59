//! `skep identity new|show`: the key that a peer id is made from.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

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
}

impl Identity {
    pub fn run(self) -> Result<(), Failure> {
        let identity = match self {
            Identity::New(new) => {
                let kind = match new.kind {
                    Kind::Ed25519 => KeyKind::Ed25519,
                    Kind::Rsa => KeyKind::Rsa,
                };
                let identity = identity::generate(kind).map_err(Error::from)?;
                identity::save(&new.path, &identity).map_err(Error::from)?;
                eprintln!("wrote {}", new.path.display());
                identity
            }
            Identity::Show(show) => identity::load(&show.path).map_err(Error::from)?,
        };
        println!("{}", identity.peer_id());
        Ok(())
    }
}
