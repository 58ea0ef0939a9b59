//! `skep bench dht`: real nodes over loopback, as hivemind's `benchmark_dht.py` has them.

use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use skep_dht::Freshness;
use skep_kernel::{Seed, WallTime};
use skep_wire::ExpertUid;

use super::{
    machine::{Machine, Usage},
    progress::Progress,
    report::{Table, bytes, number, print},
    worker::{Crew, Job},
};
use crate::{Runtime, cli::Failure, error::Error};

/// Longest wait for a step.
const WAIT: Duration = Duration::from_secs(60);

const EXAMPLES: &str = "\
Examples:
  skep bench dht
  skep bench dht --num_peers 64 --num_experts 1024 --json

All nodes are in one process, each with its own threads, sockets and connections. One stores experts under random names \
in batches, another one looks them up.";

/// Options of `skep bench dht`; names and defaults are hivemind's.
#[derive(Clone, Debug, Args, Serialize, Deserialize)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Dht {
    /// Nodes
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=1024))]
    num_peers: u32,
    /// Earlier nodes that each one is told of
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    initial_peers: u32,
    /// Experts to store
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    num_experts: u32,
    /// Experts of one store and of one lookup
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    expert_batch_size: u32,
    /// Chooses names and neighbours
    #[arg(long, default_value_t = 1)]
    random_seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    join_seconds: f64,
    store_seconds: f64,
    stored: usize,
    get_seconds: f64,
    found: usize,
    experts: usize,
}

/// Draws numbers below a bound.
struct Draw(Seed, u64);

impl Draw {
    fn below(&mut self, bound: usize) -> usize {
        self.1 += 1;
        (self.0.derive_nth(self.1).number() % bound.max(1) as u64) as usize
    }
}

/// Starts the nodes, stores, looks up.
pub fn run(options: &Dht) -> Result<Measured, Error> {
    let mut draw = Draw(Seed::new(options.random_seed), 0);
    let begun = Instant::now();
    let mut nodes: Vec<Runtime> = Vec::new();
    for _ in 0..options.num_peers {
        let mut neighbours = Vec::new();
        for _ in 0..(options.initial_peers as usize).min(nodes.len()) {
            neighbours.extend(nodes[draw.below(nodes.len())].addresses());
        }
        nodes.push(Runtime::builder().initial_peers(neighbours).launch()?);
    }
    for node in &nodes {
        node.ready(WAIT)?;
    }
    let join_seconds = begun.elapsed().as_secs_f64();
    let [.., storing, getting] = &nodes[..] else { return Err(Error::Invalid("two nodes are needed".to_owned())) };
    let mut uids = std::collections::BTreeSet::new();
    while uids.len() < options.num_experts as usize {
        let name = format!("expert.{}.{}.{}", draw.below(1000), draw.below(1000), draw.below(1000));
        uids.insert(name.parse::<ExpertUid>().map_err(|error| Error::Invalid(error.to_string()))?);
    }
    let mut order: Vec<(usize, ExpertUid)> = uids.into_iter().map(|uid| (draw.below(usize::MAX), uid)).collect();
    order.sort();
    let uids: Vec<ExpertUid> = order.into_iter().map(|(_, uid)| uid).collect();
    let batches = || uids.chunks(options.expert_batch_size as usize).map(<[ExpertUid]>::to_vec);
    let (mut stored, begun) = (0, Instant::now());
    for batch in batches() {
        let (client, expiration) = (storing.as_ref(), WallTime(storing.wall().0 + 300.0));
        let (dht, deadline) = (client.dht.clone(), client.deadline(WAIT));
        let outcome =
            storing.block(deadline, async move { Ok(dht.declare_experts(batch, expiration, deadline).await?) });
        stored += outcome?.values().filter(|taken| **taken).count();
    }
    let store_seconds = begun.elapsed().as_secs_f64();
    let (mut found, begun) = (0, Instant::now());
    for batch in batches() {
        let client = getting.as_ref();
        let (dht, deadline) = (client.dht.clone(), client.deadline(WAIT));
        let hosts =
            getting.block(deadline, async move { Ok(dht.find_experts(batch, Freshness::Valid, deadline).await?) });
        let host = storing.local_peer();
        found += hosts?.iter().flatten().filter(|hosted| hosted.value == host).count();
    }
    let get_seconds = begun.elapsed().as_secs_f64();
    Ok(Measured { join_seconds, store_seconds, stored, get_seconds, found, experts: uids.len() })
}

impl Dht {
    pub fn run(self) -> Result<(), Failure> {
        let progress = Progress::of("storing and looking up", Duration::from_secs(5));
        let results: Vec<(Measured, Usage)> = Crew::prepare("the nodes", [Job::Dht(self.clone())])?.go(&progress)?;
        drop(progress);
        let (m, used) = results.into_iter().next().expect("one job has one result");
        let per_second = |seconds: f64| m.experts as f64 / seconds;
        let report = json!({
            "benchmark": "dht",
            "version": env!("CARGO_PKG_VERSION"),
            "machine": Machine::here(),
            "parameters": self,
            "join_seconds": m.join_seconds,
            "stores_per_second": per_second(m.store_seconds),
            "stored": m.stored,
            "gets_per_second": per_second(m.get_seconds),
            "found": m.found,
            "experts": m.experts,
            "used": used,
        });
        print(self.json, &report, || {
            Table::default()
                .row("nodes", format!("{}, all joined after {} s", self.num_peers, number(m.join_seconds)))
                .row(
                    "stores",
                    format!("{}/s, {} of {} taken", number(per_second(m.store_seconds)), m.stored, m.experts),
                )
                .row("lookups", format!("{}/s, {} of {} found", number(per_second(m.get_seconds)), m.found, m.experts))
                .row("memory", format!("{}, {} threads", bytes(used.rss), used.threads))
                .text()
        });
        Ok(())
    }
}
