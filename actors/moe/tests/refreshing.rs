//! A mixture that is in use knows its experts before it asks for them.

mod common;

use std::{sync::Arc, time::Duration};

use common::*;
use skep_kernel::Spawner;
use skep_moe::{Client, Mixture, MoeConfig};
use skep_testkit::{Latency, Sim};
use skep_wire::Method;

/// Between steps.
const PAUSE: Duration = Duration::from_secs(2);

#[test]
fn steps_over_many_expirations_wait_for_no_dht() {
    Sim::with_seed(21).run(|sim| async move {
        let hive = sim.servers(4).grid("m.", &[3, 2]).start().await;
        // The last first coordinate is missing: that is known in time, too.
        let config = MoeConfig::grid("m.", [4, 2]).k_best(8);
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        sim.network().latency(Latency::constant(millis(50)));
        let step = || async {
            let start = sim.now();
            let gather = moe.forward(vec![rows(1)], descending(1, &[4, 2])).await.unwrap();
            assert_eq!(gather.chosen[0].len(), 6);
            sim.now() - start
        };
        let first = step().await;
        assert!(first > millis(200), "it has to look for the experts and to ask for their schemas: {first:?}");
        let asked = sim.network().delivered(Method::Find);
        let end = sim.now() + 10 * hive.announce_expiration();
        while sim.now() < end {
            assert_eq!(step().await, millis(100), "there and back, and nothing else");
            sim.advance(PAUSE).await;
        }
        assert!(sim.network().delivered(Method::Find) > asked);
    });
}

#[test]
fn an_expert_that_dies_is_no_longer_asked_once_its_record_has_expired() {
    Sim::with_seed(22).run(|sim| async move {
        let hive = sim.servers(3).experts(["m.0", "m.1", "m.2"]).start().await;
        let config = MoeConfig::grid("m.", [3]).k_best(3).forward_timeout(millis(1000));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        let dead = hive.hosting("m.1");
        let mut attempts = Vec::new();
        for second in 0..400 {
            if second == 20 {
                dead.node().kill();
            }
            let gather = moe.forward(vec![rows(1)], descending(1, &[3])).await.unwrap();
            if gather.chosen[0].iter().any(|chosen| chosen.uid.as_str() == "m.1") {
                attempts.push(second);
            }
            sim.advance(millis(1000)).await;
        }
        assert!(attempts.contains(&19), "{attempts:?}");
        let last = 20 + hive.announce_expiration().as_secs();
        assert!(attempts.iter().all(|second| *second <= last), "{attempts:?}");
    });
}

#[test]
fn a_new_expert_is_found_without_waiting_for_it() {
    Sim::with_seed(23).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(2)).unwrap();
        let seen = || async { moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap().chosen[0].len() };
        assert_eq!(seen().await, 1);
        let _more = sim.servers(1).join(hive.initial_peers()).experts(["m.1"]).start().await;
        for _ in 0..5 {
            seen().await;
            sim.advance(millis(1000)).await;
        }
        assert_eq!(seen().await, 2);
    });
}

#[test]
fn an_idle_mixture_reads_nothing_and_a_dropped_one_ends_what_it_began() {
    Sim::with_seed(24).run(|sim| async move {
        let hive = sim.servers(3).grid("m.", &[3, 2]).start().await;
        let reading = Arc::new(());
        let client = watched(&sim.client(&hive).await, reading.clone());
        let is_reading = || Arc::strong_count(&reading) > 2;
        let moe = Mixture::new(&client, MoeConfig::grid("m.", [3, 2]).k_best(2)).unwrap();
        let step = || async { moe.forward(vec![rows(1)], descending(1, &[3, 2])).await.unwrap() };
        for _ in 0..20 {
            step().await;
            assert!(is_reading());
            sim.advance(PAUSE).await;
        }
        // What was used is read again once more; then nobody has used it.
        sim.advance(Duration::from_secs(20)).await;
        assert!(!is_reading());
        sim.advance(Duration::from_secs(300)).await;
        assert!(!is_reading());

        step().await;
        assert!(is_reading());
        drop(moe);
        sim.advance(millis(1)).await;
        assert!(!is_reading());
    });
}

/// A client whose tasks that read prefixes again hold a clone of `reading`.
fn watched(client: &Client, reading: Arc<()>) -> Client {
    let spawner = client.spawner.clone();
    let watching = Spawner::located(move |future, place| {
        let held = place.file().ends_with("refresher.rs").then(|| reading.clone());
        spawner.spawn(async move {
            future.await;
            drop(held);
        })
    });
    Client { spawner: watching, ..client.clone() }
}
