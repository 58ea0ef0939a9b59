//! `skep bench moe`: a mixture whose experts are in another process, and the same one without a network.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use clap::Args;
use multiaddr::Multiaddr;
use serde::{Deserialize, Serialize};
use serde_json::json;
use skep_torch::{
    MixtureOfExperts,
    process::{Tuning, tune},
    tch::{Device, Kind, nn::VarStore},
};

use super::{
    latency::{Latencies, Recorded, Summary},
    limit::input,
    machine::{Machine, Usage},
    progress::Progress,
    report::{Table, microseconds, number, print, seconds},
    server::{Served, Server},
    worker::{Crew, Job, Start},
};
use crate::{Runtime, cli::Failure, error::Error, moe::MoeConfig};

const EXAMPLES: &str = "\
Examples:
  skep bench moe
  skep bench moe --grid 4 4 --k_best 4 --hidden 512 --batch 32 --json
  skep bench moe --peer ADDR --uid_prefix ffn. --hidden 64

A step is forward and backward through a gate and the experts that it chooses; each expert makes a step of SGD. The limit \
is the same mixture by libtorch alone, in one process with a thread per core: it computes what the calls compute, \
forward and then again with gradients.";

/// Mixture and limit take turns so often, so that what disturbs the machine disturbs both.
const ROUNDS: u32 = 4;

/// Options of `skep bench moe`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Moe {
    /// Sizes of the grid's dimensions
    #[arg(long, num_args = 1.., value_name = "N", default_values_t = [4, 4], value_parser = clap::value_parser!(u32).range(1..=256))]
    grid: Vec<u32>,
    /// Experts that each row asks
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    k_best: u32,
    /// Rows of a batch
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=2048))]
    batch: u32,
    /// Width of the experts
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    hidden: u32,
    /// Seconds in which steps begin
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Measure this server instead of one of our own
    #[arg(long, value_name = "MULTIADDR")]
    peer: Option<Multiaddr>,
    /// What the experts are called
    #[arg(long, value_name = "PREFIX", default_value = "bench.")]
    uid_prefix: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Which mixture.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mix {
    /// Whom to ask; nobody where there is no network.
    pub peer: Option<Multiaddr>,
    /// What the experts are called.
    pub prefix: String,
    /// Sizes of the grid's dimensions.
    pub grid: Vec<usize>,
    /// Experts that each row asks.
    pub k_best: usize,
    /// Rows of a batch.
    pub rows: usize,
    /// Width.
    pub hidden: usize,
    /// Seconds in which steps begin.
    pub seconds: f64,
}

/// How it went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Mixed {
    /// Steps made.
    pub steps: u64,
    /// Seconds that they took.
    pub seconds: f64,
    /// Experts chosen, summed over the steps.
    pub chosen: u64,
    /// Calls that failed.
    pub failed: u64,
    /// How long steps took.
    pub latency: Recorded,
}

/// Makes the layer, tries a step, makes steps at each word.
pub fn run(mix: &Mix, start: &Start) -> Result<(), Error> {
    let invalid = |error: skep_torch::Error| Error::Invalid(error.to_string());
    tune(&Tuning::default()).map_err(invalid)?;
    let peer = mix.peer.clone().ok_or_else(|| Error::Invalid("no peer to ask".to_owned()))?;
    let runtime = Runtime::client([peer])?;
    let vs = VarStore::new(Device::Cpu);
    let config = MoeConfig::grid(&mix.prefix, mix.grid.clone()).k_best(mix.k_best);
    let layer = MixtureOfExperts::new(vs.root(), &runtime, mix.hidden as i64, config).map_err(invalid)?;
    let x = input(mix.rows, mix.hidden, 1)?;
    let step = || -> Result<u64, Error> {
        let x = x.detach().set_requires_grad(true);
        let answered = layer.forward_all(&[&x]).map_err(invalid)?;
        let loss = answered.outputs[0].square().sum(Kind::Float);
        loss.f_backward().map_err(|error| Error::Invalid(error.to_string()))?;
        let chosen: BTreeSet<_> = answered.chosen.iter().flatten().map(|chosen| &chosen.uid).collect();
        Ok(chosen.len() as u64)
    };
    step()?;
    start.rounds(|| {
        let failed_before = failed(&layer);
        let mut mixed = Mixed::of(mix.seconds, step)?;
        mixed.failed = failed(&layer) - failed_before;
        Ok(mixed)
    })
}

impl Mixed {
    /// Makes steps for so many seconds, one at least; a step tells how many experts were chosen.
    pub fn of(seconds: f64, mut step: impl FnMut() -> Result<u64, Error>) -> Result<Self, Error> {
        let (mut mixed, mut times, begun) = (Mixed::default(), Latencies::default(), Instant::now());
        while mixed.steps == 0 || begun.elapsed() < Duration::from_secs_f64(seconds) {
            let started = Instant::now();
            mixed.chosen += step()?;
            times.record(started.elapsed());
            mixed.steps += 1;
        }
        mixed.seconds = begun.elapsed().as_secs_f64();
        mixed.latency = times.recorded();
        Ok(mixed)
    }

