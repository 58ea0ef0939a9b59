//! Clocks that are a little off do no harm; one that is far off is named.

use skep_dht::DhtError;
use skep_expert::ServerError;
use skep_testkit::Sim;
use skep_wire::ExpertUid;

use crate::common::*;

#[test]
fn clocks_within_three_seconds_work_together() {
    Sim::with_seed(1).run(|sim| async move {
        let first = sim.dht_node(&[]);
        let hives: Vec<_> = (0..12)
            .map(|number| {
                let hive = sim.servers(1).experts(&*format!("e.{number}.0")).join(&[first.peer()]).launch();
                // Five seconds between any two of different kind.
                hive.nodes().clock_skew(if number % 2 == 0 { 2.5 } else { -2.5 });
                hive
            })
            .collect();
        for hive in &hives {
            hive.servers()[0].server().ready(within(&sim, secs(30))).await.unwrap();
        }
        let uids: Vec<ExpertUid> = (0..12).map(|number| format!("e.{number}.0").parse().unwrap()).collect();
        // Longer than records live, so that they are announced anew across the difference.
        for _ in 0..5 {
            sim.advance(secs(61)).await;
            for asker in &hives[..2] {
                let found = find(&sim, &asker.servers()[0].dht(), &uids).await;
                let hosts = found.into_iter().map(|found| found.expect("it lives").value);
                assert!(hosts.eq(hives.iter().map(|hive| hive.servers()[0].peer())));
            }
        }
        for hive in &hives[..2] {
            hive.nodes().kill();
        }
        sim.advance(hives[0].announce_expiration() + secs(5)).await;
        for asker in &hives[2..4] {
            let found = find(&sim, &asker.servers()[0].dht(), &uids[..2]).await;
            assert_eq!(found, [None, None], "gone within their expiration and the difference of clocks");
        }
    });
}

#[test]
fn a_clock_ten_seconds_off_is_named_as_what_is_wrong() {
    for skew in [-10.0, 10.0] {
        Sim::with_seed(2).run(|sim| async move {
            let first = sim.dht_node(&[]);
            let hive = sim.servers(1).experts("e.0").join(&[first.peer()]).launch();
            hive.nodes().clock_skew(skew);
            let server = &hive.servers()[0];
            let joined = server.dht().joined(within(&sim, secs(60))).await;
            let Err(DhtError::ClockSkew { skew: told, peer }) = joined else { panic!("{joined:?}") };
            assert!((told - skew).abs() < 0.1 && peer == first.peer(), "{told} s against {peer}");
            let ready = server.server().ready(within(&sim, secs(60))).await;
            let Err(ServerError::NotReady(text)) = ready else { panic!("{ready:?}") };
            assert!(text.contains("clock is") && text.contains("10.0 s off"), "{text}");
            // Who sets the clock need not start anything again.
            hive.nodes().clock_skew(0.0);
            server.server().ready(within(&sim, secs(60))).await.unwrap();
        });
    }
}
