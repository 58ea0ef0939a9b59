//! Everybody starts at the same moment, before anybody knows anybody.

use std::time::Duration;

use futures::future::join_all;
use skep_dht::DhtConfig;
use skep_testkit::{Latency, Sim};
use skep_wire::ExpertUid;

use crate::common::*;

const SERVERS: usize = 200;
/// From so many seconds after the start on every expert is found from everywhere, though the next regular announcement is
/// far away.
const SETTLED: u64 = 30;

#[test]
fn when_all_start_at_once_every_expert_is_found_from_everywhere_from_half_a_minute_on() {
    let watch = Stopwatch::start("3, mass start");
    let (mut at_first, mut first_lookups, mut lookups) = (0, 0, 0);
    for seed in 0..size(1, 10) {
        // Apart from each other: whoever looks up mends on the way what is missing.
        let (missing, made) = Sim::with_seed(seed).run(|sim| start_all(sim, Duration::ZERO, size(2, 10)));
        (at_first, first_lookups) = (at_first + missing.len(), first_lookups + made);
        let (missing, made) = Sim::with_seed(seed).run(|sim| start_all(sim, secs(SETTLED), size(10, 50)));
        assert_eq!(missing, [], "seed {seed}");
        lookups += made;
    }
    watch.report(format!(
        "{SERVERS} servers start at once: of {first_lookups} lookups {at_first} found nobody right after the start; \
         where nobody had looked up before, none of {lookups} {SETTLED} s later"
    ));
}

/// So long after the start some servers look everybody up for the first time, all at once: who is not found, of how many
/// lookups.
async fn start_all(sim: Sim, wait: Duration, askers: usize) -> (Vec<ExpertUid>, usize) {
    let config = DhtConfig { update_period: 300.0, ..DhtConfig::default() };
    sim.network().latency(Latency::uniform(millis(10)..millis(90)));
    let hive = sim.servers(SERVERS).experts("e.[0:20].[0:10]").dht(config).start().await;
    let uids: Vec<ExpertUid> = (0..SERVERS).map(|i| format!("e.{}.{}", i / 10, i % 10).parse().unwrap()).collect();
    sim.advance(wait).await;
    let dhts: Vec<_> = hive.servers().iter().step_by(SERVERS / askers).map(|server| server.dht()).collect();
    let mut missing = Vec::new();
    for found in join_all(dhts.iter().map(|dht| find(&sim, dht, &uids))).await {
        for ((server, uid), found) in hive.servers().iter().zip(&uids).zip(found) {
            match found {
                Some(host) => assert_eq!(host.value, server.peer(), "{uid}"),
                None => missing.push(uid.clone()),
            }
        }
    }
    (missing, SERVERS * dhts.len())
}
