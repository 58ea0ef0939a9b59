//! `skep bench throughput`: calls to experts of a server.

use std::time::Duration;

use clap::Args;
use multiaddr::Multiaddr;
use serde::Serialize;
use serde_json::json;
use skep_wire::ExpertPrefix;

use super::{
    caller::Calls,
    clients::{Clients, Measured, Security, Way, Wire},
    limit::{Computation, Computed},
    machine::{Machine, Usage, cores},
    presets::{Numbers, Preset},
    progress::Progress,
    report::{Table, bytes, microseconds, number, print, seconds},
    server::{Served, Server},
    worker::{Crew, Job},
};
use crate::{Runtime, cli::Failure, error::Error};

/// Client processes unless told otherwise: more callers than that share them.
const PROCESSES: usize = 8;

const EXAMPLES: &str = "\
Examples:
  skep bench throughput --preset ffn_small_batch
  skep bench throughput --expert_cls nop --hidden 64 --batch 1 --experts 1 --clients 1 --in_flight 64
  skep bench throughput --clients 4 --experts 4 --hidden 512 --batch 32 --backward --json
  skep bench throughput --peer ADDR --uid_prefix expert. --clients 4 --batch 32

Without --peer a server is started for the measurement. The limit is the same work by libtorch alone, in one process \
with a thread per core: forward, and for --backward another forward with gradients, backward and a step. The server may \
join the rows of several calls to one batch, which the limit does not. Calls and limit take turns, a round each, so that what disturbs the machine disturbs both.";

/// Options of `skep bench throughput`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Throughput {
    /// Numbers of hivemind's benchmark; the options below replace single ones
    #[arg(long, value_enum, default_value = "ffn_forward_backward")]
    preset: Preset,
    /// Class of the experts
    #[arg(long, value_name = "NAME")]
    expert_cls: Option<String>,
    /// Experts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    experts: Option<u32>,
    /// Width of the experts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    hidden: Option<u32>,
    /// Rows of a call
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..=2048))]
    batch: Option<u32>,
    /// Rows of a batch at the most
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    max_batch_size: Option<u32>,
    /// Callers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    clients: Option<u32>,
    /// Processes that the callers share
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    processes: Option<u32>,
    /// Calls that each caller has under way at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    in_flight: u32,
    /// Follow each forward call by a backward call, which trains the expert
    #[arg(long, overrides_with = "forward")]
    backward: bool,
    /// Forward calls only
    #[arg(long)]
    forward: bool,
    /// What trains the experts
    #[arg(long, value_name = "NAME", default_value = "sgd")]
    optimizer: String,
    /// Seconds in which calls begin, all rounds together; those under way at the end of a round are waited for
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Rounds of calls and of the limit that take turns
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// What encrypts the connections
    #[arg(long, value_enum, default_value = "tls")]
    security: Security,
    /// Whose protocol calls use
    #[arg(long, value_enum, default_value = "native")]
    wire: Wire,
    /// Measure this server instead of one of our own
    #[arg(long, value_name = "MULTIADDR")]
    peer: Option<Multiaddr>,
    /// With --peer: what its experts are called, up to their last number
    #[arg(long, value_name = "PREFIX", default_value = "expert.")]
    uid_prefix: ExpertPrefix,
    /// Leave out the limit
    #[arg(long)]
    no_limit: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Parameters {
    preset: Preset,
    #[serde(flatten)]
    numbers: Numbers,
    processes: usize,
    in_flight: usize,
    optimizer: String,
    seconds: f64,
    rounds: usize,
    #[serde(flatten)]
    way: Way,
    peer: Option<String>,
}

/// A server's part of the report.
struct Host {
    start_seconds: f64,
    used: Usage,
    served: Served,
}

/// Calls per second of one round, and of the limit's round beside it.
#[derive(Clone, Copy, Serialize)]
struct Round {
    calls_per_second: f64,
    limit_calls_per_second: Option<f64>,
}

/// Libtorch alone, a round at a time.
struct Limit(Crew);

impl Limit {
    fn round(&mut self, progress: &Progress) -> Result<Option<f64>, Error> {
        let results: Vec<(Computed, Usage)> = self.0.go(progress)?;
        Ok(results.first().map(|(computed, _)| computed.rate))
    }
}

