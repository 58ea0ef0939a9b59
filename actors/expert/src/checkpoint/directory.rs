//! [`DirectoryCheckpoints`]: checkpoints as files.
//!
//! ```text
//! checkpoints/
//!   .lock                        held while a server writes here
//!   ffn.0.3/
//!     00000007.safetensors       the tensors
//!     00000007.json              the manifest; written last: without it there is no checkpoint
//! ```

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use skep_wire::ExpertUid;
use tracing::warn;

use super::{Checkpoint, CheckpointId, CheckpointStore, StoreError, format};

const MANIFEST: &str = "json";
const TENSORS: &str = "safetensors";
const UNFINISHED: &str = "tmp";
/// A manifest is a few hundred bytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// A folder with one folder an expert. Files appear whole or not at all: each is written under another name, flushed to
/// the disk and renamed, and so is the folder that it is in. A sum in the manifest shows later damage.
#[derive(Debug)]
pub struct DirectoryCheckpoints {
    root: PathBuf,
    /// Held for life; the system lets go of it when the process dies. `None`: nothing may be written.
    lock: Option<File>,
}

impl DirectoryCheckpoints {
    /// Opens a folder for a server, which has it to itself; makes it when it does not exist.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        fs::create_dir_all(&root).map_err(io_error("make the folder", &root))?;
        let path = root.join(".lock");
        let lock = File::create(&path).map_err(io_error("write", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { root, lock: Some(lock) }),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse(root.display().to_string())),
            Err(TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
        }
    }

    /// Opens a folder to read only, also beside a server that writes there.
    pub fn reading(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        fs::read_dir(&root).map_err(io_error("read the folder", &root))?;
        Ok(Self { root, lock: None })
    }

    /// The folder of one expert's checkpoints.
    pub fn folder(&self, uid: &ExpertUid) -> PathBuf {
        self.root.join(folder_name(uid))
    }

    fn file(&self, uid: &ExpertUid, id: CheckpointId, extension: &str) -> PathBuf {
        self.folder(uid).join(format!("{id}.{extension}"))
    }

    /// Removes a file that belongs to no checkpoint any more. One that stays does no harm.
    fn remove(&self, path: &Path) {
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %path.display(), %error, "cannot remove an old checkpoint");
        }
    }

    fn check_writable(&self) -> Result<(), StoreError> {
        match self.lock {
            Some(_) => Ok(()),
            None => Err(StoreError::Unwritable("the folder was opened to read only".to_owned())),
        }
    }
}

impl CheckpointStore for DirectoryCheckpoints {
    fn experts(&self) -> Result<Vec<ExpertUid>, StoreError> {
        let mut uids = Vec::new();
        for name in entries(&self.root)? {
            if let Some(uid) = uid_of(&name)
                && !self.list(&uid)?.is_empty()
            {
                uids.push(uid);
            }
        }
        uids.sort();
        Ok(uids)
    }

    fn list(&self, uid: &ExpertUid) -> Result<Vec<CheckpointId>, StoreError> {
        let folder = self.folder(uid);
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let mut ids: Vec<CheckpointId> = entries(&folder)?.iter().filter_map(|name| id_of(name, MANIFEST)).collect();
        ids.sort_by(|a, b| b.cmp(a));
        Ok(ids)
    }

    fn read(&self, uid: &ExpertUid, id: CheckpointId) -> Result<Checkpoint, StoreError> {
        let damaged = |reason| StoreError::Damaged { id, reason };
        let path = self.file(uid, id, MANIFEST);
        let sealed = format::manifest(&read_whole(&path, None)?.map_err(damaged)?).map_err(damaged)?;
        let path = self.file(uid, id, TENSORS);
        let tensors = read_whole(&path, Some(sealed.tensors.bytes))?.map_err(damaged)?;
        format::decode(sealed, tensors).map_err(damaged)
    }

    fn write(&self, uid: &ExpertUid, checkpoint: &Checkpoint) -> Result<CheckpointId, StoreError> {
        self.check_writable()?;
        let (manifest, tensors) = format::encode(checkpoint).map_err(StoreError::Unwritable)?;
        let folder = self.folder(uid);
        if !folder.is_dir() {
            fs::create_dir(&folder).map_err(io_error("make the folder", &folder))?;
            flush_folder(&self.root)?;
        }
        // Numbers of unfinished and damaged ones are not used again.
        let used = entries(&folder)?.into_iter().filter_map(|name| id_of(&name, MANIFEST).or(id_of(&name, TENSORS)));
        let id = CheckpointId(used.max().map_or(1, |newest| newest.0.saturating_add(1)));
        write_whole(&self.file(uid, id, TENSORS), &tensors)?;
        write_whole(&self.file(uid, id, MANIFEST), &manifest)?;
        flush_folder(&folder)?;
        Ok(id)
    }

