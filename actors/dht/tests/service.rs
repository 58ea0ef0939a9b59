//! What a node does with calls, deadlines and crashes.

mod common;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use actix::{Actor, Addr};
use bytes::Bytes;
use common::*;
use futures::TryFutureExt;
use skep_dht::{Dht, DhtActor, DhtConfig, DhtError, DhtId, DhtParts, Freshness, StoreItem};
use skep_kernel::{ChildSpec, Guardian, GuardianSpec, Intensity, Restart, Seed, Started, Stop, Strategy, Tombstone};
use skep_rpc::{Bans, Body, Call, Meta, RequestId, Router, RpcError, TensorBody, Transport};
use skep_testkit::{Sim, SimTransport};
use skep_wire::Method;

async fn call(sim: &Sim, from: &SimTransport, to: &Dht, method: Method, body: Body) -> Result<Body, RpcError> {
    let meta = Meta { deadline: within(sim, 10), request_id: RequestId(1), trace: None };
    Ok(from.call(Call { peer: to.local_peer(), method, body, meta }).await?.body)
}

#[test]
fn malformed_calls_get_errors_and_the_node_goes_on() {
    Sim::with_seed(1).run(|sim| async move {
        let node = member(&sim, 1, &[]);
        let stranger = sim.network().client();
        let bodies = [&b"\xff\xff\xff"[..], b"\x12\x03abc", b"\x12\x14aaaaaaaaaaaaaaaaaaaa"];
        for method in [Method::Store, Method::Find, Method::Ping] {
            for body in bodies {
                let body = Body::Message(Bytes::from_static(body));
                let answer = call(&sim, &stranger, &node, method, body).await;
                // Twenty bytes are one good key for find.
                assert!(answer.is_err() || method != Method::Store, "{answer:?}");
            }
            let tensors = Body::Tensors(TensorBody::default());
            assert!(matches!(call(&sim, &stranger, &node, method, tensors).await, Err(RpcError::Remote { .. })));
        }
        let ping = call(&sim, &stranger, &node, Method::Ping, Body::Message(Bytes::new())).await;
        assert!(ping.is_ok());
    });
}

#[test]
fn a_client_serves_nobody() {
    Sim::with_seed(2).run(|sim| async move {
        let first = member(&sim, 1, &[]);
        let router = Router::new();
        let transport = sim.network().node(router.clone());
        let (config, clock) = (DhtConfig::client(), sim.clock());
        let initial_peers = vec![first.local_peer()];
        let transport = Arc::new(transport);
        let parts =
            DhtParts { transport, router: router.clone(), bans: Bans::new(), clock, seed: 2, config, initial_peers };
        let client = Dht::start_unsupervised(parts);
        stop_at_end(&sim, &client);
        client.joined(within(&sim, 5)).await.unwrap();
        assert!(router.methods().is_empty());
        assert_eq!(first.status().nodes, 0);
    });
}