impl Throughput {
    pub fn run(self) -> Result<(), Failure> {
        let given = self.parameters();
        let lasting = seconds("--seconds", self.seconds)?;
        let mut limit = self.limit(&given)?;
        let server = if self.peer.is_some() { None } else { Some(own_server(&given)?) };
        let (peer, uids) = match (&self.peer, &server) {
            (Some(peer), _) => (peer.clone(), self.uids_at(peer, &given)?),
            (None, server) => {
                let server = server.as_ref().expect("started where no peer is given");
                (server.address.clone(), (0..given.numbers.experts).map(|number| format!("bench.{number}")).collect())
            }
        };
        let mut clients = Clients::prepare(&calls(&given, peer, uids), given.numbers.clients, given.processes)?;
        let progress = Progress::of("calling", lasting.div_f64(given.rounds as f64));
        let used = || server.as_ref().map(Server::usage).unwrap_or_default();
        let served = || server.as_ref().map_or(Ok(Served::default()), Server::served);
        let (before, mut server_used, mut rounds) = (served()?, Usage::default(), Vec::new());
        for _ in 0..given.rounds {
            let limit_calls_per_second = match &mut limit {
                Some(limit) => limit.round(&progress)?,
                None => None,
            };
            let used_before = used();
            rounds.push(Round { calls_per_second: clients.round(&progress)?, limit_calls_per_second });
            server_used = server_used.and_then(used().since(used_before));
        }
        drop(progress);
        let served = served()?.since(&before);
        let measured = clients.measured()?;
        let host = server.map(|server| Host { start_seconds: server.start_seconds, used: server_used, served });
        let limit = mean(rounds.iter().map(|round| round.limit_calls_per_second));
        let report = report(&given, &measured, host.as_ref(), limit, &rounds);
        print(self.json, &report, || table(&given, &measured, host.as_ref(), limit));
        Ok(())
    }

    fn parameters(&self) -> Parameters {
        let mut numbers = self.preset.numbers();
        let set = |into: &mut usize, from: Option<u32>| *into = from.map_or(*into, |n| n as usize);
        set(&mut numbers.experts, self.experts);
        set(&mut numbers.hidden, self.hidden);
        set(&mut numbers.batch, self.batch);
        set(&mut numbers.clients, self.clients);
        set(&mut numbers.max_batch_size, self.max_batch_size);
        numbers.max_batch_size = numbers.max_batch_size.max(numbers.batch);
        numbers.backward = (numbers.backward || self.backward) && !self.forward;
        if let Some(class) = &self.expert_cls {
            numbers.expert_cls.clone_from(class);
        }
        Parameters {
            preset: self.preset,
            processes: self.processes.map_or(numbers.clients.min(PROCESSES), |n| n as usize),
            numbers,
            in_flight: self.in_flight as usize,
            optimizer: self.optimizer.clone(),
            seconds: self.seconds,
            rounds: self.rounds as usize,
            way: Way { security: self.security, wire: self.wire },
            peer: self.peer.as_ref().map(ToString::to_string),
        }
    }

    fn limit(&self, given: &Parameters) -> Result<Option<Limit>, Error> {
        let Numbers { expert_cls, experts, hidden, batch, backward, .. } = &given.numbers;
        // What computes nothing has no limit.
        if self.no_limit || self.peer.is_some() || expert_cls.starts_with("nop") {
            return Ok(None);
        }
        let work = Computation {
            class: expert_cls.clone(),
            hidden: *hidden,
            experts: *experts,
            rows: *batch,
            backward: *backward,
            threads: cores(),
            seconds: given.seconds_of_a_round(),
        };
        Ok(Some(Limit(Crew::prepare("libtorch alone", [Job::Compute(work)])?)))
    }

    fn uids_at(&self, peer: &Multiaddr, given: &Parameters) -> Result<Vec<String>, Error> {
        let runtime = Runtime::client([peer.clone()])?;
        let found = runtime.experts_under(&self.uid_prefix, Duration::from_secs(30))?;
        let uids: Vec<_> = found.into_iter().map(|listed| listed.uid.to_string()).take(given.numbers.experts).collect();
        if uids.is_empty() {
            return Err(Error::Invalid(format!("nothing is announced under {}; see --uid_prefix", self.uid_prefix)));
        }
        Ok(uids)
    }
}

impl Parameters {
    fn seconds_of_a_round(&self) -> f64 {
        self.seconds / self.rounds as f64
    }
}

