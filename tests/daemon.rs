//! The daemon's manners: what it prints, how it refuses, joins, restarts and ends.
#![allow(clippy::disallowed_methods, reason = "it watches other processes, in real time; what they print waits here")]

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(60);
const FFN: &[&str] = &["--expert_cls", "ffn", "--hidden_dim", "16"];

fn skep(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_skep")).args(args).stdin(Stdio::null()).output().expect("skep starts")
}

/// What a command that must fail says, and its exit code.
fn failure(args: &[&str]) -> (String, Option<i32>) {
    let output = skep(args);
    assert!(output.stdout.is_empty(), "stdout carries only results");
    (String::from_utf8(output.stderr).expect("text"), output.status.code())
}

/// A `skep` process that goes with the test.
struct Daemon {
    child: Child,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
}

fn lines(source: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(source).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    receiver
}

impl Daemon {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skep"));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("skep starts");
        let stdout = lines(child.stdout.take().expect("stdout is piped"));
        let stderr = lines(child.stderr.take().expect("stderr is piped"));
        Self { child, stdout, stderr }
    }

    /// The first address, which comes once it is ready.
    fn address(&self) -> String {
        self.stdout.recv_timeout(PATIENCE).expect("it becomes ready")
    }

    /// Waits for a line of the log.
    fn says(&self, part: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = self.stderr.recv_timeout(until.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|_| panic!("it never says {part:?}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().expect("kill runs").success());
    }

    fn ends(&mut self) -> ExitStatus {
        self.signal("-TERM");
        self.child.wait().expect("it can be waited for")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn temporary(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("skep-daemon-{}-{name}", std::process::id()));
    // Only there when an earlier run was cut off.
    let _stale = fs::remove_file(&path);
    path
}

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
fn a_second_signal_ends_it_at_once() {
    let mut server =
        Daemon::start(&["serve", "--expert_cls", "nop_delay", "--hidden_dim", "4", "--expert_uids", "slow.0"]);
    let address = server.address();
    let calls: Vec<_> = (0..8)
        .map(|_| Daemon::start(&["call", "slow.0", "--peer", &address, "--rows", "64", "--timeout", "20"]))
        .collect();
    server.signal("-TERM");
    server.says("stopping");
    server.signal("-INT");
    // By the second signal, or in order when nothing was in flight yet.
    assert!(matches!(server.child.wait().expect("it ends").code(), Some(130 | 0)));
    drop(calls);
}

#[test]
fn mistakes_on_the_command_line_name_the_thing_and_the_remedy() {
    for (args, code, parts) in [
        (&["serve"][..], 2, &["nothing to host", "--expert_pattern"][..]),
        (&["serve", "--expert_pattern", "e.[0:"], 1, &["e.[0:", "ffn.[0:4].[0:16]"]),
        (&["serve", "--hidden_dims", "3"], 2, &["--hidden_dims", "--hidden_dim"]),
        (&["dht", "--host_maddrs", "127.0.0.1:80"], 2, &["host_maddrs", "127.0.0.1:80"]),
        (&["dht", "--initial_peers", "/ip4/127.0.0.1/tcp/1"], 2, &["/p2p/"]),
        (&["dht", "--host_maddrs", "/ip4/203.0.113.7/tcp/0"], 1, &["203.0.113.7", "no such address"]),
        (&["call", "expert", "--peer", "/ip4/127.0.0.1/tcp/1"], 2, &["expert uid", "expert.3"]),
        (&["call", "e.0", "--peer", "/ip4/127.0.0.1/tcp/1"], 2, &["/p2p/"]),
        (&["identity", "show", "/no/such.key"], 1, &["/no/such.key"]),
    ] {
        let (message, got) = failure(args);
        assert_eq!(got, Some(code), "{args:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is missing in:\n{message}");
        }
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let (message, code) = failure(&["dht", "--host_maddrs", &format!("/ip4/127.0.0.1/tcp/{port}")]);
    assert!(code == Some(1) && message.contains(&port) && message.contains("in use"), "{message}");
}

#[test]
fn a_peer_that_is_not_there_is_worth_another_try() {
    let id = skep_id();
    let (message, code) =
        failure(&["call", "e.0", "--timeout", "1", "--peer", &format!("/ip4/127.0.0.1/tcp/9/p2p/{id}")]);
    assert!(code == Some(75) && message.contains(&id), "{message}");
}

fn skep_id() -> String {
    let path = temporary("id.key");
    let id = skep(&["identity", "new", path.to_str().expect("a UTF-8 path")]);
    fs::remove_file(path).expect("it was made");
    String::from_utf8(id.stdout).expect("text").trim().to_owned()
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
fn every_command_shows_an_example_in_its_help() {
    for command in ["serve", "dht", "check", "experts", "call"] {
        let help = skep(&[command, "--help"]);
        assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("skep "), "{command}");
    }
}
