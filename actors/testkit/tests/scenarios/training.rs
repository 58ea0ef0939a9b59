//! Training while calls are slow, fail, arrive twice and out of order: every step is counted, none is made twice for one
//! request, none for a call that was refused.

use std::collections::BTreeMap;

use futures::future::join_all;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_dht::DhtConfig;
use skep_kernel::Deadline;
use skep_moe::Mixture;
use skep_rpc::{RpcError, Step};
use skep_testkit::{Hive, Latency, ScriptedBackend, Sim, SimMoe};
use skep_wire::{ExpertUid, HostTensor, Method};

use crate::common::*;

const SERVERS: usize = 20;
const EXPERTS: usize = 4 * SERVERS;
const CLIENTS: usize = 64;
const K: usize = 4;
const ROWS: usize = 2;

/// What a client knows of one row that it sent to one expert. Rows carry numbers that tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// An answer came: it was trained on.
    Trained,
    /// No answer came.
    Unknown,
    /// It was refused before it could run.
    Refused,
}

type Ledger = BTreeMap<(ExpertUid, u32), Known>;

#[test]
fn every_step_is_counted_once_under_slow_failing_doubled_and_reordered_calls() {
    let watch = Stopwatch::start("7, training");
    let seeds = size(1, 5);
    for seed in 0..seeds {
        let told = Sim::with_seed(seed).run(schedule);
        watch.report(format!("seed {seed}: {told}"));
    }
}

async fn schedule(sim: Sim) -> String {
    let dht = DhtConfig { update_period: 3600.0, ..DhtConfig::default() };
    let backend = ScriptedBackend::affine(0.0, 1.0).costing(millis(20));
    let hive = sim.servers(SERVERS).experts("m.[0:8].[0:10]").backend(backend).dht(dht).start().await;
    let mut mixtures = Vec::new();
    for _ in 0..CLIENTS {
        let moe = sim.client(&hive).moe("m.", [8, 10]).k_best(K);
        mixtures.push(moe.forward_timeout(secs(60)).backward_timeout(secs(60)).build().await);
    }
    let network = sim.network();
    network.latency(Latency::exponential(secs(1))).duplication(0.1).reordering(0.2, secs(3));
    // Ten calls in a hundred fail: refused, broken off, or never answered.
    network.refusal(0.04).reset(0.03).silence(0.03);

    let (halves, rounds) = (mixtures.split_at(CLIENTS / 2), size(3, 20));
    let by_mixture = halves.0.iter().enumerate().map(|(client, moe)| train_by_mixture(&sim, client, moe, rounds));
    let by_hand = halves.1.iter().enumerate().map(|(client, moe)| train_by_hand(&sim, &hive, client, moe, 8 * rounds));
    let (by_mixture, by_hand) = futures::join!(join_all(by_mixture), join_all(by_hand));
    // Calls whose caller has given up may still be on their way.
    network.refusal(0.0).reset(0.0).silence(0.0).duplication(0.0).reordering(0.0, secs(0));
    network.latency(Latency::constant(millis(1)));
    sim.advance(secs(600)).await;
    let ledger: Ledger = by_mixture.into_iter().chain(by_hand).flatten().collect();
    check(&sim, &hive, &ledger).await
}

/// Holds what clients know against what experts did.
async fn check(sim: &Sim, hive: &Hive, ledger: &Ledger) -> String {
    let (mut steps_made, mut rows_trained) = (0, 0);
    let mut trained: BTreeMap<(ExpertUid, u32), u32> = BTreeMap::new();
    for server in hive.servers() {
        for (uid, recording) in server.recordings() {
            let steps = steps(recording);
            assert_eq!(hive.steps(uid.as_str()), steps.len() as u64, "{uid}: every step is counted");
            let weight: f32 = steps.iter().flatten().sum();
            let handle = server.server().expert(uid).unwrap();
            let saved = handle.save(within(sim, secs(1))).await.unwrap();
            assert_eq!(saved.tensors[0].1.to_f32().unwrap(), [-weight], "{uid}: its weight is the sum of its steps");
            steps_made += steps.len();
            for row in steps.into_iter().flatten() {
                rows_trained += 1;
                *trained.entry((uid.clone(), row as u32)).or_default() += 1;
            }
        }
    }
    for (row, times) in &trained {
        assert_eq!(*times, 1, "{row:?} was trained on more than once");
        assert!(ledger.contains_key(row), "{row:?} was never sent");
    }
    let mut counts = [0; 3];
    for (row, known) in ledger {
        let times = trained.get(row).copied().unwrap_or(0);
        match known {
            Known::Trained => assert_eq!(times, 1, "{row:?} was answered"),
            Known::Refused => assert_eq!(times, 0, "{row:?} was refused"),
            Known::Unknown => {}
        }
        counts[*known as usize] += 1;
    }
    let [answered, unknown, refused] = counts;
    let arrived = sim.network().delivered(Method::Backward);
    // Otherwise it would prove nothing.
    assert!(answered > 500 && unknown > 0 && refused > 0, "{counts:?}");
    format!(
        "{steps_made} steps over {rows_trained} rows; {answered} rows answered, {unknown} without an answer, {refused} \
         refused; {arrived} backward calls arrived"
    )
}