    /// Steps per second.
    fn rate(&self) -> f64 {
        self.steps as f64 / self.seconds
    }

    /// Both rounds as one, but for their latencies.
    fn plus(self, other: &Mixed) -> Self {
        Self {
            steps: self.steps + other.steps,
            seconds: self.seconds + other.seconds,
            chosen: self.chosen + other.chosen,
            failed: self.failed + other.failed,
            latency: Recorded::default(),
        }
    }
}

fn failed(layer: &MixtureOfExperts) -> u64 {
    let calls = layer.calls();
    calls.failed_forward + calls.failed_backward
}

fn one_round(crew: &mut Crew, progress: &Progress) -> Result<(Mixed, Usage), Error> {
    let results: Vec<(Mixed, Usage)> = crew.go(progress)?;
    Ok(results.into_iter().next().expect("one job has one result"))
}

impl Moe {
    pub fn run(self) -> Result<(), Failure> {
        let lasting = seconds("--seconds", self.seconds)?;
        let mut mix = Mix {
            peer: None,
            prefix: self.uid_prefix.clone(),
            grid: self.grid.iter().map(|size| *size as usize).collect(),
            k_best: self.k_best as usize,
            rows: self.batch as usize,
            hidden: self.hidden as usize,
            seconds: self.seconds / f64::from(ROUNDS),
        };
        let mut alone = Crew::prepare("libtorch alone", [Job::MixAlone(mix.clone())])?;
        let server = match &self.peer {
            Some(_) => None,
            None => {
                let grid: Vec<String> = mix.grid.iter().map(|size| format!("[0:{size}]")).collect();
                let (pattern, hidden) = (format!("{}{}", mix.prefix, grid.join(".")), self.hidden.to_string());
                Some(Server::start(&["--expert_pattern", &pattern, "--hidden_dim", &hidden])?)
            }
        };
        mix.peer = self.peer.clone().or_else(|| server.as_ref().map(|server| server.address.clone()));
        let mut crew = Crew::prepare("the mixture", [Job::Mix(mix)])?;
        let served = || server.as_ref().map_or(Ok(Served::default()), Server::served);
        let progress = Progress::of("making steps", lasting / ROUNDS);
        let (before, mut times) = (served()?, Latencies::default());
        let (mut mixed, mut used, mut local) = (Mixed::default(), Usage::default(), Mixed::default());
        for _ in 0..ROUNDS {
            local = local.plus(&one_round(&mut alone, &progress)?.0);
            let (round, used_now) = one_round(&mut crew, &progress)?;
            times.add(&round.latency);
            mixed = mixed.plus(&round);
            used = used.and_then(used_now);
        }
        let tasks = served()?.tasks - before.tasks;
        drop(progress);
        let limit = local.rate();
        // One call forward and one backward, each.
        let per_chosen = server.as_ref().map(|_| tasks as f64 / (2 * mixed.chosen).max(1) as f64);
        let latency = times.summary();
        let report = json!({
            "benchmark": "moe",
            "version": env!("CARGO_PKG_VERSION"),
            "machine": Machine::here(),
            "parameters": {
                "grid": self.grid, "k_best": self.k_best, "batch": self.batch, "hidden": self.hidden, "seconds": self.seconds,
                "peer": self.peer.as_ref().map(ToString::to_string),
            },
            "steps": mixed.steps,
            "failed": mixed.failed,
            "steps_per_second": mixed.rate(),
            "latency_us": latency,
            "chosen_per_step": mixed.chosen as f64 / mixed.steps as f64,
            "calls_per_chosen": per_chosen,
            "limit": { "steps_per_second": limit },
            "of_limit": mixed.rate() / limit,
            "client": used,
            "server": server.as_ref().map(Server::usage),
        });
        print(self.json, &report, || self.table(&mixed, &latency, limit, per_chosen));
        Ok(())
    }

    fn table(&self, mixed: &Mixed, latency: &Summary, limit: f64, per_chosen: Option<f64>) -> String {
        let grid: Vec<String> = self.grid.iter().map(ToString::to_string).collect();
        let work = format!(
            "grid {}, {} experts a row, {} rows, width {}",
            grid.join(" × "),
            self.k_best,
            self.batch,
            self.hidden
        );
        let chosen = mixed.chosen as f64 / mixed.steps as f64;
        let calls =
            per_chosen.map(|calls| format!("{calls:.2} for each expert that a step chose, forward and backward each"));
        Table::default()
            .row("work", work)
            .row("rate", format!("{} steps/s forward and backward", number(mixed.rate())))
            .row("limit", format!("{} steps/s: {:.0} % of it reached", number(limit), mixed.rate() / limit * 100.0))
            .row("a step", format!("p50 {}, p99 {}", microseconds(latency.p50), microseconds(latency.p99)))
            .row("experts", format!("{} chosen by a step", number(chosen)))
            .row_if("calls", calls)
            .row("failed", mixed.failed.to_string())
            .text()
    }
}
