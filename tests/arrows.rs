//! The rooms rest on each other as `docs/architecture.md` says, and on nothing else.

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// What each room may use, directly. "Rests on" permits the target and everything below it.
const RESTS_ON: &[(&str, &[&str])] = &[
    ("skep-wire", &[]),
    ("skep-kernel", &[]),
    ("skep-rpc", &["skep-wire", "skep-kernel"]),
    ("skep-net", &["skep-rpc"]),
    ("skep-dht", &["skep-rpc"]),
    ("skep-expert", &["skep-dht"]),
    ("skep-moe", &["skep-dht"]),
    ("skep-torch", &["skep-expert", "skep-moe"]),
    ("skep-testkit", &["skep-expert", "skep-moe"]),
    ("skep", &["skep-net", "skep-torch"]),
];

/// Normal dependencies of every package of the workspace.
fn normal_dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("a list of dependencies");
            let normal = dependencies.iter().filter(|d| d["kind"].is_null());
            let names = normal.map(|d| d["name"].as_str().expect("a name").to_owned()).collect();
            (package["name"].as_str().expect("a name").to_owned(), names)
        })
        .collect()
}

fn below(room: &str) -> Vec<&'static str> {
    let (_, direct) = RESTS_ON.iter().find(|(name, _)| *name == room).expect("a known room");
    direct.iter().flat_map(|&name| std::iter::once(name).chain(below(name))).collect()
}

#[test]
fn rooms_rest_only_on_what_is_below_them() {
    let dependencies = normal_dependencies();
    assert_eq!(dependencies.len(), RESTS_ON.len(), "every room has its line in RESTS_ON");
    for (room, uses) in &dependencies {
        let allowed = below(room);
        for used in uses.iter().filter(|name| name.starts_with("skep")) {
            assert!(allowed.contains(&used.as_str()), "{room} must not rest on {used}");
        }
    }
}

#[test]
fn nobody_but_net_knows_libp2p_and_nobody_but_torch_knows_tch() {
    for (room, uses) in normal_dependencies() {
        for used in uses {
            let owner = match used.as_str() {
                "libp2p-identity" => continue,
                name if name.starts_with("libp2p") => "skep-net",
                "tch" | "torch-sys" => "skep-torch",
                _ => continue,
            };
            assert_eq!(room, owner, "{room} must not know {used}");
        }
    }
}

#[test]
fn the_harness_is_no_part_of_what_users_run() {
    for (room, uses) in normal_dependencies() {
        assert!(!uses.contains(&"skep-testkit".to_owned()), "{room} ships the test harness");
    }
}
