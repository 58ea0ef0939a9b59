//! A server stops while calls are on their way: what it accepted is finished, and nobody finds its experts any more.

use futures::{StreamExt, stream::FuturesUnordered};
use rand::Rng;
use skep_expert::ServerConfig;
use skep_kernel::Moment;
use skep_rpc::{Answer, RpcError};
use skep_testkit::{Latency, ScriptedBackend, Sim, Wire};
use skep_wire::ExpertUid;

use crate::common::*;

const EXPERTS: usize = 4;

/// A call that has ended.
struct Ended {
    uid: ExpertUid,
    value: f32,
    sent: Moment,
    at: Moment,
    outcome: Result<Answer, RpcError>,
}

#[test]
fn a_server_that_stops_loses_no_accepted_call_and_vanishes_at_once() {
    let watch = Stopwatch::start("8, stopping");
    let (seeds, mut finished, mut turned_away) = (size(20, 1000), 0, 0);
    for seed in 0..seeds as u64 {
        let (these_finished, these_turned_away) = Sim::with_seed(seed).run(schedule);
        finished += these_finished;
        turned_away += these_turned_away;
    }
    assert!(finished > 20 * seeds && turned_away > 20 * seeds, "{finished} and {turned_away}");
    watch.report(format!("{seeds} seeds: {finished} accepted calls answered, {turned_away} turned away, none lost"));
}

async fn schedule(sim: Sim) -> (usize, usize) {
    let told = format!("seed {}", sim.seed());
    let random = &mut random(sim.seed());
    let way = millis(random.random_range(0..40));
    sim.network().latency(Latency::constant(way));
    let backend = ScriptedBackend::affine(0.0, 1.0).costing(millis(random.random_range(1..60)));
    // The line has room for every call that this test makes.
    let config = ServerConfig { max_batch_size: random.random_range(1..8), mailbox_rows: 200, ..Default::default() };
    let hive = sim.servers(3).experts("m.[0:12]").backend(backend).config(config).start().await;
    let client = sim.client(&hive).await;
    if random.random_bool(0.3) {
        sim.network().wire(Wire::Hivemind);
    }
    let (server, peer) = (hive.servers()[0].server(), hive.servers()[0].peer());
    let uids: Vec<ExpertUid> = hive.servers()[0].recordings().keys().cloned().collect();
    assert_eq!(uids.len(), EXPERTS);

    let mut calls = FuturesUnordered::new();
    let mut ended = Vec::new();
    let begin = sim.now() + millis(random.random_range(100..400));
    let mut stopping = std::pin::pin!(async {
        sim.clock().sleep_until(begin).await;
        let stopped = server.stop(within(&sim, secs(60))).await;
        (stopped, sim.now())
    });
    let mut stopped = None;
    let mut next = sim.now();
    let last = begin + millis(300);
    for number in 1.. {
        while next > sim.now() || next >= last {
            let (is_over, wake) = (next >= last, sim.clock().sleep_until(next));
            tokio::select! {
                biased;
                Some(call) = calls.next() => ended.push(call),
                outcome = &mut stopping, if stopped.is_none() => stopped = Some(outcome),
                () = wake, if !is_over => {}
                else => break,
            }
        }
        if next >= last {
            break;
        }
        let (uid, value) = (uids[random.random_range(0..EXPERTS)].clone(), number as f32);
        let call = match random.random_bool(0.5) {
            true => ExpertCall::backward(peer, &uid, value, number),
            false => ExpertCall::forward(peer, &uid, value, number),
        };
        let (sim, transport, sent) = (sim.clone(), client.transport.clone(), sim.now());
        calls.push(async move {
            let outcome = call.send(&transport, within(&sim, secs(60))).await;
            let value = if call.tensors.len() == 2 { value } else { 0.0 };
            Ended { uid, value, sent, at: sim.now(), outcome }
        });
        next = next + millis(random.random_range(1..6));
    }
    let (outcome, stopped_at) = stopped.expect("the loop ends when everything has ended");
    outcome.unwrap_or_else(|error| panic!("{told}: {error}"));

    let mut counts = (0, 0);
    let mut trained: Vec<(ExpertUid, f32)> = Vec::new();
    for Ended { uid, value, sent, at, outcome } in ended {
        let arrived = sent + way;
        match outcome {
            Ok(_) => {
                assert!(arrived <= begin + millis(1) && at <= stopped_at + way, "{told}: answered after the end");
                counts.0 += 1;
                trained.extend((value != 0.0).then_some((uid, value)));
            }
            Err(error) => {
                assert!(arrived >= begin, "{told}: a call that was accepted at {arrived:?} got {error}");
                assert!(error.to_string().contains("stopping") || error.to_string().contains("not served"), "{error}");
                assert!(at - sent <= 2 * way + millis(1), "{told}: whoever is turned away is told at once");
                counts.1 += 1;
            }
        }
    }
    let made =
        uids.iter().flat_map(|uid| steps(hive.recording(uid.as_str())).into_iter().flatten().map(|v| (uid.clone(), v)));
    let mut made: Vec<(ExpertUid, f32)> = made.collect();
    made.sort_by(|a, b| a.partial_cmp(b).unwrap());
    trained.sort_by(|a, b| a.partial_cmp(b).unwrap());
    assert_eq!(made, trained, "{told}: every step was answered, and every answer was a step");

    let all: Vec<ExpertUid> = (0..12).map(|expert| format!("m.{expert}").parse().unwrap()).collect();
    let fresh = sim.client(&hive).await;
    let found = find(&sim, &fresh.dht, &all).await;
    for (uid, found) in all.iter().zip(found) {
        assert_eq!(found.is_some(), !uids.contains(uid), "{told}: {uid}");
    }
    let mixture = sim.client(&hive).moe("m.", [12]).build().await;
    assert_eq!(mixture.visible_experts().await.len(), 8, "{told}");
    counts
}
