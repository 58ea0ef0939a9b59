//! Experts of one node are found by others.

mod common;

use bytes::Bytes;
use common::*;
use skep_dht::{DhtId, Freshness, ListLimits, StoreItem};
use skep_testkit::Sim;

#[test]
fn a_declared_expert_is_found_by_members_and_clients() {
    Sim::with_seed(1).run(|sim| async move {
        let members = members(&sim, 8).await;
        let host = &members[3];
        let until = sim.clock().wall() + 60.0;
        let uids = uids(&["ffn.0.0", "ffn.0.3", "ffn.2.1"]);
        let declared = host.declare_experts(uids.clone(), until, within(&sim, 10)).await.unwrap();
        assert!(declared.values().all(|stored| *stored));

        let client = client(&sim, 99, &[members[0].local_peer()]);
        client.joined(within(&sim, 5)).await.unwrap();
        for asker in [&members[7], &client] {
            let found = asker.find_experts(uids.clone(), Freshness::Valid, within(&sim, 10)).await.unwrap();
            for hosted in found {
                let hosted = hosted.expect("the expert was declared");
                assert_eq!((hosted.value, hosted.expiration), (host.local_peer(), until));
            }
            let prefixes = vec![prefix("ffn.0."), prefix("ffn.1."), prefix("ffn.2.")];
            let table = asker.successors(prefixes, within(&sim, 10)).await.unwrap();
            assert_eq!(table[&prefix("ffn.0.")].keys().copied().collect::<Vec<_>>(), [0, 3]);
            assert!(table[&prefix("ffn.1.")].is_empty());
            assert_eq!(table[&prefix("ffn.2.")][&1], (uid("ffn.2.1"), host.local_peer()));
        }
    });
}

#[test]
fn an_unknown_expert_is_not_found() {
    Sim::with_seed(2).run(|sim| async move {
        let members = members(&sim, 3).await;
        let found = members[1].find_experts(vec![uid("ffn.7.7")], Freshness::Latest, within(&sim, 10)).await.unwrap();
        assert_eq!(found, [None]);
    });
}

#[test]
fn a_lone_node_keeps_its_own_experts() {
    Sim::with_seed(3).run(|sim| async move {
        let lone = member(&sim, 1, &[]);
        lone.joined(within(&sim, 0)).await.expect("there is nobody to join");
        let until = sim.clock().wall() + 60.0;
        lone.declare_experts(vec![uid("expert.1")], until, within(&sim, 10)).await.unwrap();
        let found = lone.find_experts(vec![uid("expert.1")], Freshness::Latest, within(&sim, 10)).await.unwrap();
        assert_eq!(found[0].as_ref().unwrap().value, lone.local_peer());
        let table = lone.successors(vec![prefix("expert.1.")], within(&sim, 10)).await.unwrap();
        assert_eq!(table[&prefix("expert.1.")][&1], (uid("expert.1"), lone.local_peer()));
    });
}

#[test]
fn experts_vanish_when_their_records_expire() {
    Sim::with_seed(4).run(|sim| async move {
        let members = members(&sim, 4).await;
        let until = sim.clock().wall() + 60.0;
        members[1].declare_experts(vec![uid("expert.1")], until, within(&sim, 10)).await.unwrap();
        sim.advance(std::time::Duration::from_secs(61)).await;
        let found = members[2].find_experts(vec![uid("expert.1")], Freshness::Valid, within(&sim, 10)).await.unwrap();
        assert_eq!(found, [None]);
    });
}

