//! The status page: what it says while a node joins, serves and fails to start, and that clients cannot hurt it.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
};

use common::*;
use serde_json::Value;

/// A configuration file with a status page that goes with the test.
struct Config(PathBuf);

impl Config {
    fn new(name: &str, http: &str) -> Self {
        let path = temporary(&format!("{name}.toml"));
        fs::write(&path, format!("[http]\nenabled = true\n{http}\n")).expect("the temporary folder can be written");
        Self(path)
    }

    fn start(&self, args: &[&str]) -> Page {
        let path = self.0.to_str().expect("a UTF-8 path");
        let daemon = Daemon::start(&[args, &["--config", path]].concat());
        let line = daemon.says("status page at http://");
        let (_, address) = line.split_once("http://").expect("it names the address");
        Page { address: address.trim().parse().expect("an address"), daemon }
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // What remains in the temporary folder hurts nobody.
        let _remains = fs::remove_file(&self.0);
    }
}

struct Page {
    daemon: Daemon,
    address: SocketAddr,
}

impl Page {
    /// Sends bytes and reads until the server closes: status code and body.
    fn send(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).expect("the page listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers and closes");
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (code, answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_owned()))
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: skep\r\nConnection: close\r\n\r\n"))
    }

    fn status(&self) -> Value {
        let (code, body) = self.get("/status");
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }
}

const ANY_PORT: &str = "listen = \"127.0.0.1:0\"";

#[test]
fn a_serving_node_is_live_and_ready_and_tells_its_state() {
    let config = Config::new("serving", ANY_PORT);
    let mut page = config.start(&[&["serve", "--expert_uids", "http.0", "http.1"], FFN].concat());
    let address = page.daemon.address();
    assert_eq!(page.get("/live"), (200, "live\n".to_owned()));
    assert_eq!(page.get("/ready"), (200, "ready\n".to_owned()));
    let call = skep(&["call", "http.1", "--peer", &address, "--rows", "3"]);
    assert!(call.status.success(), "{call:?}");

    let status = page.status();
    assert_eq!((&status["ready"], &status["problem"]), (&Value::Bool(true), &Value::Null));
    assert!(address.ends_with(status["network"]["peer_id"].as_str().expect("a peer id")));
    assert_eq!(status["network"]["addresses"][0], *address);
    assert!(status["dht"]["records"].as_u64().expect("a number") >= 2, "{status:#}");
    let expert = &status["experts"][1];
    for (key, value) in [("uid", "http.1"), ("class", "ffn"), ("state", "serving")] {
        assert_eq!(expert[key], value, "{expert:#}");
    }
    assert_eq!((&expert["parameters"], &expert["rows"], &expert["steps"]), (&2160.into(), &3.into(), &0.into()));
    assert_eq!(expert["waiting_rows"], 0);
    assert!(expert["announced_until"].as_f64().expect("a time") > 1.7e9);

    let (code, metrics) = page.get("/metrics");
    assert_eq!(code, 200);
    for line in [
        "# TYPE skep_ready gauge",
        "skep_ready 1",
        "# TYPE skep_calls_in_total counter",
        "skep_expert_rows_total{uid=\"http.1\",class=\"ffn\"} 3",
        "skep_expert_serving{uid=\"http.0\",class=\"ffn\"} 1",
        "# TYPE skep_batch_rows histogram",
        "skep_batch_rows_bucket{le=\"2\"} 0",
        "skep_batch_rows_bucket{le=\"4\"} 1",
        "skep_batch_rows_bucket{le=\"+Inf\"} 1",
        "skep_batch_rows_sum 3",
        "skep_batch_rows_count 1",
        "# TYPE skep_queue_wait_seconds histogram",
        "skep_queue_wait_seconds_bucket{le=\"1073.741824\"} 1",
        "skep_queue_wait_seconds_count 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line:?} is missing in:\n{metrics}");
    }
    assert_eq!(page.daemon.ends().code(), Some(0));
}

#[test]
fn a_node_that_waits_for_its_bootstrap_is_live_and_says_why_it_is_not_ready() {
    let absent = format!("/ip4/127.0.0.1/tcp/9/p2p/{}", skep_id());
    let config = Config::new("waiting", ANY_PORT);
    for command in [&["dht"][..], &["serve", "--expert_uids", "http.0"]] {
        let page = config.start(&[command, &["--initial_peers", &absent]].concat());
        page.daemon.says("dialling failed");
        assert_eq!(page.get("/live").0, 200);
        let (code, why) = page.get("/ready");
        assert!(code == 503 && why.contains("not joined") && why.contains("dialling failed"), "{code} {why}");
        assert_eq!(page.status()["ready"], false);
    }
}

#[test]
fn a_port_that_is_taken_is_named_with_the_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let config = Config::new("taken", &format!("listen = \"{address}\""));
    let (message, code) = failure(&["dht", "--config", config.0.to_str().expect("a UTF-8 path")]);
    assert!(code == Some(1) && message.contains(&address) && message.contains("http.listen"), "{message}");
    assert!(message.contains("port 0"), "{message}");
}

#[test]
fn clients_that_are_slow_large_or_lost_do_not_hurt_it() {
    let config = Config::new("abuse", &format!("{ANY_PORT}\nmax_connections = 3\nrequest_timeout = 0.5"));
    let page = config.start(&["dht"]);
    assert_eq!(page.get("/elsewhere"), (404, "there are GET /live, /ready, /status and /metrics\n".to_owned()));
    let (code, help) =
        page.send("POST /status HTTP/1.1\r\nHost: skep\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert!(code == 404 && help.contains("GET"), "{code} {help}");

    // A head that never ends is refused, whatever the server does with the rest of it.
    let mut large = TcpStream::connect(page.address).expect("the page listens");
    let header = format!("X-Large: {}\r\n", "x".repeat(4000));
    let head = format!("GET /live HTTP/1.1\r\nHost: skep\r\n{}", header.repeat(80));
    let _cut_off = large.write_all(head.as_bytes());

    // As many as may connect, and they say nothing: they are let go, and the next one is answered.
    let silent: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(page.address).expect("it listens")).collect();
    assert_eq!(page.get("/live").0, 200);
    drop(silent);
}