fn own_server(given: &Parameters) -> Result<Server, Error> {
    let Numbers { expert_cls, experts, hidden, max_batch_size, .. } = &given.numbers;
    let (pattern, hidden, most) = (format!("bench.[0:{experts}]"), hidden.to_string(), max_batch_size.to_string());
    Server::start(&[
        "--expert_pattern",
        &pattern,
        "--expert_cls",
        expert_cls,
        "--hidden_dim",
        &hidden,
        "--max_batch_size",
        &most,
        "--optimizer",
        &given.optimizer,
    ])
}

/// The mean of numbers that all are there, or none.
fn mean(numbers: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let numbers: Vec<f64> = numbers.flatten().collect();
    (!numbers.is_empty()).then(|| numbers.iter().sum::<f64>() / numbers.len() as f64)
}

fn calls(given: &Parameters, peer: Multiaddr, uids: Vec<String>) -> Calls {
    Calls {
        peer,
        way: given.way,
        uids,
        rows: given.numbers.batch,
        backward: given.numbers.backward,
        at_once: given.in_flight,
        seconds: given.seconds_of_a_round(),
    }
}

fn report(
    given: &Parameters,
    measured: &Measured,
    host: Option<&Host>,
    limit: Option<f64>,
    rounds: &[Round],
) -> serde_json::Value {
    let Measured { called, latency, usage } = measured;
    let batch = given.numbers.batch as f64;
    json!({
        "benchmark": "throughput",
        "version": env!("CARGO_PKG_VERSION"),
        "machine": Machine::here(),
        "parameters": given,
        "calls": called.calls,
        "failed": called.failed,
        "failure": called.failure,
        "calls_per_second": called.rate,
        "samples_per_second": called.rate * batch,
        "latency_us": latency,
        "clients": usage,
        "server": host.map(|host| json!({
            "start_seconds": host.start_seconds,
            "used": host.used,
            "served": host.served,
        })),
        "limit": limit.map(|rate| json!({ "calls_per_second": rate, "samples_per_second": rate * batch })),
        "of_limit": limit.map(|rate| called.rate / rate),
        "rounds": rounds,
    })
}

fn table(given: &Parameters, measured: &Measured, host: Option<&Host>, limit: Option<f64>) -> String {
    let Measured { called, latency, usage } = measured;
    let Numbers { expert_cls, experts, clients, batch, hidden, backward, .. } = &given.numbers;
    let passes = if *backward { "forward and backward" } else { "forward" };
    let cpu = |used: &Usage| format!("{} s user, {} s system", number(used.user), number(used.system));
    let up_to = |pairs: &[(u64, u64)]| {
        let all: u64 = pairs.iter().map(|(_, n)| n).sum();
        let part = |(up_to, n): &(u64, u64)| format!("≤{up_to}: {:.0} %", *n as f64 / all.max(1) as f64 * 100.0);
        pairs.iter().map(part).collect::<Vec<_>>().join("  ")
    };
    let of_limit = |rate: f64| format!("{} calls/s: {:.0} % of it reached", number(rate), called.rate / rate * 100.0);
    let table = Table::default()
        .row("work", format!("{experts} × {expert_cls} of width {hidden}, {passes}, {batch} rows a call"))
        .row("clients", format!("{clients} in {} processes, {} calls at once each", given.processes, given.in_flight))
        .row("rate", format!("{} calls/s, {} samples/s", number(called.rate), number(called.rate * *batch as f64)))
        .row_if("limit", limit.map(of_limit))
        .row("latency", {
            let at = |name: &str, value: f64| format!("{name} {}", microseconds(value));
            [at("p50", latency.p50), at("p99", latency.p99), at("p99.9", latency.p99_9), at("max", latency.max)]
                .join(", ")
        })
        .row(
            "failed",
            match &called.failure {
                Some(first) => format!("{} of {}: {first}", called.failed, called.calls + called.failed),
                None => format!("0 of {}", called.calls),
            },
        )
        .row("clients' CPU", cpu(usage));
    let Some(Host { start_seconds, used, served }) = host else { return table.text() };
    let memory = format!("{}, at most {}, {} threads", bytes(used.rss), bytes(used.peak_rss), used.threads);
    table
        .row("server's CPU", cpu(used))
        .row("server's memory", memory)
        .row("server's start", format!("{} s", number(*start_seconds)))
        .row("rows of a batch", up_to(&served.batch_rows))
        .row("wait in line, µs", up_to(&served.queue_wait_us))
        .text()
}
