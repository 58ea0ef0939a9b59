//! Calls with deadlines against healthy, slow and dying servers: how late does a call end, and does any hang?
//!
//! `cargo run --release --example hardship -- --calls 100000 --kills 100`
//!
//! Starts a bootstrap node and four servers (the real `skep` command): two healthy ones, one whose experts take long, and
//! one that is killed by SIGKILL and started again with the same identity, over and over. Clients in this process make
//! calls with deadlines between 50 ms and 5 s, as many at once as it takes to keep the machine busy. Prints JSON.
#![allow(clippy::disallowed_methods, reason = "it watches other processes, in real time")]

#[path = "../demo/hive.rs"]
mod hive;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use hive::Process;
use rand::{Rng, SeedableRng};
use serde_json::json;
use skep::{
    Client, RemoteExpert, Runtime,
    kernel::{Clock, Deadline},
    rpc::RpcError,
    wire::{ExpertUid, HostTensor},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const CALLS_AT_ONCE: u64 = 192;
const DEADLINES_MS: std::ops::Range<u64> = 50..5000;
/// A call that ends later than this after its deadline counts as late.
const LATE: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    let (calls, kills) = (argument("--calls", 100_000)?, argument("--kills", 100)?);
    let out = Path::new("demo-out/hardship");
    std::fs::create_dir_all(out)?;
    let skep = hive::skep_binary()?;
    let bootstrap = Process::start("bootstrap", &skep, out, &["dht"])?;
    let join = bootstrap.address.to_string();
    let serve = |name, class: &str, width: &str, pattern: &str, rest: &[&str]| {
        let pattern = format!("{pattern}.[0:4]");
        let mut args = vec!["serve", "--expert_cls", class, "--hidden_dim", width, "--expert_pattern", &pattern];
        args.extend(["--initial_peers", &join]);
        args.extend(rest);
        Process::start(name, &skep, out, &args)
    };
    let healthy = [serve("healthy-a", "ffn", "64", "quick", &[])?, serve("healthy-b", "nop", "256", "nop", &[])?];
    let slow = serve("slow", "ffn", "2048", "slow", &[])?;
    let key = out.join("dying.key");
    let dying = || {
        let key = key.to_str().ok_or("the path is UTF-8")?;
        serve("dying", "ffn", "64", "dying", &["--identity_path", key, "--host_maddrs", "/ip4/127.0.0.1/tcp/41977"])
    };
    let mut victim = dying()?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let client = Runtime::client([bootstrap.address.clone()])?;
    let experts = runtime.block_on(find_all(client.as_ref()))?;
    let run = Arc::new(Run {
        client: client.as_ref().clone(),
        experts,
        left: AtomicU64::new(calls),
        over: AtomicBool::new(false),
    });
    let workers: Vec<_> = (0..CALLS_AT_ONCE).map(|seed| runtime.spawn(work(run.clone(), seed))).collect();
    let mut killed = 0;
    while killed < kills && run.left.load(Ordering::Relaxed) > 0 {
        victim.kill()?;
        killed += 1;
        victim = dying()?;
    }
    // Killing may outlast the calls that were asked for: then the workers go on until the last kill.
    run.over.store(true, Ordering::Relaxed);
    let mut tally = Tally::default();
    for worker in workers {
        tally.add(runtime.block_on(worker)?);
    }
    println!("{:#}", tally.report(killed));
    drop(client);
    for process in healthy.into_iter().chain([slow, victim, bootstrap]) {
        process.stop()?;
    }
    if tally.late > 0 { Err(format!("{} calls ended late", tally.late).into()) } else { Ok(()) }
}

fn argument(name: &str, default: u64) -> Result<u64> {
    match std::env::args().skip_while(|arg| arg != name).nth(1) {
        Some(value) => Ok(value.parse()?),
        None => Ok(default),
    }
}

