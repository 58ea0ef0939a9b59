//! A `skep serve` process and what it says of itself on its status page.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use multiaddr::Multiaddr;
use serde::Serialize;

use super::{machine::Usage, process::Process};
use crate::error::Error;

/// How long a server may take to get ready.
const READY: Duration = Duration::from_secs(300);
/// How long the status page may take.
const PAGE: Duration = Duration::from_secs(30);

/// A running server.
pub struct Server {
    process: Process,
    /// Where it listens.
    pub address: Multiaddr,
    /// Seconds from its start until its experts were announced.
    pub start_seconds: f64,
    page: Option<String>,
}

/// What the experts of a server did: sums over all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Served {
    /// Forward and backward tasks.
    pub tasks: u64,
    /// Batches.
    pub batches: u64,
    /// Rows of all batches.
    pub rows: u64,
    /// Batches by their rows: up to how many, how often.
    pub batch_rows: Vec<(u64, u64)>,
    /// Tasks by their wait in line, in microseconds: up to how many, how often.
    pub queue_wait_us: Vec<(u64, u64)>,
}

impl Server {
    /// Starts one with these options and waits until it is ready.
    pub fn start(options: &[&str]) -> Result<Self, Error> {
        let args = [&["serve", "--end_with_stdin"], options].concat();
        let page = [("SKEP_HTTP__ENABLED", "true"), ("SKEP_HTTP__LISTEN", "127.0.0.1:0")];
        let process = Process::start("the server", &args, &page)?;
        let line = process.line(READY)?;
        let start_seconds = process.started().elapsed().as_secs_f64();
        let address = line.parse().map_err(|error| Error::Invalid(format!("the server printed {line:?}: {error}")))?;
        let page = process.logged("status page at http://", PAGE);
        Ok(Self { process, address, start_seconds, page })
    }

    /// What the process has used.
    pub fn usage(&self) -> Usage {
        self.process.usage().unwrap_or_default()
    }

    /// What its experts have done.
    pub fn served(&self) -> Result<Served, Error> {
        let Some(page) = &self.page else { return Ok(Served::default()) };
        let page = page.trim();
        let failed = |source| Error::System { what: format!("cannot read http://{page}/status"), source };
        let status = get(page, "/status").map_err(failed)?;
        let status: serde_json::Value =
            serde_json::from_str(&status).map_err(|error| Error::Invalid(format!("/status: {error}")))?;
        let mut served = Served::default();
        let (mut sizes, mut waits) = (BTreeMap::new(), BTreeMap::new());
        for expert in status["experts"].as_array().into_iter().flatten() {
            let count = |key: &str| expert[key].as_u64().unwrap_or(0);
            served.tasks += count("forward_tasks") + count("backward_tasks");
            served.batches += count("batches");
            served.rows += count("rows");
            for (key, into) in [("batch_rows", &mut sizes), ("queue_wait_us", &mut waits)] {
                for pair in expert[key].as_array().into_iter().flatten() {
                    let number = |at: usize| pair[at].as_u64().unwrap_or(0);
                    *into.entry(number(0)).or_insert(0) += number(1);
                }
            }
        }
        served.batch_rows = sizes.into_iter().collect();
        served.queue_wait_us = waits.into_iter().collect();
        Ok(served)
    }
}

impl Served {
    /// What was done since `before`.
    pub fn since(&self, before: &Served) -> Served {
        let less = |now: &[(u64, u64)], then: &[(u64, u64)]| {
            let then: BTreeMap<u64, u64> = then.iter().copied().collect();
            let left = now.iter().map(|&(up_to, n)| (up_to, n - then.get(&up_to).copied().unwrap_or(0)));
            left.filter(|(_, n)| *n > 0).collect()
        };
        Served {
            tasks: self.tasks - before.tasks,
            batches: self.batches - before.batches,
            rows: self.rows - before.rows,
            batch_rows: less(&self.batch_rows, &before.batch_rows),
            queue_wait_us: less(&self.queue_wait_us, &before.queue_wait_us),
        }
    }
}

fn get(host: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(PAGE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    body.ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}
