//! The command line: help, exit codes, key files, and mistakes that name the thing and the remedy.

mod common;

use std::{fs, os::unix::fs::PermissionsExt};

use common::*;

#[test]
fn mistakes_on_the_command_line_name_the_thing_and_the_remedy() {
    let absent = format!("/ip4/127.0.0.1/tcp/1/p2p/{}", skep_id());
    let bad_key = temporary("bad.key");
    fs::write(&bad_key, "no key").expect("the temporary folder can be written");
    fs::set_permissions(&bad_key, fs::Permissions::from_mode(0o400)).expect("it is ours");
    let bad_key = bad_key.to_str().expect("a UTF-8 path");
    for (args, code, parts) in [
        (&["serve"][..], 2, &["nothing to host", "--expert_pattern"][..]),
        (&["serve", "--expert_pattern", "e.[0:"], 2, &["e.[0:", "expert.[0:5]"]),
        (&["serve", "--expert_pattern", "e.[0:2]", "--num_experts", "3"], 2, &["num_experts", "names only 2", "widen"]),
        (&["serve", "--expert_uids", "e.0", "--device", "gpu"], 2, &["device", "\"gpu\"", "cuda:0"]),
        (
            &["serve", "--custom_module_path", "x.py"],
            2,
            &["x.py", "a Python file cannot be hosted", "TorchScript", "module ="],
        ),
        (&["dht", "get", "key"], 2, &["--peer"]),
        (&["serve", "--expert_uids", "e"], 2, &["expert_uids", "expert.3"]),
        (&["serf"], 2, &["serf", "serve"]),
        (&[], 2, &["Usage", "serve"]),
        (&["call", "e.0"], 2, &["--peer"]),
        (&["call", "e.0", "--peer", "10.0.0.1:80"], 2, &["10.0.0.1:80", "/ip4/"]),
        (&["call", "e.0", "--peer", &absent, "--timeout", "0"], 2, &["--timeout 0", "seconds"]),
        (&["experts", "e", "--peer", "/ip4/127.0.0.1/tcp/1"], 2, &["expert."]),
        (&["serve", "--hidden_dims", "3"], 2, &["--hidden_dims", "--hidden_dim"]),
        (&["dht", "--host_maddrs", "127.0.0.1:80"], 2, &["host_maddrs", "127.0.0.1:80"]),
        (&["dht", "--initial_peers", "/ip4/127.0.0.1/tcp/1"], 2, &["/p2p/"]),
        (&["dht", "--host_maddrs", "/ip4/203.0.113.7/tcp/0"], 1, &["203.0.113.7", "no such address"]),
        (&["call", "expert", "--peer", "/ip4/127.0.0.1/tcp/1"], 2, &["expert uid", "expert.3"]),
        (&["call", "e.0", "--peer", "/ip4/127.0.0.1/tcp/1"], 2, &["/p2p/"]),
        (&["identity", "show", "/no/such.key"], 1, &["/no/such.key"]),
        (&["dht", "--identity_path", bad_key], 1, &[bad_key, "is no key file", "skep identity new"]),
    ] {
        let (message, got) = failure(args);
        assert_eq!(got, Some(code), "{args:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is missing in:\n{message}");
        }
    }
    fs::remove_file(bad_key).expect("it was made");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let by_another_program = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().expect("bound").port());
    let node = Daemon::start(&["dht"]);
    let address = node.address();
    let by_another_node = address.split("/p2p/").next().expect("an address");
    for listen in [&by_another_program, by_another_node] {
        let (message, code) = failure(&["dht", "--host_maddrs", listen]);
        assert!(code == Some(1) && message.contains(listen) && message.contains("in use"), "{message}");
    }
}

#[test]
fn a_peer_that_is_not_there_is_worth_another_try() {
    let id = skep_id();
    let (message, code) =
        failure(&["call", "e.0", "--timeout", "1", "--peer", &format!("/ip4/127.0.0.1/tcp/9/p2p/{id}")]);
    assert!(code == Some(75) && message.contains(&id), "{message}");
}

#[test]
fn a_key_file_is_private_and_never_overwritten() {
    let path = temporary("private.key");
    let text = path.to_str().expect("a UTF-8 path");
    let made = skep(&["identity", "new", text, "--type", "rsa"]);
    assert!(made.status.success() && made.stdout.starts_with(b"Qm"), "{made:?}");
    assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o400);
    assert_eq!(skep(&["identity", "show", text]).stdout, made.stdout);
    let (message, code) = failure(&["identity", "new", text]);
    assert!(code == Some(1) && message.contains(text), "{message}");

    fs::set_permissions(&path, fs::Permissions::from_mode(0o440)).expect("it is ours");
    let (message, code) = failure(&["dht", "--identity_path", text]);
    assert!(code == Some(1) && message.contains(text) && message.contains("chmod"), "{message}");
    fs::remove_file(path).expect("it is there");
}

