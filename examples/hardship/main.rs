//! Calls with deadlines against healthy, slow and dying servers: how late does a call end, and does any hang?
//!
//! `cargo run --release --example hardship -- --calls 100000 --kills 100`
//!
//! Starts a bootstrap node and four servers (the real `skep` command): two healthy ones, one whose experts take long, and
//! one that is killed by SIGKILL and started again with the same identity, over and over. Clients in this process, tasks
//! and blocking threads, make calls with deadlines between 50 ms and 5 s, as many at once as it takes to keep the machine
//! busy. Timers beside them show how late the machine itself is. Prints JSON; fails if a call hung, if one ended later
//! than 50 ms after its deadline, or if the time limit (`--minutes`, 10) ended the run.
#![allow(clippy::disallowed_methods, reason = "it watches other processes, in real time")]

#[path = "../demo/hive.rs"]
mod hive;
mod load;
mod machine;
mod tally;

use std::{
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use hive::Process;
use load::Run;
use serde_json::json;
use skep::{Client, RemoteExpert, Runtime, wire::ExpertUid};
use tally::Tally;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Callers that are tasks, callers that are threads, and timers.
const TASKS: usize = 176;
const THREADS: usize = 16;
const TIMERS: usize = 8;
/// After the last call was begun: the longest deadline, and what a call that hangs is given.
const LAST_CALLS: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let (calls, kills) = (argument("--calls", 100_000)?, argument("--kills", 100)?);
    let limit = Instant::now() + Duration::from_secs(60 * argument("--minutes", 10)?);
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
    let run = Arc::new(Run::new(client.as_ref().clone(), experts, calls));
    let (ended, ends) = mpsc::sync_channel(TASKS + THREADS + TIMERS);
    for seed in 0..TASKS as u64 {
        runtime.spawn(load::tell(ended.clone(), load::call_by_call(run.clone(), seed)));
    }
    for seed in 0..TIMERS as u64 {
        runtime.spawn(load::tell(ended.clone(), load::timer(run.clone(), seed)));
    }
    for seed in 0..THREADS as u64 {
        let (run, ended) = (run.clone(), ended.clone());
        let work = move || ended.send(load::call_by_call_and_wait(&run, seed));
        std::thread::Builder::new().name(format!("caller-{seed}")).spawn(work)?;
    }
    let (busy, began) = (machine::busy_seconds(), Instant::now());

    let mut killed = 0;
    while killed < kills && Instant::now() < limit {
        victim.kill()?;
        killed += 1;
        victim = dying()?;
    }
    // Killing may outlast the calls that were asked for, or the other way round.
    while run.calls_left() > 0 && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(50));
    }
    let in_time = Instant::now() < limit;
    run.end();
    let threads = machine::threads();
    let (seconds, busy) = (began.elapsed().as_secs_f64(), machine::busy_seconds() - busy);
    let (tally, missing) = collect(&ends);
    let mut report = tally.report(missing);
    report["kills"] = killed.into();
    report["machine"] = json!({ "seconds": seconds, "busy_cores": busy / seconds, "threads_of_the_client": threads });
    println!("{report:#}");
    drop(client);
    for process in healthy.into_iter().chain([slow, victim, bootstrap]) {
        process.stop()?;
    }
    let hung = tally.hung + missing as u64;
    if hung > 0 {
        return Err(format!("{hung} calls hung").into());
    }
    if !in_time {
        return Err("the time limit ended the run".into());
    }
    if tally.late > 0 {
        return Err(format!("{} calls ended late", tally.late).into());
    }
    Ok(())
}

fn argument(name: &str, default: u64) -> Result<u64> {
    match std::env::args().skip_while(|arg| arg != name).nth(1) {
        Some(value) => Ok(value.parse()?),
        None => Ok(default),
    }
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

/// What the callers saw, and how many of them did not come back: their calls hang.
fn collect(ends: &mpsc::Receiver<Tally>) -> (Tally, usize) {
    let patience = Instant::now() + LAST_CALLS;
    let mut tally = Tally::default();
    let mut missing = TASKS + THREADS + TIMERS;
    while missing > 0 {
        match ends.recv_timeout(patience.saturating_duration_since(Instant::now())) {
            Ok(one) => tally.add(one),
            Err(_) => break,
        }
        missing -= 1;
    }
    (tally, missing)
}
