//! `skep checkpoint …`: looks at checkpoints, and exchanges them with hivemind's servers.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use skep_expert::{Checkpoint, CheckpointStore, DirectoryCheckpoints, Manifest};
use skep_torch::pt;
use skep_wire::ExpertUid;

use super::{
    Failure,
    flags::{ConfigFile, ExpertFlags, NodeFlags, ServerFlags, load_config},
};
use crate::{config, daemon, error::Error};

/// The newest state of an expert in a folder of hivemind's.
const LAST: &str = "checkpoint_last.pt";
/// A file of hivemind's may be so large; the format holds no more.
const MAX_FILE: u64 = 4 << 30;

/// `skep checkpoint …`
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Show the checkpoints of a folder
    List(List),
    /// Take over the checkpoints of a hivemind server
    Import(Box<Import>),
    /// Write checkpoints for a hivemind server
    Export(Export),
}

/// Options of `skep checkpoint list`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = "Example:\n  skep checkpoint list checkpoints")]
pub struct List {
    /// Folder of checkpoints
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

const IMPORT_EXAMPLES: &str = "\
Examples:
  skep checkpoint import /data/hivemind checkpoints --expert_cls ffn --hidden_dim 512 --optimizer adam
  skep checkpoint import /data/hivemind checkpoints --config skep.toml

Reads UID/checkpoint_last.pt for each expert. Class, width and optimizer must be those with which the experts are hosted, \
here and there; a group of the configuration that names an expert says so.";

/// Options of `skep checkpoint import`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = IMPORT_EXAMPLES)]
pub struct Import {
    /// hivemind's checkpoint_dir
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Folder of checkpoints; made when it does not exist
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    file: ConfigFile,
    #[command(flatten)]
    experts: ExpertFlags,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  skep checkpoint export checkpoints /data/hivemind
  skep checkpoint export checkpoints /data/hivemind --uids ffn.0.3 ffn.0.4

Writes UID/checkpoint_last.pt from the newest checkpoint of each expert.";

/// Options of `skep checkpoint export`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXPORT_EXAMPLES)]
pub struct Export {
    /// Folder of checkpoints
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// hivemind's checkpoint_dir
    #[arg(value_name = "TO")]
    to: PathBuf,
    /// Only these experts [default: all]
    #[arg(long, num_args = 1.., value_name = "UID")]
    uids: Vec<String>,
}

impl CheckpointCommand {
    pub fn run(self) -> Result<(), Failure> {
        match self {
            CheckpointCommand::List(list) => list.run(),
            CheckpointCommand::Import(import) => import.run(),
            CheckpointCommand::Export(export) => export.run(),
        }
    }
}

impl List {
    fn run(self) -> Result<(), Failure> {
        let store = DirectoryCheckpoints::reading(self.folder).map_err(Error::from)?;
        for uid in store.experts().map_err(Error::from)? {
            for id in store.list(&uid).map_err(Error::from)? {
                match store.read(&uid, id) {
                    Ok(Checkpoint { manifest, .. }) => {
                        println!("{uid} {id} step {} {} {}", manifest.step, manifest.class, manifest.optimizer);
                    }
                    Err(error) => println!("{uid} {id} {error}"),
                }
            }
        }
        Ok(())
    }
}

impl Import {
    fn run(self) -> Result<(), Failure> {
        // The folder of checkpoints says which experts, so the group need not.
        let server = ServerFlags::checkpoints_in(&self.folder);
        let config = load_config(&self.file, &NodeFlags::default(), Some(&server), Some(&self.experts))?.config;
        let uids = experts_in(&self.from)?;
        if uids.is_empty() {
            let text = format!("{} has no folder with a {LAST} in it", self.from.display());
            return Err(Error::Invalid(text).into());
        }
        let store = DirectoryCheckpoints::open(self.folder).map_err(Error::from)?;
        for uid in uids {
            let path = self.from.join(uid.as_str()).join(LAST);
            let explain = |reason: String| Error::Invalid(format!("{}: {reason}", path.display()));
            let group = config.experts.iter().find(|group| names(group, &uid)).cloned().unwrap_or_default();
            let checkpoint = import(&uid, &group, &read(&path)?).map_err(explain)?;
            store.write(&uid, &checkpoint).map_err(Error::from)?;
            println!("{uid} step {}", checkpoint.snapshot.step);
        }
        Ok(())
    }
}

/// Whether a group says how this expert is made.
fn names(group: &config::Experts, uid: &ExpertUid) -> bool {
    let pattern = group.expert_pattern.as_ref().map(|text| text.parse::<skep_expert::ExpertPattern>());
    match pattern {
        Some(pattern) => pattern.is_ok_and(|pattern| pattern.names(uid)),
        None => group.expert_uids.is_empty() || group.expert_uids.iter().any(|given| given == uid.as_str()),
    }
}

/// A checkpoint of an expert that is made as its group says, with the state of the file; loaded once to be sure.
fn import(uid: &ExpertUid, group: &config::Experts, file: &[u8]) -> Result<Checkpoint, String> {
    let group = config::Experts {
        expert_pattern: None,
        expert_uids: vec![uid.to_string()],
        num_experts: None,
        ..group.clone()
    };
    let experts = daemon::experts(&group).map_err(|error| error.to_string())?;
    let mut factory = experts.factory(uid).ok_or("nothing says what it is made of")?;
    let mut backend = factory().map_err(|error| error.to_string())?;
    let fresh = backend.save().map_err(|error| error.to_string())?;
    let count = backend.settings().get("parameter_tensors").map_or(0, |n| *n as usize);
    let module = fresh.tensors.iter().filter_map(|(name, _)| name.strip_prefix("module."));
    let parameters: Vec<String> = module.take(count).map(str::to_owned).collect();
    let snapshot = pt::read_checkpoint(file, &fresh, &parameters).map_err(|error| error.to_string())?;
    backend.load(&snapshot).map_err(|error| error.to_string())?;
    let manifest = Manifest::of(uid, snapshot.step, &*backend).map_err(|error| error.to_string())?;
    Ok(Checkpoint { manifest, snapshot })
}

impl Export {
    fn run(self) -> Result<(), Failure> {
        let store = DirectoryCheckpoints::reading(self.folder).map_err(Error::from)?;
        let uids = if self.uids.is_empty() {
            store.experts().map_err(Error::from)?
        } else {
            let uids = self.uids.iter().map(|uid| uid.parse::<ExpertUid>());
            uids.collect::<Result<_, _>>().map_err(|error| Failure::Usage(error.to_string()))?
        };
        for uid in uids {
            let folder = self.to.join(uid.as_str());
            // A name with a slash in it would lead elsewhere; hivemind cannot have written one either.
            if uid.as_str().contains(['/', '\\']) {
                return Err(Error::Invalid(format!("{uid} is no name of a folder")).into());
            }
            let ids = store.list(&uid).map_err(Error::from)?;
            let newest = ids.first().ok_or_else(|| Error::Invalid(format!("{uid} has no checkpoint")))?;
            let checkpoint = store.read(&uid, *newest).map_err(Error::from)?;
            let file =
                pt::write_checkpoint(&checkpoint).map_err(|error| Error::Invalid(format!("{uid}: {}", error.0)))?;
            fs::create_dir_all(&folder).map_err(system("make", &folder))?;
            let path = folder.join(LAST);
            let unfinished = folder.join(format!("{LAST}.tmp"));
            fs::write(&unfinished, file).map_err(system("write", &unfinished))?;
            fs::rename(&unfinished, &path).map_err(system("write", &path))?;
            println!("{uid} step {}", checkpoint.snapshot.step);
        }
        Ok(())
    }
}

/// The experts with a state in a folder of hivemind's.
fn experts_in(folder: &Path) -> Result<Vec<ExpertUid>, Error> {
    let mut uids = Vec::new();
    for entry in fs::read_dir(folder).map_err(system("read", folder))? {
        let path = entry.map_err(system("read", folder))?.path();
        let uid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        uids.extend(uid.filter(|_| path.join(LAST).is_file()));
    }
    uids.sort();
    Ok(uids)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let size = fs::metadata(path).map_err(system("read", path))?.len();
    if size > MAX_FILE {
        return Err(Error::Invalid(format!("{} is larger than 4 GiB", path.display())));
    }
    fs::read(path).map_err(system("read", path))
}

fn system(what: &str, path: &Path) -> impl Fn(std::io::Error) -> Error + use<> {
    let what = format!("cannot {what} {}", path.display());
    move |source| Error::System { what: what.clone(), source }
}
