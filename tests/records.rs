//! Records of the DHT from the command line: values, entries of dictionaries, and entries that belong to a key.

mod common;

use std::{fs, path::PathBuf};

use common::*;
use serde_json::{Value, json};

/// A key file that goes with the test.
struct Key(PathBuf);

impl Key {
    fn new(name: &str, kind: &str) -> Self {
        let path = temporary(name);
        assert!(skep(&["identity", "new", path.to_str().expect("a UTF-8 path"), "--type", kind]).status.success());
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a UTF-8 path")
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // What remains in the temporary folder hurts nobody.
        let _remains = fs::remove_file(&self.0);
    }
}

/// What a command prints as JSON.
fn printed(args: &[&str]) -> Value {
    let output = skep(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn what_is_stored_is_found_until_it_expires_and_only_later_values_replace_it() {
    let node = Daemon::start(&["dht"]);
    let peer = node.address();
    let stored = printed(&["dht", "store", "greeting", "hello", "--expiration", "600", "--peer", &peer]);
    assert_eq!((&stored["key"], &stored["subkey"]), (&json!("greeting"), &Value::Null));
    let found = printed(&["dht", "get", "greeting", "--peer", &peer]);
    assert_eq!(found["value"], "hello");
    let left = found["expires_in"].as_f64().expect("seconds");
    assert!((500.0..=600.0).contains(&left), "{found}");

    let (message, code) = failure(&["dht", "store", "greeting", "hi", "--expiration", "60", "--peer", &peer]);
    assert!(code == Some(1) && message.contains("greeting") && message.contains("later"), "{message}");
    let (message, code) = failure(&["dht", "get", "nothing", "--peer", &peer]);
    assert!(code == Some(1) && message.contains("nothing"), "{message}");
}

#[test]
fn entries_of_a_dictionary_have_subkeys_of_any_kind() {
    let node = Daemon::start(&["dht"]);
    let peer = node.address();
    for (subkey, value) in [("3", "0.5"), ("alice", "{\"score\": [1, null]}")] {
        printed(&["dht", "store", "scores", value, "--subkey", subkey, "--peer", &peer]);
    }
    assert_eq!(printed(&["dht", "keys", "scores", "--peer", &peer]), json!([3, "alice"]));
    let found = printed(&["dht", "get", "scores", "--subkey", "alice", "--peer", &peer]);
    assert_eq!(found["value"], json!({"score": [1, null]}));
    assert_eq!(printed(&["dht", "get", "scores", "--peer", &peer])["entries"][0]["value"], 0.5);
}

#[test]
fn an_entry_with_an_owner_is_changed_by_nobody_else() {
    let node = Daemon::start(&["dht"]);
    let peer = node.address();
    let (alice, mallory) = (Key::new("alice.key", "rsa"), Key::new("mallory.key", "rsa"));
    let owner = &printed(&["identity", "show", alice.path()])["record_owner"];
    let owner = owner.as_str().expect("an RSA key owns records");
    let store = |value: &str, expiration: &str, key: &Key| {
        let args = ["dht", "store", "shared", value, "--subkey", "a", "--sign", key.path(), "--expiration", expiration];
        skep(&[&args[..], &["--peer", &peer]].concat())
    };
    assert!(store("1", "100", &alice).status.success());
    assert!(store("2", "200", &alice).status.success(), "the owner changes it");
    let subkeys = printed(&["dht", "keys", "shared", "--peer", &peer]);
    assert_eq!(subkeys, json!([format!("a{owner}")]));
    assert_eq!(printed(&["dht", "get", "shared", "--peer", &peer])["entries"][0]["value"], 2, "without its signature");

    // The same subkey as text is another one; whoever names the owner without its key is refused.
    let forged = format!("x{owner}");
    let args = ["dht", "store", "shared", "3", "--subkey", &forged, "--expiration", "300", "--peer", &peer];
    assert_eq!(failure(&args).1, Some(1));
    assert!(store("4", "400", &mallory).status.success(), "an entry of one's own beside it");
    let entries = printed(&["dht", "get", "shared", "--peer", &peer]);
    let values: Vec<&Value> = entries["entries"].as_array().expect("entries").iter().map(|e| &e["value"]).collect();
    assert!(values.len() == 2 && values.contains(&&json!(2)) && values.contains(&&json!(4)), "{entries:#}");

    let ed25519 = Key::new("ed25519.key", "ed25519");
    let (message, code) = failure(&["dht", "store", "k", "v", "--sign", ed25519.path(), "--peer", &peer]);
    assert!(code == Some(2) && message.contains("--type rsa"), "{message}");
}
