//! Three times as many calls as a server can serve, whether it keeps up or not.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use rand::{Rng, distr::weighted::WeightedIndex, prelude::Distribution};
use skep_expert::ServerConfig;
use skep_rpc::{RpcError, SharedTransport};
use skep_testkit::{Hive, ScriptedBackend, Sim, Wire};
use skep_wire::ExpertUid;

use crate::common::*;

const BATCH: u32 = 16;
const LINE: u32 = 4 * BATCH;
/// How long a caller waits.
const PATIENCE: Duration = Duration::from_secs(2);
const EXPERTS: usize = 5;

/// One executor, five experts; a batch of 16 rows takes 49 ms.
async fn start(sim: &Sim) -> (Hive, SharedTransport) {
    let backend = ScriptedBackend::scale(2.0).costing(millis(1)).costing_per_row(millis(3));
    let config = ServerConfig { max_batch_size: BATCH, mailbox_rows: LINE, executors: 1, ..ServerConfig::default() };
    let hive = sim.servers(1).experts("m.[0:5]").backend(backend).config(config).start().await;
    let client = sim.client(&hive).await;
    (hive, client.transport)
}

/// What came of the calls to one expert.
#[derive(Clone, Copy, Debug, Default)]
struct Served {
    offered: u64,
    answered: u64,
    /// Of those answered, how many while calls were still offered.
    in_time: u64,
    refused: u64,
    late: u64,
    slowest: Duration,
}

/// Rows that the server answers in a second when callers wait for each other.
async fn peak(sim: &Sim, hive: &Hive, transport: &SharedTransport) -> f64 {
    let (peer, uid) = (hive.servers()[0].peer(), uid(0));
    let (started, seconds) = (sim.now(), size(5, 20));
    let mut calls = FuturesUnordered::new();
    let mut answered = 0;
    let make = || {
        let call = ExpertCall::forward(peer, &uid, 1.0, 1);
        async move { call.send(transport, within(sim, PATIENCE)).await }
    };
    (0..LINE).for_each(|_| calls.push(make()));
    while sim.now() - started < secs(seconds) {
        calls.next().await.expect("one is always under way").expect("there is room for all");
        answered += 1;
        calls.push(make());
    }
    f64::from(answered) / seconds as f64
}

/// Offers `rate` calls a second, spread over the experts by weight, for some seconds; callers do not wait for each other.
async fn offer(sim: &Sim, hive: &Hive, transport: &SharedTransport, rate: f64, weights: [f64; EXPERTS]) -> Vec<Served> {
    let random = &mut random(sim.seed());
    let peer = hive.servers()[0].peer();
    let choice = WeightedIndex::new(weights).unwrap();
    let mut served: BTreeMap<usize, Served> = (0..EXPERTS).map(|expert| (expert, Served::default())).collect();
    let mut calls = FuturesUnordered::new();
    let end = sim.now() + secs(size(6, 60));
    let mut next = sim.now();
    let mut number = 1000u128;
    loop {
        let arrival = sim.clock().sleep_until(next);
        let is_over = next >= end;
        tokio::select! {
            biased;
            Some((expert, took, outcome)) = calls.next() => {
                let served = served.get_mut(&expert).unwrap();
                assert!(took <= PATIENCE + millis(1), "an answer took {took:?}");
                match outcome {
                    Ok(_) => {
                        served.answered += 1;
                        served.in_time += u64::from(sim.now() <= end);
                    }
                    Err(RpcError::Overloaded { .. }) => served.refused += 1,
                    Err(RpcError::Deadline { .. }) => served.late += 1,
                    Err(other) => panic!("{other}"),
                }
                served.slowest = served.slowest.max(took);
            }
            () = arrival, if !is_over => {
                let (expert, started) = (choice.sample(random), sim.now());
                number += 1;
                let call = ExpertCall::forward(peer, &uid(expert), 1.0, number);
                served.get_mut(&expert).unwrap().offered += 1;
                calls.push(async move {
                    let outcome = call.send(transport, within(sim, PATIENCE)).await;
                    (expert, sim.now() - started, outcome)
                });
                if number.is_multiple_of(16) {
                    let waiting = hive.servers()[0].server().status().experts.into_iter().map(|e| e.waiting_rows);
                    assert!(waiting.max().unwrap() <= LINE, "no line is longer than it may be");
                }
                // Times between arrivals are exponential: they come in crowds.
                next = next + Duration::from_secs_f64(-(1.0 - random.random::<f64>()).ln() / rate);
            }
            else => break,
        }
    }
    served.into_values().collect()
}

