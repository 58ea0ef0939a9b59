//! The daemon's manners: what it prints, and how it joins, restarts and ends.

mod common;

use std::{fs, sync::mpsc, time::Duration};

use common::*;

#[test]
fn it_prints_its_addresses_answers_a_call_and_ends_in_order() {
    let mut server = Daemon::start(&[&["serve", "--expert_uids", "one.0", "one.1"], FFN].concat());
    let address = server.address();
    assert!(address.starts_with("/ip4/127.0.0.1/tcp/") && address.contains("/p2p/"), "{address}");
    server.says("one.0: ffn, 2160 parameters");

    let call = skep(&["call", "one.1", "--peer", &address, "--rows", "3", "--json"]);
    let answer: serde_json::Value = serde_json::from_slice(&call.stdout).expect("JSON");
    assert_eq!(answer["outputs"][0]["shape"], serde_json::json!([3, 16]));

    let listed = skep(&["experts", "one.", "--peer", &address, "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let uids: Vec<_> = listed.as_array().expect("an array").iter().map(|expert| &expert["uid"]).collect();
    assert_eq!(uids, ["one.0", "one.1"]);

    let (message, code) = failure(&["call", "one.7", "--peer", &address]);
    assert!(code == Some(1) && message.contains("one.7") && message.contains("skep experts one."), "{message}");
    assert_eq!(server.ends().code(), Some(0));
    assert_eq!(server.stdout.try_iter().count(), 0, "stdout carries only the addresses");
}

#[test]
fn a_second_server_joins_and_takes_uids_that_are_free() {
    let first = Daemon::start(&[&["serve", "--num_experts", "2", "--expert_pattern", "e.[0:2]"], FFN].concat());
    let join = first.address();
    let args = ["serve", "--num_experts", "2", "--expert_pattern", "e.[0:4]", "--initial_peers", &join];
    let second = Daemon::start(&[&args, FFN].concat());
    second.says("e.2: ffn");
    second.says("e.3: ffn");
    second.address();
    let full = ["serve", "--expert_pattern", "e.[0:4]", "--initial_peers", &join];
    let (message, code) = failure(&[&full, FFN].concat());
    assert!(code == Some(1) && message.contains("widen it or host fewer experts"), "{message}");
}

#[test]
fn experts_that_are_only_counted_are_the_first_free_ones() {
    let first = Daemon::start(&[&["serve", "--num_experts", "2"], FFN].concat());
    let join = first.address();
    first.says("expert.0: ffn");
    first.says("expert.1: ffn");
    let second = Daemon::start(&[&["serve", "--num_experts", "1", "--initial_peers", &join], FFN].concat());
    second.says("expert.2: ffn");
    second.address();
}

#[test]
fn a_dht_node_reports_what_it_holds() {
    let node = Daemon::start(&["dht", "--refresh_period", "0.3", "--use_auto_relay"]);
    node.says("--use_auto_relay has no effect here");
    let address = node.address();
    let alone = node.says("nodes in the routing table");
    assert!(alone.contains("nodes=1 ") && alone.contains("records=0 "), "{alone}");
    let _other = Daemon::start(&[&["serve", "--expert_uids", "r.0", "--initial_peers", &address], FFN].concat());
    let mut report = node.says("nodes in the routing table");
    for _ in 0..200 {
        if report.contains("nodes=2 ") && report.contains("records=2 ") {
            return;
        }
        report = node.says("nodes in the routing table");
    }
    panic!("{report}");
}

#[test]
fn a_bootstrap_that_is_down_is_named_and_joined_once_it_is_up() {
    let key = temporary("bootstrap.key");
    let key = key.to_str().expect("a UTF-8 path");
    let mut bootstrap = Daemon::start(&["dht", "--identity_path", key]);
    let address = bootstrap.address();
    let (listen, peer) = address.split_once("/p2p/").expect("an address ends in a peer id");
    assert_eq!(bootstrap.ends().code(), Some(0));

    let server = Daemon::start(&[&["serve", "--expert_uids", "late.0", "--initial_peers", &address], FFN].concat());
    let line = server.says("dialling failed");
    assert!(line.contains(peer), "{line}");
    let again = Daemon::start(&["dht", "--identity_path", key, "--host_maddrs", listen]);
    assert_eq!(again.address(), address, "the same identity is the same peer");
    server.address();
    fs::remove_file(key).expect("the key was made");
}

#[test]
fn a_killed_server_comes_back_as_the_same_peer_and_is_found_again() {
    let bootstrap = Daemon::start(&["dht"]);
    let (join, key) = (bootstrap.address(), temporary("server.key"));
    let key = key.to_str().expect("a UTF-8 path");
    let args = ["serve", "--expert_uids", "back.0", "--identity_path", key, "--initial_peers", &join];
    let args = [&args, FFN].concat();
    let mut killed = Daemon::start(&args);
    let first = killed.address();
    killed.child.kill().expect("it runs");
    killed.child.wait().expect("it ended");
    let again = Daemon::start(&args);
    let peer = |address: &str| address.split_once("/p2p/").expect("a peer id").1.to_owned();
    assert_eq!(peer(&again.address()), peer(&first));
    let call = skep(&["call", "back.0", "--peer", &join]);
    assert!(call.status.success(), "{}", String::from_utf8_lossy(&call.stderr));
    fs::remove_file(key).expect("the key was made");
}

#[test]
fn a_signal_in_the_middle_of_calls_ends_it_within_five_seconds_and_leaves_no_caller_waiting() {
    // One executor and half a second for each of twenty calls, of which a stop waits for less than four seconds.
    let config = temporary("busy.toml");
    fs::write(&config, "[server]\nexecutors = 1\n").expect("the temporary folder can be written");
    let nop = ["--expert_cls", "nop_delay", "--hidden_dim", "16", "--config", config.to_str().expect("a UTF-8 path")];
    let mut server = Daemon::start(&[&["serve", "--expert_pattern", "busy.[0:20]"], &nop[..]].concat());
    let runtime = skep::Runtime::client([server.address().parse().expect("an address")]).expect("it joins");
    let client: &skep::moe::Client = runtime.as_ref();
    let deadline = || client.deadline(PATIENCE);
    let (tell, ends) = mpsc::sync_channel(20);
    for i in 0..20 {
        let uid = format!("busy.{i}").parse().expect("a uid");
        let found = skep::RemoteExpert::find_wait(client, &uid, deadline());
        let (expert, deadline) = (found.expect("an answer").expect("it is announced"), deadline());
        let tell = tell.clone();
        let x = skep::wire::HostTensor::from_f32([1, 16], &[0.5; 16]).expect("it fits");
        let call = move || tell.send(expert.forward_wait(vec![x], deadline).is_ok());
        std::thread::Builder::new().name("caller".to_owned()).spawn(call).expect("a thread starts");
    }
    assert!(ends.recv_timeout(PATIENCE).expect("a call ends"), "the first call is answered");
    // What it could not finish is no success.
    assert_eq!(server.ends_within(Duration::from_secs(5)).code(), Some(1));
    let others: Vec<bool> = (1..20).map(|_| ends.recv_timeout(PATIENCE).expect("no caller waits on")).collect();
    assert!(others.contains(&false), "the work was too little for this test");
    fs::remove_file(config).expect("it was made");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Daemon::start(&[&["serve", "--expert_uids", "two.0"], FFN].concat());
    server.address();
    // Both arrive while it is held, so that it cannot have stopped in order before the second.
    for signal in ["-STOP", "-TERM", "-INT", "-CONT"] {
        server.signal(signal);
    }
    assert_eq!(server.end().code(), Some(130));
}

#[test]
fn it_can_be_ended_while_its_bootstrap_is_down() {
    let absent = format!("/ip4/127.0.0.1/tcp/9/p2p/{}", skep_id());
    for command in [&["dht"][..], &["serve", "--expert_uids", "alone.0"]] {
        let mut daemon = Daemon::start(&[command, &["--initial_peers", &absent]].concat());
        daemon.says("dialling failed");
        assert_eq!(daemon.ends().code(), Some(0));
        assert_eq!(daemon.stdout.try_iter().count(), 0, "it was never ready");
    }
}

#[test]
fn options_that_do_nothing_here_are_accepted_and_say_so() {
    let options = ["--num_handlers", "4", "--increase_file_limit", "--no_relay", "--use_auto_relay"];
    let server = Daemon::start(&[&["serve", "--expert_uids", "old.0"], FFN, &options].concat());
    for option in ["--num_handlers", "--increase_file_limit", "--no_relay", "--use_auto_relay"] {
        server.says(&format!("{option} has no effect here"));
    }
    server.address();
}