#[test]
fn every_operation_ends_by_its_deadline() {
    Sim::with_seed(3).run(|sim| async move {
        let members = members(&sim, 4).await;
        for member in &members[1..] {
            sim.network().freeze(member.local_peer());
        }
        let asker = &members[0];
        let (uids, prefix) = (vec!["e.0.1".parse().unwrap()], "e.0.".parse().unwrap());
        let item = StoreItem {
            key: DhtId::of_text("key"),
            subkey: None,
            value: Bytes::from_static(b"\x01"),
            expiration: sim.clock().wall() + 60.0,
        };
        let (expiration, limits) = (sim.clock().wall() + 60.0, skep_dht::ListLimits::default());
        let newcomer = member(&sim, 9, &[members[1].local_peer()]);
        let (start, deadline) = (sim.now(), within(&sim, 2));
        type Operation<'a> = futures::future::BoxFuture<'a, Result<(), DhtError>>;
        let operations: Vec<Operation> = vec![
            Box::pin(asker.get_many(vec![DhtId::of_text("key")], Freshness::Latest, deadline).map_ok(drop)),
            Box::pin(asker.store_many(vec![item], deadline).map_ok(drop)),
            Box::pin(asker.find_experts(uids.clone(), Freshness::Latest, deadline).map_ok(drop)),
            Box::pin(asker.successors(vec![prefix], deadline).map_ok(drop)),
            Box::pin(asker.declare_experts(uids.clone(), expiration, deadline).map_ok(drop)),
            Box::pin(asker.withdraw_experts(uids.clone(), deadline)),
            Box::pin(async {
                let anywhere = "e.".parse().unwrap();
                asker.experts_under(&anywhere, limits, deadline).await.map(drop)
            }),
            Box::pin(newcomer.joined(deadline)),
        ];
        let timed = operations.into_iter().map(|operation| async { (operation.await, sim.now() - start) });
        for (number, (outcome, time)) in futures::future::join_all(timed).await.into_iter().enumerate() {
            assert!(outcome.is_err(), "operation {number} needs others");
            assert_eq!(time, Duration::from_secs(2), "operation {number}: {outcome:?}");
        }
        sim.advance(Duration::from_secs(10)).await;
        assert_eq!((asker.status().commands, asker.status().calls), (0, 0), "nothing is left behind");
        assert_eq!(sim.network().in_flight(), 0);
    });
}

#[test]
fn an_abandoned_command_is_dropped() {
    Sim::with_seed(4).run(|sim| async move {
        let members = members(&sim, 3).await;
        sim.network().freeze(members[1].local_peer());
        sim.network().freeze(members[2].local_peer());
        let asker = &members[0];
        let get = asker.get_many(vec![DhtId::of_text("key")], Freshness::Latest, within(&sim, 3600));
        tokio::select! {
            biased;
            _ = get => panic!("nobody answers"),
            () = sim.advance(Duration::from_secs(1)) => {}
        }
        sim.advance(Duration::from_secs(5)).await;
        assert_eq!(asker.status().commands, 0);
    });
}

#[test]
fn a_command_in_line_survives_the_actor() {
    Sim::with_seed(5).run(|sim| async move {
        let router = Router::new();
        let transport = Arc::new(sim.network().node(router.clone()));
        let (config, clock) = (DhtConfig::default(), sim.clock());
        let (dht, make) = Dht::new(DhtParts {
            transport,
            router,
            bans: Bans::new(),
            clock,
            seed: 1,
            config,
            initial_peers: Vec::new(),
        });
        let key = DhtId::of_text("key");
        let value = Bytes::from_static(b"\x01");
        let item = StoreItem { key, subkey: None, value, expiration: sim.clock().wall() + 60.0 };
        let store = dht.store_many(vec![item], within(&sim, 10));
        let start = async {
            // Put in line first: there is no actor yet.
            sim.advance(Duration::from_secs(1)).await;
            make(Tombstone::unread()).start();
            stop_at_end(&sim, &dht);
        };
        let (stored, ()) = futures::join!(store, start);
        assert_eq!(stored, Ok(vec![true]));
        assert_eq!(dht.status().starts, 1);
    });
}

/// The actors of one node so far, the one that runs last.
type Actors = Arc<Mutex<Vec<Addr<DhtActor>>>>;