fn uid(expert: usize) -> ExpertUid {
    format!("m.{expert}").parse().unwrap()
}

fn per_second(served: &[Served]) -> f64 {
    served.iter().map(|served| served.in_time as f64).sum::<f64>() / size(6.0, 60.0)
}

#[test]
fn at_three_times_capacity_everybody_gets_an_answer_and_goodput_stays() {
    let watch = Stopwatch::start("5, overload");
    let (peak, hot) = Sim::with_seed(5).run(|sim| async move {
        let (hive, transport) = start(&sim).await;
        let peak = peak(&sim, &hive, &transport).await;
        (peak, offer(&sim, &hive, &transport, 3.0 * peak, [1.0, 0.0, 0.0, 0.0, 0.0]).await)
    });
    let Served { offered, answered, refused, late, slowest, .. } = hot[0];
    assert_eq!((answered + refused, late), (offered, 0), "whoever is not answered is told so at once");
    let goodput = per_second(&hot) / peak;
    assert!(goodput >= 0.9, "{goodput} of the peak");
    assert!(slowest < millis(49 * (u64::from(LINE / BATCH) + 2)), "{slowest:?}: nobody waits behind more than a line");
    watch.report(format!(
        "peak {peak:.0} rows/s; of {offered} calls {answered} answered, {refused} refused; goodput {:.1} % of the peak, \
         slowest answer {slowest:?}",
        100.0 * goodput
    ));
}

#[test]
fn experts_that_are_equally_wanted_get_equal_shares() {
    let watch = Stopwatch::start("5, equal shares");
    let (peak, served) = Sim::with_seed(6).run(|sim| async move {
        let (hive, transport) = start(&sim).await;
        let peak = peak(&sim, &hive, &transport).await;
        (peak, offer(&sim, &hive, &transport, 3.0 * peak, [1.0; EXPERTS]).await)
    });
    let goodput = per_second(&served) / peak;
    assert!(goodput >= 0.9, "{goodput} of the peak");
    let mean = served.iter().map(|served| served.answered).sum::<u64>() as f64 / EXPERTS as f64;
    let shares: Vec<f64> = served.iter().map(|served| served.answered as f64 / mean).collect();
    assert!(shares.iter().all(|share| (0.9..1.1).contains(share)), "{shares:?}");
    assert!(served.iter().all(|served| served.late == 0 && served.answered + served.refused == served.offered));
    watch.report(format!("goodput {:.1} % of the peak, shares of the mean {shares:.2?}", 100.0 * goodput));
}

/// One expert is wanted 56 times as much as each other one; of the hot one and the cold ones, what came of their calls.
fn hot_and_cold(name: &'static str, seed: u64, wire: Wire) -> (Served, Vec<Served>) {
    let watch = Stopwatch::start(name);
    let (peak, served) = Sim::with_seed(seed).run(|sim| async move {
        let (hive, transport) = start(&sim).await;
        let peak = peak(&sim, &hive, &transport).await;
        sim.network().wire(wire);
        (peak, offer(&sim, &hive, &transport, 3.0 * peak, [2.8, 0.05, 0.05, 0.05, 0.05]).await)
    });
    let [hot, cold @ ..] = &served[..] else { unreachable!("five experts") };
    assert!(cold.iter().all(|cold| cold.answered == cold.offered), "{cold:?}");
    assert_eq!(hot.answered + hot.refused + hot.late, hot.offered);
    let goodput = per_second(&served) / peak;
    assert!(goodput >= 0.9, "{goodput} of the peak");
    watch.report(format!(
        "goodput {:.1} % of the peak; all {} calls to cold experts answered within {:?}, {} of {} to the hot one",
        100.0 * goodput,
        cold.iter().map(|cold| cold.offered).sum::<u64>(),
        slowest(cold),
        hot.answered,
        hot.offered
    ));
    (*hot, cold.to_vec())
}

