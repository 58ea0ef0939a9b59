//! The daemon's configuration: the documented defaults, its layers, and what a mistake looks like.

use std::{fs, path::PathBuf, process::Command};

use figment::value::Dict;
use skep::config::{Config, Flags, load};

const EXAMPLE: &str = include_str!("../config/skep.toml");

/// A file that goes with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("skep-config-{}-{name}.toml", std::process::id()));
        fs::write(&path, text).expect("the temporary folder can be written");
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // What remains in the temporary folder hurts nobody.
        let _remains = fs::remove_file(&self.0);
    }
}

/// What `skep check` says of a configuration: standard error and exit code.
fn check(name: &str, text: &str) -> (String, Option<i32>) {
    let file = File::new(name, text);
    let output = skep(&["check", "--config", file.0.to_str().expect("a UTF-8 path")], &[]);
    (String::from_utf8(output.stderr).expect("text"), output.status.code())
}

fn skep(args: &[&str], env: &[(&str, &str)]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skep"));
    command.args(args).envs(env.iter().copied()).env("NO_COLOR", "1").output().expect("skep starts")
}

fn stdout(args: &[&str], env: &[(&str, &str)]) -> String {
    let output = skep(args, env);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Every section of the configuration with its keys, those without a default included.
fn keys() -> Vec<(&'static str, Vec<String>)> {
    let lines = EXAMPLE.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
    let mut sections: Vec<(&str, Vec<String>)> = Vec::new();
    for line in lines {
        let header = line.strip_prefix("[[").and_then(|l| l.strip_suffix("]]"));
        let header = header.or_else(|| line.strip_prefix('[').and_then(|l| l.strip_suffix(']')));
        match (header, line.split_once(" = ")) {
            (Some(name), _) => sections.push((name, Vec::new())),
            (None, Some((key, _))) if key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') => {
                sections.last_mut().expect("keys come after a section").1.push(key.to_owned());
            }
            _ => {}
        }
    }
    sections
}

#[test]
fn the_example_file_is_the_default_configuration() {
    let file = File::new("example", EXAMPLE);
    let loaded = load(Some(&file.0), Flags::default()).expect("the example is valid");
    assert_eq!(loaded.config, Config::default());
}

#[test]
fn the_example_file_holds_every_key() {
    for (section, keys) in keys() {
        let header = if section == "experts" { "[[experts]]".to_owned() } else { format!("[{section}]") };
        let (message, _) = check(&format!("all-{section}"), &format!("{header}\nno_such_key = 1\n"));
        // Without a near key the help lists all keys of the section.
        let known = message.split_once("the keys here are:").expect("an unknown key is refused").1;
        let known: Vec<&str> = known.split([',', ' ', '\n', '│']).map(str::trim).filter(|k| !k.is_empty()).collect();
        let missing: Vec<_> = known.iter().filter(|key| !keys.iter().any(|k| k == *key)).collect();
        assert!(missing.is_empty(), "config/skep.toml lacks {missing:?} in [{section}]");
        assert_eq!(
            known.len(),
            keys.len(),
            "config/skep.toml has keys that are none in [{section}]: {known:?} {keys:?}"
        );
    }
}

#[test]
fn a_mistyped_key_is_shown_with_its_place_and_the_nearest_one() {
    let (message, code) = check("typo", "[node]\nhost_maddrs = [\"/ip4/127.0.0.1/tcp/0\"]\ninitial_peer = []\n");
    assert_eq!(code, Some(2));
    for part in ["node.initial_peer", "skep-config-", ":3:", "did you mean `initial_peers`?"] {
        assert!(message.contains(part), "{part:?} is missing in:\n{message}");
    }
}

#[test]
fn a_value_of_the_wrong_type_names_its_key_and_shows_its_line_for_every_key() {
    for (section, keys) in keys() {
        let header = if section == "experts" { "[[experts]]".to_owned() } else { format!("[{section}]") };
        for key in keys {
            // No key takes a table.
            let text = format!("{header}\n{key} = {{ wrong = true }}\n");
            let (message, code) = check(&format!("bad-{section}-{key}"), &text);
            assert_eq!(code, Some(2), "{section}.{key}: {message}");
            assert!(message.contains(&key) && message.contains(":2:"), "{section}.{key}: {message}");
        }
    }
}

#[test]
fn a_value_that_makes_no_sense_comes_with_a_remedy() {
    for (text, part) in [
        ("[server]\nmin_batch_size = 9\nmax_batch_size = 8\n", "lower it, or raise max_batch_size"),
        ("[node]\ninitial_peers = [\"/ip4/127.0.0.1/tcp/1\"]\n", "end it with /p2p/"),
        ("[[experts]]\nexpert_cls = \"fnn\"\n", "use one of ffn, transformer"),
        ("[[experts]]\nhidden_dim = 8\n", "expert_pattern = \"expert.[0:5]\""),
        ("[log]\nformat = \"xml\"\n", "use one of text, json"),
    ] {
        let (message, code) = check("sense", text);
        assert_eq!(code, Some(2), "{message}");
        assert!(
            message.split_whitespace().collect::<Vec<_>>().join(" ").contains(part),
            "{part:?} is missing in:\n{message}"
        );
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there_is_named() {
    let (message, code) = check("syntax", "[node\n");
    assert!(code == Some(2) && message.contains("not valid TOML"), "{message}");
    let output = skep(&["check", "--config", "/no/such/file.toml"], &[]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && message.contains("/no/such/file.toml"), "{message}");
}

#[test]
fn flags_win_over_the_environment_and_the_environment_over_the_file() {
    let file = File::new("layers", "[server]\nupdate_period = 7.0\nmax_batch_size = 77\nmin_batch_size = 5\n");
    let path = file.0.to_str().expect("a UTF-8 path");
    let env = [("SKEP_SERVER__UPDATE_PERIOD", "8"), ("SKEP_SERVER__MAX_BATCH_SIZE", "88"), ("SKEP_NOTHING", "1")];
    let printed = stdout(&["config", "print", "--origin", "--config", path, "--max-batch-size", "99"], &env);
    let line = |key: &str| printed.lines().find(|line| line.starts_with(key)).expect("every key is printed").to_owned();
    assert!(line("update_period").starts_with("update_period = 8.0") && line("update_period").contains("environment"));
    assert!(
        line("max_batch_size").starts_with("max_batch_size = 99") && line("max_batch_size").contains("command line")
    );
    assert!(line("min_batch_size").starts_with("min_batch_size = 5") && line("min_batch_size").contains(path));
    assert!(line("check_finite").contains("default"), "{printed}");
}

#[test]
fn an_expert_flag_replaces_all_groups_of_the_file() {
    let file =
        File::new("groups", "[[experts]]\nexpert_pattern = \"a.[0:2]\"\n\n[[experts]]\nexpert_pattern = \"b.[0:2]\"\n");
    let mut group = Dict::new();
    group.insert("expert_pattern".into(), "c.[0:2]".into());
    let mut flags = Dict::new();
    flags.insert("experts".into(), vec![group].into());
    let config = load(Some(&file.0), Flags(flags)).expect("valid").config;
    let patterns: Vec<_> = config.experts.iter().map(|experts| experts.expert_pattern.as_deref()).collect();
    assert_eq!(patterns, [Some("c.[0:2]")]);
}