#[test]
fn hiveminds_key_file_gives_hiveminds_peer_id() {
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../actors/net/tests/vectors/identity_crypto.json")).expect("JSON");
    let vector = &vectors["identity_file"];
    let hex = vector["hex"].as_str().expect("text");
    let bytes = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex digits"));
    let path = temporary("hivemind.key");
    fs::write(&path, bytes.collect::<Vec<_>>()).expect("the temporary folder can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("it is ours");
    let shown = skep(&["identity", "show", path.to_str().expect("a UTF-8 path")]);
    assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), vector["peer_id_base58"].as_str().expect("text"));
    fs::remove_file(path).expect("it is there");
}

#[test]
fn every_command_shows_an_example_in_its_help_which_goes_to_stdout() {
    let commands = "serve|dht|dht get|dht store|dht keys|check|config|config print|identity|identity new|identity show|experts|call|bench|bench throughput|bench moe|bench dht|bench network|bench startup";
    for name in commands.split('|') {
        let help = skep(&[&name.split(' ').collect::<Vec<_>>()[..], &["--help"]].concat());
        let text = String::from_utf8_lossy(&help.stdout);
        let examples = text.split("Example").nth(1).unwrap_or_default();
        assert!(help.status.success() && examples.contains(&format!("skep {name}")), "{name}: {text}");
        assert!(help.stderr.is_empty(), "{help:?}");
    }
}

#[test]
fn options_are_written_with_dashes_or_underscores() {
    let texts = ["--update-period", "--update_period"].map(|option| {
        let printed = skep(&["config", "print", option, "7"]);
        assert!(printed.status.success(), "{printed:?}");
        String::from_utf8(printed.stdout).expect("text")
    });
    assert!(texts[0].contains("update_period = 7.0") && texts[0] == texts[1], "{texts:?}");
}

#[test]
fn several_addresses_follow_one_option() {
    let (listen, announce) =
        (["/ip4/127.0.0.1/tcp/31337", "/ip6/::1/tcp/31337"], ["/ip4/203.0.113.7/tcp/1", "/dns4/bee.example/tcp/1"]);
    let args = [&["config", "print", "--host_maddrs"][..], &listen, &["--announce_maddrs"], &announce].concat();
    let printed = skep(&args);
    let text = String::from_utf8_lossy(&printed.stdout);
    let config: toml_edit::DocumentMut = text.parse().expect("a configuration");
    let list = |key: &str| -> Vec<String> {
        let values = config["node"][key].as_array().expect("a list").iter();
        values.map(|value| value.as_str().expect("a text").to_owned()).collect()
    };
    assert_eq!(list("host_maddrs"), listen);
    assert_eq!(list("announce_maddrs"), announce);
}

#[test]
fn a_check_says_in_sentences_what_a_configuration_means() {
    let args =
        ["check", "--host_maddrs", "/ip4/0.0.0.0/tcp/31337", "--expert_pattern", "e.[0:5]", "--num_experts", "3"];
    let checked = skep(&args);
    let text = String::from_utf8_lossy(&checked.stdout);
    for sentence in [
        "listens on /ip4/0.0.0.0/tcp/31337",
        "anybody who reaches these addresses can train the experts",
        "starts a network of its own",
        "gets a new peer id at every start",
        "hosts 3 of e.[0:5]: ffn of width 1024, trained by sgd on cpu",
        "announces every 30 s, each time for 60 s",
    ] {
        assert!(text.contains(sentence), "{sentence:?} is missing in:\n{text}");
    }
    assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
}

#[test]
fn what_scripts_read_is_json_on_request() {
    let printed = |args: &[&str]| -> serde_json::Value {
        let output = skep(args);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"))
    };
    let checked = printed(&["check", "--json", "--expert_uids", "e.0"]);
    assert_eq!(checked["valid"], true);
    assert!(checked["means"].as_array().expect("sentences").iter().any(|line| line == "starts a network of its own"));
    let wrong = printed(&["check", "--json", "--expert_cls", "fnn"]);
    assert_eq!(wrong["valid"], false);
    assert!(wrong["error"].as_str().is_some_and(|error| error.contains("\"fnn\"")), "{wrong}");
    assert_eq!(skep(&["check", "--json", "--expert_cls", "fnn"]).status.code(), Some(2));

    let config = printed(&["config", "print", "--json", "--expert_uids", "e.0", "--update_period", "7"]);
    assert_eq!(
        (&config["server"]["update_period"], &config["experts"][0]["expert_uids"][0]),
        (&7.0.into(), &"e.0".into())
    );
    let origins = printed(&["config", "print", "--json", "--origin", "--expert_uids", "e.0"]);
    assert_eq!(origins["experts"][0]["expert_uids"]["origin"], "command line");
    assert_eq!(origins["dht"]["num_replicas"], serde_json::json!({"value": 5, "origin": "default"}));

    let path = temporary("json.key");
    let text = path.to_str().expect("a UTF-8 path");
    let made = printed(&["identity", "new", text, "--type", "rsa", "--json"]);
    assert_eq!(made, printed(&["identity", "show", text, "--json"]));
    assert!(made["peer_id"].as_str().is_some_and(|id| id.starts_with("Qm")) && made["type"] == "rsa", "{made}");
    assert!(made["record_owner"].as_str().is_some_and(|owner| owner.starts_with("[owner:ssh-rsa ")), "{made}");
    fs::remove_file(path).expect("it was made");
}
