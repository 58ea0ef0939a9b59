//! The daemon's configuration: the documented defaults, its layers, and what a mistake looks like.

use std::{fs, path::PathBuf, process::Command};

use figment::value::Dict;
use miette::{GraphicalReportHandler, GraphicalTheme};
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

/// How a file that must be refused is refused, as the daemon shows it.
fn refusal(name: &str, text: &str) -> String {
    let file = File::new(name, text);
    let error = load(Some(&file.0), Flags::default()).expect_err("the file is refused");
    let mut message = String::new();
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor()).with_wrap_lines(false);
    handler.render_report(&mut message, &error).expect("a string takes all text");
    message
}

/// Fails unless the message holds all parts.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in:\n{message}");
    }
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

fn header(section: &str) -> String {
    if section == "experts" { "[[experts]]".to_owned() } else { format!("[{section}]") }
}

#[test]
fn the_example_file_holds_every_key() {
    for (section, keys) in keys() {
        // Without a near key the help lists all keys of the section.
        let message = refusal(&format!("all-{section}"), &format!("{}\nno_such_key = 1\n", header(section)));
        let known = message.split_once("the keys here are:").expect("an unknown key is refused").1;
        let known: Vec<&str> = known.split([',', ' ', '\n']).filter(|key| !key.is_empty()).collect();
        assert_eq!(known, keys, "[{section}]: what the daemon knows, and what config/skep.toml has");
    }
}

#[test]
fn the_example_file_holds_every_section() {
    let message = refusal("sections", "no_such_section = 1\n");
    for (section, _) in keys() {
        assert!(message.contains(section), "{section}: {message}");
    }
    assert_says(
        &message,
        &[&format!("the keys here are: {}", keys().iter().map(|k| k.0).collect::<Vec<_>>().join(", "))],
    );
}

#[test]
fn a_mistyped_key_of_any_section_is_underlined_with_the_nearest_one_as_help() {
    for (section, keys) in keys() {
        for key in keys {
            let typo = format!("{}{key}", &key[..1]);
            let message = refusal(&format!("typo-{section}-{key}"), &format!("{}\n{typo} = 1\n", header(section)));

            assert_says(&message, &["unknown key", ":2:1]", &format!("did you mean `{key}`?")]);
        }
    }
    assert_says(&refusal("typo-section", "[sever]\nmax_wait = 1\n"), &["sever: unknown key", ":1:2]", "`server`?"]);
}

#[test]
fn a_value_of_the_wrong_type_names_its_key_and_shows_its_place_for_every_key() {
    for (section, keys) in keys() {
        for key in keys {
            // No key takes a table.
            let text = format!("{}\n{key} = {{ wrong = true }}\n", header(section));
            let message = refusal(&format!("bad-{section}-{key}"), &text);
            let path = if section == "experts" { format!("experts.0.{key}: ") } else { format!("{section}.{key}: ") };
            let place = format!(":2:{}]", key.len() + 4);
            assert_says(&message, &[&path, &place, "this value", "skep-config-"]);
        }
    }
}

#[test]
fn the_wrong_element_of_a_list_is_shown() {
    let text = "[node]\nhost_maddrs = [\n  \"/ip4/127.0.0.1/tcp/0\",\n  \"127.0.0.1:80\",\n]\n";
    assert_says(&refusal("element", text), &["\"127.0.0.1:80\"", "as in \"/ip4/127.0.0.1/tcp/31337\"", ":4:3]"]);
}

#[test]
fn the_wrong_group_of_experts_is_shown() {
    let text = "[[experts]]\nexpert_uids = [\"a.0\"]\n\n[[experts]]\nexpert_uids = [\"b.0\"]\noptimizer = \"sdg\"\n";
    assert_says(&refusal("group", text), &["experts.1.optimizer", ":6:13]", "use one of sgd"]);
    let lacking = "[[experts]]\nexpert_uids = [\"a.0\"]\n\n[[experts]]\nhidden_dim = 8\n";
    assert_says(&refusal("lacking", lacking), &["experts.1.expert_pattern", ":4:1]", "missing here"]);
}