fn slowest(served: &[Served]) -> Duration {
    served.iter().map(|served| served.slowest).max().unwrap()
}

#[test]
fn cold_experts_are_served_beside_a_hot_one() {
    let (hot, cold) = hot_and_cold("5, hot and cold", 7, Wire::Native);
    assert_eq!(hot.late, 0, "whoever is not answered is told so at once");
    // At worst its expert has just begun a batch, and then come one of the hot one and one of each cold one; of those a
    // batch is what arrived meanwhile, at 16 rows a second hardly more than five.
    let (hot_batch, cold_batch) = (millis(49), millis(1 + 5 * 3));
    assert!(slowest(&cold) < hot_batch + 5 * cold_batch, "{cold:?}");
}

#[test]
fn callers_that_know_no_overload_hear_by_their_deadline_and_goodput_stays() {
    let watch = Stopwatch::start("5, on hivemind's wire");
    let (peak, served) = Sim::with_seed(8).run(|sim| async move {
        let (hive, transport) = start(&sim).await;
        let peak = peak(&sim, &hive, &transport).await;
        sim.network().wire(Wire::Hivemind);
        let served = offer(&sim, &hive, &transport, 3.0 * peak, [1.0, 0.0, 0.0, 0.0, 0.0]).await;
        // Those who left are no burden: the line is served again at once.
        sim.advance(millis(100)).await;
        assert_eq!(hive.servers()[0].server().status().calls, 0);
        (peak, served)
    });
    let Served { offered, answered, refused, late, .. } = served[0];
    assert_eq!((answered + late, refused), (offered, 0));
    let goodput = per_second(&served) / peak;
    assert!(goodput >= 0.9, "{goodput} of the peak");
    watch.report(format!(
        "of {offered} calls {answered} answered, {late} late: goodput {:.1} % of the peak",
        100.0 * goodput
    ));
}

#[test]
fn cold_experts_are_served_beside_a_hot_one_whose_callers_know_no_overload() {
    let (hot, _cold) = hot_and_cold("5, hot and cold on hivemind's wire", 9, Wire::Hivemind);
    assert_eq!(hot.refused, 0, "nobody can be told");
}

/// Callers that are patient lose nothing to those that came later: each asks again once it is answered, three times as
/// many as a line holds.
#[test]
fn callers_that_wait_for_each_other_are_all_served_in_turn() {
    let watch = Stopwatch::start("5, in turn on hivemind's wire");
    let (callers, served) = Sim::with_seed(10).run(|sim| async move {
        let (hive, transport) = start(&sim).await;
        sim.network().wire(Wire::Hivemind);
        let (peer, uid, callers) = (hive.servers()[0].peer(), uid(0), 3 * LINE as usize);
        let end = sim.now() + secs(size(10, 60));
        let mut calls = FuturesUnordered::new();
        let make = |caller: usize| {
            let call = ExpertCall::forward(peer, &uid, 1.0, 1);
            let (transport, sim) = (&transport, &sim);
            async move { (caller, call.send(transport, within(sim, PATIENCE)).await) }
        };
        (0..callers).for_each(|caller| calls.push(make(caller)));
        let mut served = vec![0u32; callers];
        while let Some((caller, outcome)) = calls.next().await {
            outcome.expect("everybody has a turn");
            served[caller] += 1;
            if sim.now() < end {
                calls.push(make(caller));
            }
        }
        (callers, served)
    });
    let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
    assert!(most - least <= most / 4 + 1, "between {least} and {most} answers");
    watch.report(format!("{callers} callers got between {least} and {most} answers each"));
}
