//! Key files: hivemind's, ours, and those that must not be used.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use skep_net::identity::{IdentityError, KeyKind, generate, load, load_or_create, save};

/// A folder that is removed when the test ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("identity-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, bytes: &[u8], mode: u32) -> PathBuf {
        let path = self.0.join("key");
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A key file that hivemind wrote, and its peer id.
fn hiveminds() -> (Vec<u8>, String) {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("vectors/identity_crypto.json")).unwrap();
    let file = &vectors["identity_file"];
    let text = |key: &str| file[key].as_str().unwrap().to_owned();
    (hex::decode(text("hex")).unwrap(), text("peer_id_base58"))
}

#[test]
fn hiveminds_key_file_gives_the_same_peer_id() {
    let (folder, (bytes, peer)) = (Folder::new("hivemind"), hiveminds());
    let identity = load(&folder.file(&bytes, 0o400)).unwrap();
    assert_eq!(identity.peer_id().to_base58(), peer);
    assert_eq!(identity.to_protobuf(), bytes);
}

#[test]
fn a_new_key_of_either_kind_reads_back_and_is_private() {
    for kind in [KeyKind::Ed25519, KeyKind::Rsa] {
        let folder = Folder::new(&format!("{kind:?}"));
        let (path, identity) = (folder.0.join("key"), generate(kind).unwrap());
        save(&path, &identity).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o400);
        assert_eq!(load(&path).unwrap().peer_id(), identity.peer_id());
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing unfinished is left");
    }
}

#[test]
fn a_key_is_made_once_and_then_read() {
    let folder = Folder::new("once");
    let path = folder.0.join("key");
    assert!(matches!(load(&path), Err(IdentityError::Missing { .. })));
    let made = load_or_create(&path, KeyKind::Ed25519).unwrap();
    assert_eq!(load_or_create(&path, KeyKind::Rsa).unwrap().peer_id(), made.peer_id());
}

#[test]
fn a_key_file_is_never_overwritten() {
    let folder = Folder::new("keep");
    let path = folder.file(b"precious", 0o400);
    assert!(matches!(save(&path, &generate(KeyKind::Ed25519).unwrap()), Err(IdentityError::Exists { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
}

#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() {
    let (folder, (bytes, _)) = (Folder::new("exposed"), hiveminds());
    for mode in [0o440, 0o644, 0o604, 0o420] {
        let path = folder.0.join("key");
        if path.exists() {
            fs::remove_file(&path).unwrap();
        }
        let path = folder.file(&bytes, mode);
        let error = load(&path).unwrap_err();
        assert!(error.to_string().contains(&format!("chmod 400 {}", path.display())), "{error}");
    }
}

#[test]
fn a_file_that_holds_no_key_is_named() {
    let folder = Folder::new("format");
    for bytes in [&b""[..], b"not a key", &[0x08, 0x00, 0x12, 0x01, 0x00], &vec![7; 100_000]] {
        let path = folder.file(bytes, 0o600);
        let error = load(&path).unwrap_err();
        assert!(matches!(error, IdentityError::Format { .. }), "{error:?}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_folder_that_does_not_exist_is_an_error_of_writing() {
    let folder = Folder::new("nowhere");
    let path = folder.0.join("missing/key");
    assert!(matches!(load_or_create(&path, KeyKind::Ed25519), Err(IdentityError::Unwritable { .. })));
    assert!(matches!(load(&folder.0), Err(IdentityError::Unreadable { .. })));
}

#[test]
fn a_key_does_not_show_itself_when_printed() {
    let identity = generate(KeyKind::Ed25519).unwrap();
    assert_eq!(format!("{identity:?}"), format!("Identity({})", identity.peer_id()));
}