/// A node under a guardian, which starts its actor anew whenever that stops.
async fn supervised(sim: &Sim, first: &Dht) -> (Dht, Actors) {
    let router = Router::new();
    let transport = Arc::new(sim.network().node(router.clone()));
    let parts = DhtParts {
        transport,
        router,
        bans: Bans::new(),
        clock: sim.clock(),
        seed: 2,
        config: DhtConfig::default(),
        initial_peers: vec![first.local_peer()],
    };
    let (dht, make) = Dht::new(parts);
    let spec = GuardianSpec {
        name: "root".to_owned(),
        strategy: Strategy::OneForOne,
        intensity: Intensity::default(),
        seed: Seed::new(1),
    };
    let guardian = Guardian::start(spec, sim.clock());
    let actors = Actors::default();
    let started = actors.clone();
    let factory = move |tombstone| {
        let address = make(tombstone).start();
        started.lock().unwrap().push(address.clone());
        Started::actor(address)
    };
    guardian.supervise(ChildSpec::new("dht", Restart::Permanent), factory).await.unwrap();
    sim.at_end(async move { guardian.ask_to_stop() });
    (dht, actors)
}

async fn stop_actor(actors: &Actors) {
    let address = actors.lock().unwrap().last().unwrap().clone();
    address.send(Stop).await.unwrap();
}

#[test]
fn a_crashed_node_joins_again_and_its_experts_are_announced_again() {
    Sim::with_seed(8).run(|sim| async move {
        let first = member(&sim, 1, &[]);
        let (dht, actors) = supervised(&sim, &first).await;
        let announcer = announcer(&sim, &dht, 3);
        announcer.add(uids(&["expert.0"]));
        announcer.ready(within(&sim, 10)).await.unwrap();

        stop_actor(&actors).await;
        sim.advance(Duration::from_secs(3)).await;
        assert_eq!(dht.status().starts, 2);
        dht.joined(within(&sim, 10)).await.unwrap();
        assert_eq!((dht.status().nodes, announcer.announced().ready), (1, true));
        let records = dht.status().records;
        assert!(records >= 2, "both records of the expert are held here again, not {records}");
    });
}

#[test]
fn a_question_in_line_at_a_crash_is_answered_by_the_network_and_not_from_an_empty_table() {
    Sim::with_seed(9).run(|sim| async move {
        let first = member(&sim, 1, &[]);
        let expiration = sim.clock().wall() + 1000.0;
        first.declare_experts(uids(&["e.0.1"]), expiration, within(&sim, 1)).await.unwrap();
        let (dht, actors) = supervised(&sim, &first).await;
        dht.joined(within(&sim, 10)).await.unwrap();
        let find = async |seconds| {
            let found = dht.find_experts(uids(&["e.0.1"]), Freshness::Latest, within(&sim, seconds)).await;
            found.unwrap()[0].as_ref().map(|hosted| hosted.value)
        };
        stop_actor(&actors).await;
        let start = sim.now();
        assert_eq!(find(10).await, Some(first.local_peer()));
        assert!(sim.now() - start < Duration::from_secs(1));
        // Nobody to join: it does not wait for ever.
        sim.network().freeze(first.local_peer());
        stop_actor(&actors).await;
        assert_eq!(find(10).await, None);
        sim.network().restore(first.local_peer());
    });
}

#[test]
fn a_stopped_node_says_so() {
    Sim::with_seed(6).run(|sim| async move {
        let node = member(&sim, 1, &[]);
        sim.advance(Duration::from_millis(1)).await;
        node.stop().await;
        let got = node.get_many(vec![DhtId::of_text("key")], Freshness::Valid, within(&sim, 5)).await;
        assert_eq!(got, Err(DhtError::Stopped));
    });
}

#[test]
fn a_flood_of_commands_is_refused() {
    Sim::with_seed(7).run(|sim| async move {
        let members = members(&sim, 3).await;
        let node = member_with(&sim, 9, &[], DhtConfig { max_commands: 4, ..DhtConfig::default() });
        drop(members);
        let gets = (0..20).map(|n| {
            let keys = vec![DhtId::of_bytes(&[n])];
            node.get_many(keys, Freshness::Latest, within(&sim, 5))
        });
        let results = futures::future::join_all(gets).await;
        let refused = results.iter().filter(|got| matches!(got, Err(DhtError::Overloaded { capacity: 4 }))).count();
        assert_eq!(refused, 16);
    });
}
