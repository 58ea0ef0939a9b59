//! Everybody starts at the same moment, before anybody knows anybody.

use skep_dht::DhtConfig;
use skep_testkit::{Latency, Sim};
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
    let mut missing = 0;
    for server in &askers[..askers.len() / 5] {
        missing += find(&sim, &server.dht(), &uids).await.iter().filter(|found| found.is_none()).count();
    }
    sim.advance(secs(SETTLED).saturating_sub(sim.now() - ready)).await;
    for server in &askers {
        let found = find(&sim, &server.dht(), &uids).await;
        for (number, found) in found.into_iter().enumerate() {
            let host = hive.servers()[number].peer();
            assert_eq!(found.map(|found| found.value), Some(host), "seed {}: {}", sim.seed(), uids[number]);
        }
    }
    assert!(sim.now() - ready < secs(240), "all this is before the next regular announcement");
    (missing, SERVERS * askers.len() / 5)
}
