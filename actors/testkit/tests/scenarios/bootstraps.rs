//! The nodes to join through are down when servers start: they keep trying and join.

use rand::{Rng, seq::IndexedRandom};
use skep_testkit::{Latency, Node, Sim};
use skep_wire::ExpertUid;

use crate::common::*;

const SERVERS: usize = 3;

#[test]
fn servers_whose_bootstraps_are_down_for_ten_minutes_keep_trying_and_join() {
    let watch = Stopwatch::start("4, bootstraps");
    let seeds = size(20, 1000);
    let mut slowest = 0.0f64;
    for seed in 0..seeds {
        let took = Sim::with_seed(seed).run(schedule);
        slowest = slowest.max(took);
    }
    watch.report(format!("{seeds} of {seeds} seeds joined, the slowest {slowest:.1} s after the bootstraps were back"));
}

/// Tells how many seconds after the bootstraps were back the last server was ready.
async fn schedule(sim: Sim) -> f64 {
    let random = &mut random(sim.seed());
    sim.network().latency(Latency::uniform(millis(10)..millis(200))).loss(0.05);
    let bootstraps = [sim.dht_node(&[]), sim.dht_node(&[])];
    let ways_to_be_down: [fn(&Node); 3] = [Node::kill, Node::crash, Node::freeze];
    for bootstrap in &bootstraps {
        ways_to_be_down.choose(random).unwrap()(bootstrap.node());
    }
    let peers = bootstraps.each_ref().map(|bootstrap| bootstrap.peer());
    let hive = sim.servers(SERVERS).experts("e.[0:2].[0:6]").join(&peers).launch();
    sim.advance(secs(600)).await;
    for server in hive.servers() {
        let status = server.dht().status();
        assert!(!status.joined && !server.server().status().ready, "{status:?}");
        assert!(status.failed_rounds >= 15, "seed {}: it has tried {} times", sim.seed(), status.failed_rounds);
        let problem = status.problem.expect("it says why");
        assert!(peers.iter().any(|peer| problem.contains(&peer.to_string())), "{problem}");
    }

    let back = sim.now();
    // One is enough; it has forgotten everything.
    let some = random.random_range(1..=2);
    bootstraps[..some].iter().for_each(|bootstrap| bootstrap.node().bounce());
    for server in hive.servers() {
        // Tried at least twice a minute; one ping in five fails, as it takes four messages.
        let ready = server.server().ready(within(&sim, secs(300))).await;
        ready.unwrap_or_else(|error| panic!("seed {}: {error}", sim.seed()));
    }
    let took = sim.now() - back;
    let client = sim.client_of(&peers[..1]).await;
    let uids: Vec<ExpertUid> = (0..12).map(|i| format!("e.{}.{}", i / 6, i % 6).parse().unwrap()).collect();
    // A lookup whose messages get lost may find less; another one finds the rest.
    let patience = within(&sim, secs(60));
    let mut found = find(&sim, &client.dht, &uids).await;
    while found.iter().any(Option::is_none) && !patience.has_passed(sim.now()) {
        sim.advance(secs(1)).await;
        found = find(&sim, &client.dht, &uids).await;
    }
    assert!(found.iter().all(Option::is_some), "seed {}: {found:?}", sim.seed());
    took.as_secs_f64()
}
