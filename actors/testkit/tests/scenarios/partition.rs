//! Half of a network is cut off for longer than records live, and finds the other half again.

use skep_dht::DhtConfig;
use skep_testkit::{Hive, Latency, Sim};
use skep_wire::ExpertUid;

use crate::common::*;

const SERVERS: usize = 200;

#[test]
fn half_the_network_partitioned_heals_within_two_update_periods() {
    let watch = Stopwatch::start("3, partition");
    let update_period = size(120.0, 30.0);
    let config = DhtConfig { update_period, ..DhtConfig::default() };
    for seed in 0..size(1, 4) {
        Sim::with_seed(seed).run(|sim| schedule(sim, config.clone()));
    }
    let seeds = size(1, 4);
    watch.report(format!("{SERVERS} servers, announced every {update_period} s, {seeds} seeds: healed in two periods"));
}

async fn schedule(sim: Sim, config: DhtConfig) {
    let update_period = config.update_period;
    sim.network().latency(Latency::uniform(millis(10)..millis(90)));
    let hive = sim.servers(SERVERS).experts("e.[0:20].[0:10]").dht(config).start().await;
    sim.network().loss(0.05);
    let uids: Vec<ExpertUid> = (0..SERVERS).map(|i| format!("e.{}.{}", i / 10, i % 10).parse().unwrap()).collect();
    // All started at once, and announced themselves before they knew each other.
    sim.advance(secs(update_period as u64)).await;
    assert_eq!(seen_from(&sim, &hive, 0, &uids).await, [SERVERS / 2; 2], "before");

    let nodes = hive.nodes().peers();
    let (left, mut right): (Vec<_>, Vec<_>) = nodes.iter().enumerate().partition(|(i, _)| i % 2 == 0);
    right.push((0, &hive.initial_peers()[0]));
    let [left, right] = [left, right].map(|half| half.iter().map(|(_, peer)| **peer).collect::<Vec<_>>());
    sim.network().partition(&left, &right);
    // Each half has to notice that the other is gone, a call at a time, before it is itself again.
    sim.advance(2 * hive.announce_expiration() + secs(5)).await;
    assert_eq!(seen_from(&sim, &hive, 0, &uids).await, [SERVERS / 2, 0], "left half, cut off");
    assert_eq!(seen_from(&sim, &hive, 1, &uids).await, [0, SERVERS / 2], "right half, cut off");

    sim.network().heal();
    sim.advance(secs(2 * update_period as u64)).await;
    for server in [0, 1] {
        let seen = seen_from(&sim, &hive, server, &uids).await;
        assert_eq!(seen, [SERVERS / 2; 2], "seed {}: healed, from server {server}", sim.seed());
    }
}

/// How many experts of the even and of the odd servers this server finds.
async fn seen_from(sim: &Sim, hive: &Hive, server: usize, uids: &[ExpertUid]) -> [usize; 2] {
    let found = find(sim, &hive.servers()[server].dht(), uids).await;
    let mut seen = [0; 2];
    for (number, found) in found.iter().enumerate() {
        let is_right = found.as_ref().is_some_and(|found| found.value == hive.servers()[number].peer());
        seen[number % 2] += usize::from(is_right);
    }
    seen
}
