//! Every option of hivemind's commands is known to ours, and explained in `docs/migration.md`.

mod common;

use common::*;

const PAGE: &str = include_str!("../docs/migration.md");

/// Options of `hivemind-server` 1.1.12.
const SERVER: &[&str] = &[
    "config",
    "num_experts",
    "expert_pattern",
    "expert_uids",
    "expert_cls",
    "hidden_dim",
    "host_maddrs",
    "announce_maddrs",
    "no_relay",
    "use_auto_relay",
    "num_handlers",
    "min_batch_size",
    "max_batch_size",
    "device",
    "optimizer",
    "scheduler",
    "num_warmup_steps",
    "update_period",
    "expiration",
    "num_training_steps",
    "clip_grad_norm",
    "initial_peers",
    "increase_file_limit",
    "compression",
    "checkpoint_dir",
    "stats_report_interval",
    "custom_module_path",
    "identity_path",
];
/// Options of `hivemind-dht` 1.1.12, but `use_ipfs`, which is not there.
const DHT: &[&str] = &[
    "initial_peers",
    "host_maddrs",
    "announce_maddrs",
    "identity_path",
    "no_relay",
    "use_auto_relay",
    "refresh_period",
];

#[test]
fn every_option_of_hiveminds_commands_is_known_and_explained() {
    for (command, options, heading) in [("serve", SERVER, "## `hivemind-server`"), ("dht", DHT, "## `hivemind-dht`")] {
        let help = skep(&[command, "--help"]);
        let help = String::from_utf8(help.stdout).expect("text");
        let section = PAGE.split(heading).nth(1).expect("its section");
        let section = section.split("\n## ").next().expect("it ends somewhere");
        for option in options {
            let option = format!("--{option}");
            assert!(help.split([' ', ',', '\n']).any(|word| word == option), "{command} does not know {option}");
            assert!(section.contains(&format!("`{option}`")), "docs/migration.md: {option} of {command} is missing");
        }
    }
}

#[test]
fn every_option_that_the_page_names_exists() {
    let helps: Vec<String> =
        ["serve", "dht"].map(|command| String::from_utf8(skep(&[command, "--help"]).stdout).expect("text")).into();
    let named = PAGE.split('`').skip(1).step_by(2).filter_map(|code| code.strip_prefix("--"));
    let named = named.map(|code| code.split(' ').next().expect("a name")).filter(|name| *name != "use_ipfs");
    for name in named {
        let option = format!("--{name}");
        let known = helps.iter().any(|help| help.split([' ', ',', '\n']).any(|word| word == option));
        assert!(known, "docs/migration.md names {option}, which nobody knows");
    }
}