struct Run {
    client: Client,
    experts: Vec<RemoteExpert>,
    /// Calls that are still to be made.
    left: AtomicU64,
    /// Whether workers may end once no call is left.
    over: AtomicBool,
}

async fn find_all(client: &Client) -> Result<Vec<RemoteExpert>> {
    let mut experts = Vec::new();
    for prefix in ["quick", "nop", "slow", "dying"] {
        for i in 0..4 {
            let uid: ExpertUid = format!("{prefix}.{i}").parse()?;
            let found = RemoteExpert::find(client, &uid, client.deadline(Duration::from_secs(20))).await?;
            experts.push(found.ok_or(format!("{uid} is not announced"))?);
        }
    }
    Ok(experts)
}

/// Makes one call after the other.
async fn work(run: Arc<Run>, seed: u64) -> Tally {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut tally = Tally::default();
    loop {
        let counted = run.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if counted.is_err() && run.over.load(Ordering::Relaxed) {
            return tally;
        }
        let expert = &run.experts[random.random_range(0..run.experts.len())];
        let width = expert.info().flat_inputs()[0].size[1].unwrap_or(1);
        let rows = random.random_range(1..16);
        let input = HostTensor::from_f32([rows, width], &vec![0.5; rows * width]).expect("rows × width values");
        let wait = Duration::from_millis(random.random_range(DEADLINES_MS));
        let clock: &dyn Clock = &*run.client.clock;
        let deadline = Deadline::after(clock.now(), wait);
        let outcome = if random.random_bool(0.5) {
            expert.forward(vec![input], deadline).await
        } else {
            expert.backward(vec![input.clone()], vec![input], deadline).await
        };
        tally.count(clock.now().since(deadline.moment()), outcome);
    }
}

/// How calls ended.
#[derive(Default)]
struct Tally {
    /// Time from the deadline to the end, zero for calls that ended before it; in microseconds.
    lateness: Vec<u64>,
    outcomes: BTreeMap<&'static str, u64>,
    late: u64,
    late_by_outcome: BTreeMap<&'static str, u64>,
}

impl Tally {
    fn count(&mut self, lateness: Duration, outcome: std::result::Result<Vec<HostTensor>, RpcError>) {
        let name = match outcome {
            Ok(_) => "answered",
            Err(RpcError::Deadline { .. }) => "deadline",
            Err(RpcError::Unreachable { .. }) => "unreachable",
            Err(RpcError::Remote { .. }) => "remote error",
            Err(RpcError::Refused { .. }) => "refused",
            Err(RpcError::Malformed { .. }) => "malformed",
            Err(RpcError::Cancelled) => "cancelled",
            Err(_) => "other error",
        };
        *self.outcomes.entry(name).or_default() += 1;
        if lateness > LATE {
            self.late += 1;
            *self.late_by_outcome.entry(name).or_default() += 1;
        }
        self.lateness.push(u64::try_from(lateness.as_micros()).unwrap_or(u64::MAX));
    }

    fn add(&mut self, other: Tally) {
        self.lateness.extend(other.lateness);
        for (name, count) in other.outcomes {
            *self.outcomes.entry(name).or_default() += count;
        }
        self.late += other.late;
        for (name, count) in other.late_by_outcome {
            *self.late_by_outcome.entry(name).or_default() += count;
        }
    }

    fn report(&mut self, killed: u64) -> serde_json::Value {
        self.lateness.sort_unstable();
        let at = |share: f64| {
            let last = self.lateness.len().saturating_sub(1);
            self.lateness.get((share * last as f64) as usize).map_or(0.0, |&us| us as f64 / 1000.0)
        };
        json!({
            "calls": self.lateness.len(),
            "outcomes": self.outcomes,
            "kills": killed,
            "after_deadline_ms": { "p50": at(0.5), "p99.9": at(0.999), "max": at(1.0) },
            "later_than_50_ms": self.late,
            "late_by_outcome": self.late_by_outcome,
        })
    }
}
