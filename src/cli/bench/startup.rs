//! `skep bench startup`: how long a server needs to get ready, what it holds, what it does while nobody calls.

use std::{thread, time::Duration};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    limit::Alone,
    machine::{Machine, Usage, cores},
    progress::Progress,
    report::{Table, bytes, number, print, seconds},
    server::Server,
    worker::{Crew, Job, Start},
};
use crate::{cli::Failure, error::Error};

const EXAMPLES: &str = "\
Examples:
  skep bench startup
  skep bench startup --experts 256 --hidden 64 --idle 10 --json

The limit is the time that libtorch alone needs to make the same weights, in one process with a thread per core.";

/// Options of `skep bench startup`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Startup {
    /// Experts of class ffn
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    experts: u32,
    /// Their width
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    hidden: u32,
    /// Seconds to look on while nobody calls
    #[arg(long, default_value_t = 5.0)]
    idle: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Experts to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Making {
    experts: usize,
    hidden: usize,
    threads: usize,
}

/// How long that took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Made {
    seconds: f64,
}

/// Makes weights, some on each thread.
pub fn make(work: &Making, start: &Start) -> Result<(), Error> {
    start.rounds(|| make_once(work))
}

fn make_once(work: &Making) -> Result<Made, Error> {
    let begun = std::time::Instant::now();
    let lot = |thread: usize| -> Result<Vec<Alone>, Error> {
        (thread..work.experts).step_by(work.threads).map(|n| Alone::new("ffn", work.hidden, n as u64)).collect()
    };
    thread::scope(|scope| {
        let lot = &lot;
        let threads: Vec<_> = (0..work.threads).map(|thread| scope.spawn(move || lot(thread))).collect();
        let made: Result<Vec<_>, _> = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| Error::Invalid("libtorch alone panicked".to_owned()))?)
            .collect();
        let seconds = begun.elapsed().as_secs_f64();
        made.map(|_experts| Made { seconds })
    })
}

impl Startup {
    pub fn run(self) -> Result<(), Failure> {
        let idle = seconds("--idle", self.idle)?;
        let (experts, hidden) = (self.experts as usize, self.hidden as usize);
        let work = Making { experts, hidden, threads: cores() };
        let progress = Progress::of("making weights", Duration::from_secs(1));
        let made: Vec<(Made, Usage)> = Crew::prepare("libtorch alone", [Job::Make(work)])?.go(&progress)?;
        let alone = made.first().map_or(0.0, |(made, _)| made.seconds);
        let server = Server::start(&[
            "--expert_pattern",
            &format!("bench.[0:{experts}]"),
            "--hidden_dim",
            &self.hidden.to_string(),
        ])?;
        let ready = server.usage();
        progress.passed(Duration::ZERO);
        thread::sleep(idle);
        let quiet = server.usage().since(ready);
        drop(progress);
        let share = (quiet.user + quiet.system) / self.idle;
        let weights = (8 * hidden * hidden + 7 * hidden) as u64 * 4 * experts as u64;
        let report = json!({
            "benchmark": "startup",
            "version": env!("CARGO_PKG_VERSION"),
            "machine": Machine::here(),
            "parameters": { "experts": experts, "hidden": hidden, "idle": self.idle },
            "start_seconds": server.start_seconds,
            "limit": { "seconds": alone },
            "of_limit": alone / server.start_seconds,
            "weight_bytes": weights,
            "used": ready,
            "idle_cpu_share": share,
        });
        print(self.json, &report, || {
            let beside = ready.rss.saturating_sub(weights);
            Table::default()
                .row("experts", format!("{experts} × ffn of width {hidden}, {} of weights", bytes(weights)))
                .row("ready after", format!("{} s", number(server.start_seconds)))
                .row("limit", format!("{} s for the weights by libtorch alone", number(alone)))
                .row("memory", format!("{}, {} beside the weights", bytes(ready.rss), bytes(beside)))
                .row("threads", ready.threads.to_string())
                .row("idle", format!("{} % of a core", number(share * 100.0)))
                .text()
        });
        Ok(())
    }
}
