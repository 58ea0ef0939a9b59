//! Everybody starts at the same moment, before anybody knows anybody.

use futures::future::join_all;
use libp2p_identity::PeerId;
use skep_dht::DhtConfig;
use skep_testkit::{Latency, Sim, SimServer};
use skep_wire::ExpertUid;

use crate::common::*;

const SERVERS: usize = 200;
/// From so many seconds after the start on every expert is found from everywhere, though the next regular announcement is far away.
const SETTLED: u64 = 30;

#[test]
fn when_all_start_at_once_every_expert_is_found_from_everywhere_from_half_a_minute_on() {
    let watch = Stopwatch::start("3, mass start");
    let (mut at_first, mut lookups) = (0, 0);
    for seed in 0..size(1, 10) {
        let (missing, made) = Sim::with_seed(seed).run(start_all);
        at_first += missing;
        lookups += made;
    }
    watch.report(format!(
        "{SERVERS} servers start at once: of {lookups} lookups {at_first} found nobody right after the start and none \
         {SETTLED} s later"
    ));
}

/// Lookups that found nobody right after the start, of how many.
async fn start_all(sim: Sim) -> (usize, usize) {
    let config = DhtConfig { update_period: 300.0, ..DhtConfig::default() };
    sim.network().latency(Latency::uniform(millis(10)..millis(90)));
    let hive = sim.servers(SERVERS).experts("e.[0:20].[0:10]").dht(config).start().await;
    let ready = sim.now();
    let uids: Vec<ExpertUid> = (0..SERVERS).map(|i| format!("e.{}.{}", i / 10, i % 10).parse().unwrap()).collect();
    let askers: Vec<_> = hive.servers().iter().step_by(SERVERS / size(10, 50)).collect();
    let missing = look_up(&sim, &askers[..askers.len() / 5], &uids).await;
    let missing = missing.iter().flatten().filter(|found| found.is_none()).count();
    sim.advance(secs(SETTLED).saturating_sub(sim.now() - ready)).await;
    let began = sim.now() - ready;
    assert!(began < secs(SETTLED + 1), "the first lookups took until {began:?}");
    for found in look_up(&sim, &askers, &uids).await {
        for (number, found) in found.into_iter().enumerate() {
            let host = hive.servers()[number].peer();
            assert_eq!(found, Some(host), "seed {}: {}", sim.seed(), uids[number]);
        }
    }
    (missing, SERVERS * askers.len() / 5)
}

/// What each of these servers finds, all at the same time.
async fn look_up(sim: &Sim, askers: &[&SimServer], uids: &[ExpertUid]) -> Vec<Vec<Option<PeerId>>> {
    let lookups = askers.iter().map(|server| async move {
        let found = find(sim, &server.dht(), uids).await;
        found.into_iter().map(|found| found.map(|found| found.value)).collect()
    });
    join_all(lookups).await
}