    fn prune(&self, uid: &ExpertUid, keep: usize) -> Result<(), StoreError> {
        self.check_writable()?;
        let ids = self.list(uid)?;
        let kept = &ids[..keep.min(ids.len())];
        for id in &ids[kept.len()..] {
            // The manifest first: without it the rest is no checkpoint.
            self.remove(&self.file(uid, *id, MANIFEST));
        }
        let folder = self.folder(uid);
        if !folder.is_dir() {
            return Ok(());
        }
        for name in entries(&folder)? {
            let left_over = id_of(&name, TENSORS).is_some_and(|id| !kept.contains(&id));
            if left_over || name.ends_with(&format!(".{UNFINISHED}")) {
                self.remove(&folder.join(name));
            }
        }
        Ok(())
    }
}

/// Names of what is in a folder, as far as they are text.
fn entries(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = || io_error("read the folder", folder);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed())? {
        names.extend(entry.map_err(failed())?.file_name().into_string());
    }
    Ok(names)
}

/// The bytes of a file, which must be so many; the inner error is damage.
fn read_whole(path: &Path, bytes: Option<u64>) -> Result<Result<Vec<u8>, String>, StoreError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err(format!("{} is missing", path.display())));
        }
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let found = file.metadata().map_err(io_error("read", path))?.len();
    match bytes {
        Some(expected) if expected != found => {
            return Ok(Err(format!("{} has {found} bytes instead of {expected}", path.display())));
        }
        None if found > MAX_MANIFEST => return Ok(Err(format!("{} has {found} bytes", path.display()))),
        _ => {}
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content).map_err(io_error("read", path))?;
    Ok(Ok(content))
}

/// Writes a file that appears whole or not at all.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let unfinished = path.with_added_extension(UNFINISHED);
    let mut file = File::create(&unfinished).map_err(io_error("write", &unfinished))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(io_error("write", &unfinished))?;
    fs::rename(&unfinished, path).map_err(io_error("rename to", path))
}

/// Makes renames in a folder durable.
fn flush_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("flush the folder", folder))
}

fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> StoreError + use<> {
    let what = format!("{what} {}", path.display());
    move |error| StoreError::Io { what: what.clone(), reason: error.to_string() }
}

fn id_of(file: &str, extension: &str) -> Option<CheckpointId> {
    let (stem, found) = file.split_once('.')?;
    let digits = stem.len() >= 8 && stem.bytes().all(|byte| byte.is_ascii_digit());
    if found == extension && digits { stem.parse().ok().map(CheckpointId) } else { None }
}

/// The uid as a file name: itself, but for bytes that a file name cannot have, written as `%2F`.
fn folder_name(uid: &ExpertUid) -> String {
    let plain = |byte: u8| !byte.is_ascii_control() && !matches!(byte, b'/' | b'\\' | b'%');
    let mut name = Vec::new();
    for byte in uid.as_str().bytes() {
        if plain(byte) { name.push(byte) } else { name.extend(format!("%{byte:02X}").into_bytes()) }
    }
    String::from_utf8(name).expect("only ASCII bytes were replaced, by ASCII")
}

/// The uid of a folder's name, if it is one's.
fn uid_of(name: &str) -> Option<ExpertUid> {
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        if *first == b'%' {
            let hex = std::str::from_utf8(behind.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(hex, 16).ok()?);
            rest = &behind[2..];
        } else {
            bytes.push(*first);
            rest = behind;
        }
    }
    String::from_utf8(bytes).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_uid_has_a_folder_name_of_its_own_that_leads_back() {
        for text in ["ffn.0.12", "a/b.0", "/up.1", "100%.3", "wörter.2", "tab\t.0"] {
            let uid: ExpertUid = text.parse().unwrap();
            let name = folder_name(&uid);
            assert!(!name.contains('/'), "{name}");
            assert_eq!(uid_of(&name), Some(uid));
        }
        assert_eq!(folder_name(&"ffn.0.12".parse().unwrap()), "ffn.0.12", "hivemind's name");
        assert_eq!(uid_of(".lock"), None);
    }

    #[test]
    fn other_files_are_no_checkpoints() {
        assert_eq!(id_of("00000012.json", MANIFEST), Some(CheckpointId(12)));
        for name in ["12.json", "00000012.json.tmp", "00000012.safetensors", "checkpoint_last.pt", "x0000012.json"] {
            assert_eq!(id_of(name, MANIFEST), None, "{name}");
        }
    }
}