#[test]
fn a_value_that_makes_no_sense_comes_with_a_remedy() {
    for (text, parts) in [
        ("[server]\nmin_batch_size = 9\nmax_batch_size = 8\n", &["lower it, or raise max_batch_size", ":2:18]"][..]),
        ("[server]\nmax_batch_size = 0\n", &["must be at least 1", ":2:18]"]),
        ("[server]\nupdate_period = -1.0\n", &["-1 is no number of seconds above 0", ":2:17]"]),
        ("[node]\ninitial_peers = [\"/ip4/127.0.0.1/tcp/1\"]\n", &["end it with /p2p/"]),
        ("[node]\nhost_maddrs = []\n", &["no address to listen on"]),
        ("[node]\nnetwork_threads = 0\n", &["must be from 1 to 256", ":2:19"]),
        ("[node]\nbusy_poll = 1.0\n", &["from 0 to 0.01", ":2:13"]),
        ("[[experts]]\nexpert_cls = \"fnn\"\n", &["use one of ffn, transformer"]),
        ("[[experts]]\nhidden_dim = 8\n", &["expert_pattern = \"expert.[0:5]\""]),
        ("[[experts]]\nexpert_pattern = \"e.[0:\"\n", &["invalid part", ":2:18]"]),
        ("[[experts]]\nexpert_pattern = \"e.[0:2]\"\nnum_experts = 3\n", &["names only 2", ":3:15]"]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\nscheduler = \"linear\"\n", &["give num_training_steps"]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\ndropout = 0.2\n", &["ffn has no dropout", ":3:11]"]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\neps = 1e-3\n", &["sgd has no eps", "optimizer = \"adam\""]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\nmomentum = 1.5\n", &["give 0 to below 1", ":3:12]"]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\nnesterov = true\n", &["give momentum = 0.9"]),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\ndevice = \"gpu\"\n", &["use cpu, cuda or cuda:0"]),
        (
            "[[experts]]\nexpert_uids = [\"e.0\"]\nmodule = \"a.pt\"\n",
            &["what the module takes is not said", "give inputs"],
        ),
        (
            "[[experts]]\nexpert_uids = [\"e.0\"]\nmodule = \"a.pt\"\ninputs = [{ dtype = \"f32\" }]\noutputs = [{ dtype = \"bool\" }]\n",
            &["no dtype is called", "bfloat16"],
        ),
        ("[[experts]]\nexpert_uids = [\"e.0\"]\noutputs = [{ dtype = \"bool\" }]\n", &["give module"]),
        ("[server]\nkeep_checkpoints = 0\n", &["must be at least 1"]),
        ("[limits]\nmax_body_bytes = 4294967296\n", &["4 GiB", ":2:18]"]),
        (
            "[limits]\nmax_inbound_bytes = 1000\nmax_body_bytes = 1001\n",
            &["1001 is above limits.max_inbound_bytes 1000", "raise max_inbound_bytes", ":3:18]"],
        ),
        ("[limits]\nmax_answer_bytes = 1000\nmax_body_bytes = 1001\n", &["raise max_answer_bytes", ":3:18]"]),
        (
            "[server]\ncheckpoint_dir = \"c\"\n[[experts]]\nhidden_dim = 8\n[[experts]]\nhidden_dim = 9\n",
            &["whatever has checkpoints"],
        ),
        ("[log]\nformat = \"xml\"\n", &["use one of text, json"]),
        ("[log]\nfilter = \"skep=lound\"\n", &["is no filter", "info,skep_net=debug"]),
    ] {
        assert_says(&refusal("sense", text), parts);
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there_is_named() {
    assert_says(&refusal("syntax", "[log]\nformat = \"text\"\n[node\n"), &["not valid TOML", ":3:6]"]);
    assert_says(&refusal("twice", "[log]\nformat = \"text\"\nformat = \"json\"\n"), &["not valid TOML", ":3:1]"]);
    let output = skep(&["check", "--config", "/no/such/file.toml"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert_says(&String::from_utf8_lossy(&output.stderr), &["/no/such/file.toml", "leave --config out"]);
}

#[test]
fn a_bad_value_of_the_environment_names_the_variable() {
    for (name, value, parts) in [
        ("SKEP_SERVER__UPDATE_PERIOD", "often", &["server.update_period", "\"often\""][..]),
        ("SKEP_SERVER__UPDATE_PEROD", "5", &["unknown key", "`update_period`?"]),
        ("SKEP_DHT__BUCKET_SIZE", "0", &["must be at least 1"]),
        ("SKEP_NODE__HOST_MADDRS", "[\"nowhere\"]", &["node.host_maddrs.0", "\"nowhere\""]),
    ] {
        let output = skep(&["check"], &[(name, value)]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_says(&message, parts);
        assert_says(&message, &[&format!("from environment variable {name}")]);
    }
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
