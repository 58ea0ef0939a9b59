//! A join ends by its deadline, whatever happens to servers and network meanwhile. The same on schedules without
//! servers: `skep-moe`, `join/schedules.rs`.

use rand::{Rng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use skep_moe::MoeError;
use skep_testkit::{Hive, Latency, ScriptedBackend, Sim, SimMoe};

use crate::common::*;

/// What came of the passes of all schedules.
#[derive(Default)]
struct Tally {
    passes: u64,
    complete: u64,
    short: u64,
    failed: u64,
    latest: i64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.passes += other.passes;
        self.complete += other.complete;
        self.short += other.short;
        self.failed += other.failed;
        self.latest = self.latest.max(other.latest);
    }
}

#[test]
fn a_join_ends_by_its_deadline_under_any_mix_of_kill_freeze_slow_and_loss() {
    let watch = Stopwatch::start("1, joins");
    let mut tally = Tally { latest: i64::MIN, ..Tally::default() };
    let schedules = size(200, 10_000);
    for seed in 0..schedules {
        tally.add(&Sim::with_seed(seed).run(schedule));
    }
    // Otherwise it would prove nothing.
    assert!(tally.complete * 10 > tally.passes && tally.short * 50 > tally.passes && tally.failed * 50 > tally.passes);
    let Tally { passes, complete, short, failed, latest } = tally;
    watch.report(format!(
        "{schedules} schedules, {passes} passes: {complete} with all answers, {short} with some, {failed} errors; \
         the latest ended {latest} µs after its deadline"
    ));
}

/// One forward and one backward pass, each with hardship at random times.
async fn schedule(sim: Sim) -> Tally {
    let mut tally = Tally { latest: i64::MIN, ..Tally::default() };
    let random = &mut random(sim.seed());
    sim.network().latency(Latency::exponential(millis(random.random_range(1..60))));
    let backend = ScriptedBackend::scale(2.0).costing(millis(random.random_range(1..50)));
    let hive = sim.servers(random.random_range(2..6)).experts("m.[0:8]").backend(backend).start().await;
    let timeout = millis(random.random_range(100..1500));
    let k_best = random.random_range(1..=4);
    let mut moe = sim.client(&hive).moe("m.", [8]).k_best(k_best).k_min(random.random_range(1..=k_best));
    moe = moe.backward_k_min(random.random_range(0..=k_best)).forward_timeout(timeout).backward_timeout(timeout);
    if random.random_bool(0.5) {
        moe = moe.timeout_after_k_min(millis(random.random_range(0..400)));
    }
    let moe = moe.allow_zero_outputs(random.random_bool(0.5)).build().await;

    let rows = random.random_range(1..6);
    let script = hardships(random, timeout.as_millis() as u64);
    let forward = timed(&sim, &mut tally, &moe, &hive, script, moe.forward(sim.rows(rows, 2))).await;
    // Backward needs experts that answered.
    hive.nodes().bounce().slow(1.0);
    sim.network().loss(0.0).heal();
    let mut output = forward;
    for _again in 0..20 {
        if output.is_err() {
            sim.advance(secs(30)).await;
            output = moe.forward(sim.rows(rows, 2)).await;
        }
    }
    // With a timeout below twice the latency there may be none for as long as one likes.
    let Ok(output) = output else { return tally };
    let script = hardships(random, timeout.as_millis() as u64);
    let backward = moe.backward(&output, output.ones());
    let _ended = timed(&sim, &mut tally, &moe, &hive, script, backward).await;
    tally
}

/// What is done, and so many milliseconds after the last.
type Script = Vec<(u64, Hardship)>;

#[derive(Clone, Copy, Debug)]
enum Hardship {
    Kill,
    Crash,
    Freeze,
    Thaw,
    Slow(f64),
    Bounce,
    Loss(f64),
    Partition,
    Heal,
}

fn hardships(random: &mut ChaCha8Rng, timeout: u64) -> Script {
    let kinds = [
        Hardship::Kill,
        Hardship::Crash,
        Hardship::Freeze,
        Hardship::Freeze,
        Hardship::Thaw,
        Hardship::Slow(20.0),
        Hardship::Slow(3.0),
        Hardship::Bounce,
        Hardship::Loss(0.3),
        Hardship::Loss(0.05),
        Hardship::Partition,
        Hardship::Heal,
    ];
    let count = random.random_range(0..8);
    let step = |random: &mut ChaCha8Rng| (random.random_range(0..=timeout / 4), *kinds.choose(random).unwrap());
    (0..count).map(|_| step(random)).collect()
}

/// Runs a pass and the hardship beside it; checks when the pass ends.
async fn timed<R>(
    sim: &Sim,
    tally: &mut Tally,
    moe: &SimMoe,
    hive: &Hive,
    script: Script,
    pass: impl Future<Output = Result<R, MoeError>>,
) -> Result<R, MoeError>
where
    R: Answers,
{
    let told = format!("seed {}: {script:?}", sim.seed());
    let hardship = async {
        for (after, kind) in script {
            sim.advance(millis(after)).await;
            afflict(sim, moe, hive, kind);
        }
        std::future::pending::<()>().await;
    };
    let (started, timeout) = (sim.now(), moe.mixture().config().forward_timeout);
    let outcome = tokio::select! {
        biased;
        outcome = pass => outcome,
        () = hardship => unreachable!("it stays for ever"),
    };
    let took = sim.now() - started;
    assert!(took <= timeout + millis(1), "{told}: it took {took:?} of {timeout:?}");
    tally.passes += 1;
    tally.latest = tally.latest.max(took.as_micros() as i64 - timeout.as_micros() as i64);
    match &outcome {
        Ok(joined) if joined.are_complete() => tally.complete += 1,
        Ok(_) => tally.short += 1,
        Err(_) => tally.failed += 1,
    }
    outcome
}

fn afflict(sim: &Sim, moe: &SimMoe, hive: &Hive, kind: Hardship) {
    let nodes = hive.pick(1);
    match kind {
        Hardship::Kill => _ = nodes.kill(),
        Hardship::Crash => _ = nodes.crash(),
        Hardship::Freeze => _ = nodes.freeze(),
        Hardship::Thaw => _ = hive.nodes().thaw(),
        Hardship::Slow(factor) => _ = nodes.slow(factor),
        Hardship::Bounce => _ = nodes.bounce(),
        Hardship::Loss(probability) => _ = sim.network().loss(probability),
        Hardship::Partition => _ = sim.network().partition(&nodes.peers(), &[moe.client().node().peer()]),
        Hardship::Heal => _ = sim.network().heal(),
    }
}

/// Whether every place that was asked for answered.
trait Answers {
    fn are_complete(&self) -> bool;
}

impl Answers for skep_testkit::MoeOutput {
    fn are_complete(&self) -> bool {
        self.mask.iter().all(|answered| *answered)
    }
}

impl Answers for skep_moe::BackwardGather {
    fn are_complete(&self) -> bool {
        self.mask.iter().all(|answered| *answered)
    }
}