#[test]
fn withdrawn_experts_vanish_at_once_and_others_stay() {
    Sim::with_seed(5).run(|sim| async move {
        let members = members(&sim, 6).await;
        let (ours, theirs) = (&members[1], &members[2]);
        let until = sim.clock().wall() + 60.0;
        ours.declare_experts(uids(&["e.1.2.3", "e.1.2.4", "e.1.5.0"]), until, within(&sim, 10)).await.unwrap();
        theirs.declare_experts(uids(&["e.1.7.0"]), until, within(&sim, 10)).await.unwrap();

        ours.withdraw_experts(uids(&["e.1.2.4", "e.1.5.0", "e.1.7.0"]), within(&sim, 10)).await.unwrap();
        let asked = uids(&["e.1.2.3", "e.1.2.4", "e.1.5.0", "e.1.7.0"]);
        let found = members[4].find_experts(asked, Freshness::Latest, within(&sim, 10)).await.unwrap();
        let hosts: Vec<_> = found.into_iter().map(|hosted| hosted.map(|hosted| hosted.value)).collect();
        assert_eq!(hosts, [Some(ours.local_peer()), None, None, Some(theirs.local_peer())]);

        let table = members[4].successors(vec![prefix("e.1."), prefix("e.1.2.")], within(&sim, 10)).await.unwrap();
        assert_eq!(table[&prefix("e.1.")][&2].0, uid("e.1.2.3"), "the entry passes to the expert that remains");
        assert_eq!(table[&prefix("e.1.")].keys().copied().collect::<Vec<_>>(), [2, 7]);
        assert_eq!(table[&prefix("e.1.2.")].keys().copied().collect::<Vec<_>>(), [3]);
    });
}

#[test]
fn hiveminds_marks_for_nothing_here_are_read_as_nothing() {
    Sim::with_seed(7).run(|sim| async move {
        let members = members(&sim, 4).await;
        let until = sim.clock().wall() + 60.0;
        members[1].declare_experts(uids(&["e.1.2", "flat.3"]), until, within(&sim, 10)).await.unwrap();
        // What its beam search stores when it finds no successors: {-1: None}. -1 is also the place of "flat.3" itself.
        let mark = |prefix: &str, expiration| StoreItem {
            key: DhtId::of_text(prefix),
            subkey: Some(Bytes::from_static(b"\xff")),
            value: Bytes::from_static(b"\xc0"),
            expiration,
        };
        let marks = vec![mark("e.1.", until), mark("e.9.", until), mark("flat.3.", until + -30.0)];
        let stored = members[2].store_many(marks, within(&sim, 10)).await.unwrap();
        assert_eq!(stored, [true, true, false], "an earlier mark does not replace an expert");
        let prefixes = vec![prefix("e.1."), prefix("e.9."), prefix("flat.3.")];
        let table = members[3].successors(prefixes, within(&sim, 10)).await.unwrap();
        assert_eq!(table[&prefix("e.1.")].keys().copied().collect::<Vec<_>>(), [2]);
        assert!(table[&prefix("e.9.")].is_empty());
        assert_eq!(table[&prefix("flat.3.")][&3], (uid("flat.3"), members[1].local_peer()));
        let listed = members[3].experts_under(&prefix("e.9."), ListLimits::default(), within(&sim, 30)).await.unwrap();
        assert_eq!(listed, []);
    });
}

#[test]
fn a_listing_finds_flat_and_deep_grids() {
    Sim::with_seed(6).run(|sim| async move {
        let members = members(&sim, 5).await;
        let until = sim.clock().wall() + 60.0;
        let flat: Vec<_> = [0, 1, 4, 300].iter().map(|n| uid(&format!("expert.{n}"))).collect();
        members[1].declare_experts(flat.clone(), until, within(&sim, 10)).await.unwrap();
        let deep = uids(&["ffn.0.0.1", "ffn.0.2.0", "ffn.0.2.9", "ffn.3.1.1"]);
        members[2].declare_experts(deep.clone(), until, within(&sim, 10)).await.unwrap();
        for (name, expected) in [("expert.", flat), ("ffn.", deep.clone()), ("ffn.0.", deep[..3].to_vec())] {
            let listed =
                members[4].experts_under(&prefix(name), ListLimits::default(), within(&sim, 30)).await.unwrap();
            assert_eq!(listed.iter().map(|l| l.uid.clone()).collect::<Vec<_>>(), expected);
            assert!(listed.iter().all(|l| l.hosted.expiration == until));
        }
        members[2].withdraw_experts(deep, within(&sim, 10)).await.unwrap();
        let listed = members[4].experts_under(&prefix("ffn."), ListLimits::default(), within(&sim, 30)).await.unwrap();
        assert_eq!(listed, [], "caches do not count");
    });
}