/// Forward and backward passes of a mixture, which repeats nothing that may have run.
async fn train_by_mixture(sim: &Sim, client: usize, moe: &SimMoe, rounds: usize) -> Ledger {
    let mixture: &Mixture = moe.mixture();
    let mut ledger = Ledger::new();
    for round in 0..rounds {
        let first = 1 + (client * rounds + round) * ROWS;
        let numbers: Vec<u32> = (first..first + ROWS).map(|number| number as u32).collect();
        let rows = column(&numbers.iter().map(|number| *number as f32).collect::<Vec<f32>>());
        let Ok(gather) = mixture.forward(vec![rows.clone()], sim.scores(ROWS, &[8, 10])).await else { continue };
        let gradients = HostTensor::from_f32([ROWS, K, 1], &[1.0; ROWS * K]).unwrap();
        let backward = mixture.backward(&gather, vec![rows], vec![gradients]).await;
        for (row, chosen) in gather.chosen.iter().enumerate() {
            for (rank, chosen) in chosen.iter().enumerate().filter(|(rank, _)| gather.mask[row * K + rank]) {
                let known = match &backward {
                    Ok(backward) if backward.mask[row * K + rank] => Known::Trained,
                    Ok(backward) => of_failure(backward.failures.iter().find(|(uid, _)| *uid == chosen.uid)),
                    Err(_) => Known::Unknown,
                };
                ledger.insert((chosen.uid.clone(), numbers[row]), known);
            }
        }
    }
    ledger
}

fn of_failure(failure: Option<&(ExpertUid, RpcError)>) -> Known {
    match failure {
        Some((_, error)) if never_ran(error) => Known::Refused,
        _ => Known::Unknown,
    }
}

fn never_ran(error: &RpcError) -> bool {
    match error {
        RpcError::Unreachable { step, .. } => *step == Step::Dial,
        error => matches!(error, RpcError::Refused { .. } | RpcError::Overloaded { .. }),
    }
}

/// Steps on single experts, repeated under the same request id until an answer comes, some of them three times at once.
async fn train_by_hand(sim: &Sim, hive: &Hive, client: usize, moe: &SimMoe, rounds: usize) -> Ledger {
    let random = &mut ChaCha8Rng::seed_from_u64(sim.seed() << 8 | client as u64);
    let transport = moe.client().transport.clone();
    let mut ledger = Ledger::new();
    for round in 0..rounds {
        let number = (100_000 + client * rounds + round) as u32;
        let expert = random.random_range(0..EXPERTS);
        let uid: ExpertUid = format!("m.{}.{}", expert / 10, expert % 10).parse().unwrap();
        let call = ExpertCall::backward(hive.hosting(uid.as_str()).peer(), &uid, number as f32, number.into());
        let at_once = if random.random_bool(0.2) { 3 } else { 1 };
        let mut known = Known::Refused;
        for _attempt in 0..3 {
            let deadline: Deadline = within(sim, secs(10));
            let outcomes = join_all((0..at_once).map(|_| call.send(&transport, deadline))).await;
            if outcomes.iter().any(|outcome| matches!(outcome, Ok(_) | Err(RpcError::AlreadyApplied))) {
                known = Known::Trained;
                break;
            }
            // A doubled call may run although this one was refused.
            if !outcomes.iter().all(|outcome| outcome.as_ref().is_err_and(never_ran)) {
                known = Known::Unknown;
            }
        }
        ledger.insert((uid, number), known);
    }
    ledger
}
