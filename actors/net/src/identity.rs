//! Key files: who a node is (docs/wire.md §1.2).
//!
//! The file is the one that hivemind's `identity_path` names: a protobuf `crypto.PrivateKey`. hivemind's own check only
//! understands RSA keys, so a key that Python is to share must be RSA; otherwise Ed25519 is smaller and faster.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use libp2p_identity::{Keypair, PeerId};
use rsa::pkcs1::EncodeRsaPrivateKey as _;
use serde::{Deserialize, Serialize};
use skep_wire::proto::{
    self,
    crypto::{KeyType, PrivateKey},
};

/// The kind of a new key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyKind {
    /// Peer ids that begin with `12D3Koo`.
    #[default]
    Ed25519,
    /// 2048 bits, as hivemind makes them: Python can use the file too. Peer ids begin with `Qm`.
    Rsa,
}

/// A private key and its form in a file.
#[derive(Clone)]
pub struct Identity {
    keypair: Keypair,
    encoded: Vec<u8>,
}

impl Identity {
    /// The key pair, as [`Net::start`](crate::Net::start) takes it.
    pub fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    /// The peer id that belongs to it.
    pub fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// The bytes of a key file: protobuf `crypto.PrivateKey`. Secret.
    pub fn to_protobuf(&self) -> &[u8] {
        &self.encoded
    }

    /// The PKCS#1 form of an RSA key; `None` for keys of other kinds. Secret.
    pub fn rsa_pkcs1_der(&self) -> Option<Vec<u8>> {
        let key = proto::decode::<PrivateKey>(&self.encoded[..]).ok()?;
        (key.key_type() == KeyType::Rsa).then(|| key.data.to_vec())
    }

    /// Reads the bytes of a key file.
    pub fn from_protobuf(encoded: &[u8]) -> Result<Self, String> {
        let keypair = Keypair::from_protobuf_encoding(encoded).map_err(|error| error.to_string())?;
        Ok(Self { keypair, encoded: encoded.to_vec() })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer_id())
    }
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is no such file.
    #[error("there is no key file {}; `skep identity new` makes one", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file exists and must not be overwritten.
    #[error("key file {} exists and is not overwritten; remove it first if the identity may be lost", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others may read the file.
    #[error("key file {} can be read by others (mode {mode:04o}); run: chmod 400 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file cannot be read.
    #[error("cannot read key file {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write key file {}: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// The file holds no key.
    #[error("{} is no key file as hivemind or skep write them: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Generate(String),
}

/// No key file is larger; an RSA key of 4096 bits has 2.4 KB.
const MAX_FILE_BYTES: u64 = 16 << 10;
const RSA_BITS: usize = 2048;

/// Makes a new key. An RSA key takes up to a second or so.
pub fn generate(kind: KeyKind) -> Result<Identity, IdentityError> {
    let encoded = match kind {
        KeyKind::Ed25519 => Keypair::generate_ed25519().to_protobuf_encoding().map_err(generate_error)?,
        KeyKind::Rsa => {
            let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, RSA_BITS).map_err(generate_error)?;
            rsa_file(key.to_pkcs1_der().map_err(generate_error)?.as_bytes())
        }
    };
    Identity::from_protobuf(&encoded).map_err(IdentityError::Generate)
}

fn generate_error(error: impl fmt::Display) -> IdentityError {
    IdentityError::Generate(error.to_string())
}

/// `crypto.PrivateKey { 1: RSA, 2: PKCS#1 }`; both fields are written, as proto2 requires.
fn rsa_file(pkcs1: &[u8]) -> Vec<u8> {
    let mut length = unsigned_varint::encode::usize_buffer();
    let length = unsigned_varint::encode::usize(pkcs1.len(), &mut length);
    [&[0x08, 0x00, 0x12], length, pkcs1].concat()
}

/// Reads a key file: hivemind's RSA file or one of ours. A file that group or others can read is refused.
pub fn load(path: &Path) -> Result<Identity, IdentityError> {
    let unreadable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing { path: path.to_owned() },
        _ => IdentityError::Unreadable { path: path.to_owned(), source },
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(unreadable(io::ErrorKind::IsADirectory.into()));
    }
    if let Some(mode) = exposed_mode(&metadata) {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    let mut encoded = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut encoded).map_err(unreadable)?;
    let format = |reason: String| IdentityError::Format { path: path.to_owned(), reason };
    if encoded.len() as u64 > MAX_FILE_BYTES {
        return Err(format(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    Identity::from_protobuf(&encoded).map_err(format)
}

/// Writes a key file that only its owner can read. It appears whole or not at all, and never replaces another file.
pub fn save(path: &Path, identity: &Identity) -> Result<(), IdentityError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => IdentityError::Exists { path: path.to_owned() },
        _ => IdentityError::Unwritable { path: path.to_owned(), source },
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:08x}.new", rand::random::<u32>()));
    let unfinished = path.with_file_name(name);
    // A link, unlike a rename, fails when the name is taken.
    let written = write_private(&unfinished, identity.to_protobuf()).and_then(|()| fs::hard_link(&unfinished, path));
    let removed = match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    written.and(removed).map_err(failed)
}

/// Reads the key file, or makes one of this kind if there is none.
pub fn load_or_create(path: &Path, kind: KeyKind) -> Result<Identity, IdentityError> {
    match load(path) {
        Err(IdentityError::Missing { .. }) => {}
        loaded => return loaded,
    }
    let identity = generate(kind)?;
    match save(path, &identity) {
        Ok(()) => Ok(identity),
        // Another process was quicker.
        Err(IdentityError::Exists { .. }) => load(path),
        Err(error) => Err(error),
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o400);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(unix)]
fn exposed_mode(metadata: &fs::Metadata) -> Option<u32> {
    let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777;
    (mode & 0o077 != 0).then_some(mode)
}

#[cfg(not(unix))]
fn exposed_mode(_: &fs::Metadata) -> Option<u32> {
    None
}
