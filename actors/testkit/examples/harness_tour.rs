//! A tour of the test harness: a hive in virtual time goes through bad days, and the run is replayed by its seed.
//!
//! `cargo run -p skep-testkit --example harness_tour`, or with another seed: `SKEP_SEED=7 cargo run …`

use std::time::Duration;

use skep_kernel::Deadline;
use skep_testkit::{Hive, Latency, ScriptedBackend, Sim, SimMoe};

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn main() {
    let tour = || Sim::with_seed(0xBEE).run(tour);
    let (first, again) = (tour(), tour());
    assert_eq!(first, again);
    println!("the whole tour again: the same hash, {again:016x}");
}

async fn tour(sim: Sim) -> u64 {
    // A network as between cities; every knob turns while the test runs.
    sim.network().latency(Latency::weibull(millis(40), 1.5)).jitter(millis(5)).loss(0.01);

    // Real servers, DHT nodes and experts; only what an expert computes is scripted, and what that costs.
    let backend = ScriptedBackend::affine(2.0, 0.001).costing(millis(3)).costing_per_row(millis(1));
    let hive = sim.servers(8).experts("ffn.[0:4].[0:4]").backend(backend).with_checkpoints().start().await;
    let moe = sim.client(&hive).moe("ffn.", [4, 4]).k_best(4).k_min(1);
    let moe = moe.forward_timeout(Duration::from_secs(1)).backward_timeout(Duration::from_secs(1)).build().await;
    say(&sim, &format!("{} experts are visible", moe.visible_experts().await.len()));

    train(&sim, &hive, &moe, "all is well").await;
    hive.pick(2).slow(20.0);
    train(&sim, &hive, &moe, "two servers are 20 times slower").await;
    hive.pick(2).kill();
    train(&sim, &hive, &moe, "two machines are gone").await;
    let frozen = hive.pick(1);
    frozen.freeze();
    train(&sim, &hive, &moe, "one process stands still").await;
    frozen.thaw();

    // What a dead server announced is gone when it expires.
    sim.advance(hive.announce_expiration()).await;
    say(&sim, &format!("{} experts are visible", moe.visible_experts().await.len()));

    // Half of the servers cannot be reached; then the cut heals.
    let servers = hive.well().peers();
    sim.network().partition(&servers[..servers.len() / 2], &[moe.client().node().peer()]);
    train(&sim, &hive, &moe, "half of the servers are cut off").await;
    sim.network().heal();

    // A restart keeps identity and disk.
    hive.nodes().bounce();
    for server in hive.servers() {
        server.server().ready(Deadline::after(sim.now(), Duration::from_secs(60))).await.expect("it starts again");
    }
    train(&sim, &hive, &moe, "all servers were restarted").await;

    // Nothing is left: no actor, task, timer, call or row.
    sim.assert_quiet().await;
    say(&sim, &format!("{} events", sim.trace().events()));
    sim.trace().hash()
}

/// Four passes, and how they went.
async fn train(sim: &Sim, hive: &Hive, moe: &SimMoe, what: &str) {
    let (mut answers, mut steps) = (0, steps(hive));
    for _ in 0..4 {
        if let Ok(out) = moe.forward(sim.rows(4, 16)).await {
            answers += out.responders_per_row().sum::<usize>();
            if let Err(error) = moe.backward(&out, out.ones()).await {
                say(sim, &format!("backward: {error}"));
            }
        }
    }
    steps = self::steps(hive).saturating_sub(steps);
    say(sim, &format!("{what}: {answers} of 64 answers, {steps} optimizer steps"));
}

fn steps(hive: &Hive) -> u64 {
    hive.servers().iter().flat_map(|server| server.server().experts()).map(|expert| expert.status().steps).sum()
}

fn say(sim: &Sim, text: &str) {
    let seconds = sim.now().as_nanos() as f64 / 1e9;
    println!("{seconds:>9.3} s  {text}");
}
