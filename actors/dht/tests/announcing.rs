//! The announcer keeps experts visible as long as they are wanted.

mod common;

use std::time::Duration;

use common::*;
use skep_dht::{Announced, Dht, DhtError, Freshness};
use skep_testkit::Sim;
use skep_wire::Method;

async fn is_visible(sim: &Sim, asker: &Dht, text: &str) -> bool {
    let found = asker.find_experts(vec![uid(text)], Freshness::Latest, within(sim, 10)).await.unwrap();
    found[0].is_some()
}

#[test]
fn announced_experts_stay_visible_and_withdrawn_ones_vanish() {
    Sim::with_seed(1).run(|sim| async move {
        let members = members(&sim, 5).await;
        let announcer = announcer(&sim, &members[1], 7);
        announcer.add(uids(&["expert.0", "expert.1"]));
        announcer.ready(within(&sim, 10)).await.unwrap();
        assert_eq!(announcer.announced(), Announced { wanted: 2, stored: 2, elsewhere: 2, ready: true });

        // Five times as long as a record lives.
        for _ in 0..30 {
            sim.advance(Duration::from_secs(10)).await;
            assert!(is_visible(&sim, &members[4], "expert.1").await);
        }

        announcer.remove(uids(&["expert.0"]));
        sim.advance(Duration::from_secs(1)).await;
        assert!(!is_visible(&sim, &members[4], "expert.0").await);
        assert!(is_visible(&sim, &members[4], "expert.1").await);

        announcer.stop(within(&sim, 10)).await.unwrap();
        assert!(!is_visible(&sim, &members[4], "expert.1").await);
        sim.advance(Duration::from_secs(120)).await;
        assert!(!is_visible(&sim, &members[4], "expert.1").await, "nothing is announced again");
    });
}

#[test]
fn the_experts_of_a_killed_server_expire() {
    Sim::with_seed(2).run(|sim| async move {
        let members = members(&sim, 5).await;
        let announcer = announcer(&sim, &members[1], 7);
        announcer.add(uids(&["expert.0"]));
        announcer.ready(within(&sim, 10)).await.unwrap();
        sim.network().kill(members[1].local_peer());
        announcer.remove(uids(&["expert.0"]));
        sim.advance(Duration::from_secs(61)).await;
        assert!(!is_visible(&sim, &members[4], "expert.0").await);
    });
}

#[test]
fn not_ready_before_a_bootstrap_answered_and_soon_after() {
    Sim::with_seed(3).run(|sim| async move {
        let first = member(&sim, 1, &[]);
        sim.network().refuse(first.local_peer());
        let late = member(&sim, 2, &[first.local_peer()]);
        let announcer = announcer(&sim, &late, 7);
        announcer.add(uids(&["expert.0"]));
        let error = announcer.ready(within(&sim, 120)).await.unwrap_err();
        assert!(matches!(&error, DhtError::Bootstrap(text) if text.contains("dialling")), "{error}");
        assert!(!announcer.announced().ready);
        assert!(late.status().problem.is_some());

        sim.network().restore(first.local_peer());
        announcer.ready(within(&sim, 40)).await.unwrap();
        assert!(is_visible(&sim, &first, "expert.0").await);
        assert_eq!(late.status().problem, None);
    });
}

#[test]
fn many_experts_travel_in_few_calls() {
    Sim::with_seed(4).run(|sim| async move {
        let members = members(&sim, 6).await;
        let announcer = announcer(&sim, &members[1], 7);
        announcer.add((0..256).map(|n| uid(&format!("expert.{n}"))));
        let before = sim.network().delivered(Method::Store);
        announcer.ready(within(&sim, 10)).await.unwrap();
        // 512 records with five replicas each; hivemind needs a call for every one.
        assert!(sim.network().delivered(Method::Store) - before < 20);
    });
}

#[test]
fn without_experts_joining_is_enough() {
    Sim::with_seed(5).run(|sim| async move {
        let members = members(&sim, 2).await;
        let announcer = announcer(&sim, &members[1], 7);
        announcer.ready(within(&sim, 1)).await.unwrap();
    });
}

#[test]
fn a_node_that_was_alone_stays_ready_when_others_come() {
    Sim::with_seed(6).run(|sim| async move {
        let first = member(&sim, 1, &[]);
        let announcer = announcer(&sim, &first, 7);
        announcer.add(uids(&["expert.0"]));
        announcer.ready(within(&sim, 1)).await.unwrap();
        let second = member(&sim, 2, &[first.local_peer()]);
        second.joined(within(&sim, 5)).await.unwrap();
        announcer.add(uids(&["expert.1"]));
        sim.advance(Duration::from_secs(1)).await;
        assert!(announcer.announced().ready);
        assert!(second.status().records >= 4, "the first expert's records were handed over");
    });
}
