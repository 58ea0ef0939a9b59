//! `skep bench network`: calls of all sizes to an expert that returns its input, and bare streams beside them.

use std::{
    io::{self, Read, Write},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;
use skep_net::probe;

use super::{
    caller::Calls,
    clients::{Clients, Security, Way, Wire},
    latency::{Latencies, Summary},
    machine::Machine,
    progress::Progress,
    report::{bytes, microseconds, number, print, seconds},
    server::Server,
};
use crate::{cli::Failure, error::Error};

/// Bytes of a row of the two experts: one for small calls, one for large ones.
const ROWS: [usize; 2] = [1 << 10, 32 << 10];
/// Rows that a call may have.
const MOST_ROWS: usize = 2048;
/// Calls and bare streams take turns so often, so that what disturbs the machine disturbs all of them.
const ROUNDS: u32 = 4;

const EXAMPLES: &str = "\
Examples:
  skep bench network
  skep bench network --sizes 1024 8388608 --security noise --json

A call sends so many bytes and gets as many back. The bare streams do the same between two threads: TCP, and TLS by the \
same library with the same ciphers. There is no transport without encryption, so what it costs is the difference \
between the two.";

/// Options of `skep bench network`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Network {
    /// Bytes of a call, rounded up to whole KiB; from 1 KiB to 64 MiB
    #[arg(long, num_args = 1.., value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..=64 << 20),
          default_values_t = [1 << 10, 16 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20])]
    sizes: Vec<u64>,
    /// Seconds for each size
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// What encrypts the calls
    #[arg(long, value_enum, default_value = "tls")]
    security: Security,
    /// Whose protocol calls use
    #[arg(long, value_enum, default_value = "native")]
    wire: Wire,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Measured {
    size: usize,
    call: Summary,
    tcp: Summary,
    tls: Summary,
}

impl Network {
    pub fn run(self) -> Result<(), Failure> {
        let lasting = seconds("--seconds", self.seconds)?;
        let servers = ROWS.map(|row| {
            let hidden = (row / 4).to_string();
            Server::start(&["--expert_uids", "bench.0", "--expert_cls", "nop", "--hidden_dim", &hidden])
        });
        let [small, large] = servers;
        let servers = [small?, large?];
        let mut measured = Vec::new();
        for &size in &self.sizes {
            let kind = usize::from(size as usize > MOST_ROWS * ROWS[0]);
            let rows = (size as usize).div_ceil(ROWS[kind]);
            let size = rows * ROWS[kind];
            let progress = Progress::of(bytes(size as u64), lasting);
            let calls = Calls {
                peer: servers[kind].address.clone(),
                way: Way { security: self.security, wire: self.wire },
                uids: vec!["bench.0".to_owned()],
                rows,
                backward: false,
                at_once: 1,
                seconds: self.seconds / f64::from(ROUNDS),
            };
            let mut clients = Clients::prepare(&calls, 1, 1)?;
            let (mut tcp, mut tls) = (Latencies::default(), Latencies::default());
            for _ in 0..ROUNDS {
                clients.round(&progress)?;
                let failed = |source| Error::System { what: "a stream over loopback".to_owned(), source };
                let (near, far) = probe::tcp_pair().map_err(failed)?;
                echo(near, far, size, lasting / ROUNDS, &mut tcp).map_err(failed)?;
                let (near, far) = probe::tls_pair().map_err(failed)?;
                echo(near, far, size, lasting / ROUNDS, &mut tls).map_err(failed)?;
            }
            let call = clients.measured()?.latency;
            measured.push(Measured { size, call, tcp: tcp.summary(), tls: tls.summary() });
        }
        print(self.json, &self.report(&measured), || table(&measured));
        Ok(())
    }

    fn report(&self, measured: &[Measured]) -> serde_json::Value {
        let each = measured.iter().map(|m| {
            json!({
                "bytes": m.size,
                "call_us": m.call,
                "tcp_us": m.tcp,
                "tls_us": m.tls,
                "bytes_per_second": rate(m.size, &m.call),
                "of_tcp": m.tcp.p50 / m.call.p50,
                "of_tls": m.tls.p50 / m.call.p50,
            })
        });
        json!({
            "benchmark": "network",
            "version": env!("CARGO_PKG_VERSION"),
            "machine": Machine::here(),
            "security": self.security,
            "wire": self.wire,
            "seconds": self.seconds,
            "sizes": each.collect::<Vec<_>>(),
        })
    }
}

/// Bytes per second in each direction.
fn rate(size: usize, times: &Summary) -> f64 {
    size as f64 / times.p50 * 1e6
}

fn table(measured: &[Measured]) -> String {
    let mut text = format!(
        "{:>10} {:>12} {:>12} {:>12} {:>12} {:>7} {:>7}",
        "size", "call p50", "p99", "TCP", "TLS", "of TCP", "of TLS"
    );
    for m in measured {
        let percent = |bare: &Summary| format!("{} %", number(bare.p50 / m.call.p50 * 100.0));
        text += &format!(
            "\n{:>10} {:>12} {:>12} {:>12} {:>12} {:>7} {:>7}",
            bytes(m.size as u64),
            microseconds(m.call.p50),
            microseconds(m.call.p99),
            microseconds(m.tcp.p50),
            microseconds(m.tls.p50),
            percent(&m.tcp),
            percent(&m.tls)
        );
    }
    text
}

/// Sends so many bytes and waits for as many back, over and over.
pub fn echo<N: Read + Write, F: Read + Write + Send + 'static>(
    mut near: N,
    mut far: F,
    size: usize,
    lasting: Duration,
    times: &mut Latencies,
) -> io::Result<()> {
    let other = thread::Builder::new().name("bench-echo".to_owned()).spawn(move || {
        let mut body = vec![0; size];
        // Ends with the stream.
        while far.read_exact(&mut body).and_then(|()| far.write_all(&body)).and_then(|()| far.flush()).is_ok() {}
    })?;
    let mut body = vec![1; size];
    let (begun, mut first) = (Instant::now(), true);
    let before = times.count();
    while times.count() == before || begun.elapsed() < lasting {
        let started = Instant::now();
        near.write_all(&body)?;
        near.flush()?;
        near.read_exact(&mut body)?;
        // The first one shakes hands.
        if !std::mem::take(&mut first) {
            times.record(started.elapsed());
        }
    }
    drop(near);
    other.join().map_err(|_| io::Error::other("the other end panicked"))
}
