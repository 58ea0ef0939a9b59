//! What can be done to the nodes of a simulation, and what their callers see of it.

use std::time::Duration;

use skep_dht::Freshness;
use skep_kernel::Deadline;
use skep_moe::RemoteExpert;
use skep_rpc::{RpcError, Step};
use skep_testkit::{Health, Hive, Latency, ScriptedBackend, Sim, SimClient};
use skep_wire::Method;

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn within(sim: &Sim, ms: u64) -> Deadline {
    Deadline::after(sim.now(), millis(ms))
}

#[test]
fn a_join_keeps_its_deadline_when_servers_die() {
    Sim::with_seed(0xBEE).run(|sim| async move {
        sim.network().latency(Latency::uniform(millis(20)..millis(80))).loss(0.01);
        let backend = ScriptedBackend::scale(2.0).costing(millis(3));
        let hive = sim.servers(20).experts("ffn.[0:5].[0:4]").backend(backend).start().await;
        let moe = sim.client(&hive).moe("ffn.", [5, 4]).k_best(4).k_min(2);
        let moe = moe.forward_timeout(millis(500)).timeout_after_k_min(millis(100)).build().await;
        moe.forward(sim.rows(8, 1024)).await.expect("all servers live");
        hive.pick(5).kill();
        hive.pick(2).freeze();
        let start = sim.now();
        let out = moe.forward(sim.rows(8, 1024)).await.expect("k_min experts for every row");
        assert!(sim.now() - start <= millis(500));
        assert!(out.responders_per_row().all(|n| (2..=4).contains(&n)));
        sim.advance(hive.announce_expiration()).await;
        assert_eq!(moe.visible_experts().await.len(), 13);
    });
}

/// One server with one expert, a client that knows it.
async fn one_expert(sim: &Sim, backend: ScriptedBackend) -> (Hive, SimClient, RemoteExpert) {
    let hive = sim.servers(1).experts("expert.0").backend(backend).start().await;
    let client = sim.client(&hive).start().await;
    let uid = "expert.0".parse().unwrap();
    let expert = RemoteExpert::find(&client, &uid, within(sim, 5000)).await.unwrap().expect("it is announced");
    (hive, client, expert)
}

#[test]
fn callers_of_a_killed_node_see_their_deadline_and_nothing_of_it_runs_any_more() {
    Sim::with_seed(1).run(|sim| async move {
        let (hive, _client, expert) = one_expert(&sim, ScriptedBackend::scale(2.0).costing(millis(100))).await;
        let call = expert.forward(vec![sim.rows(1, 4)], within(&sim, 1000));
        let kill = async {
            sim.advance(millis(50)).await;
            hive.pick(1).kill();
        };
        let (answer, ()) = futures::join!(call, kill);
        assert!(matches!(answer, Err(RpcError::Deadline { .. })), "{answer:?}");
        assert_eq!(hive.servers()[0].node().health(), Health::Killed);
        assert_eq!(hive.recording("expert.0").batches().len(), 0, "the batch never ran");
    });
}

#[test]
fn a_crashed_node_breaks_calls_and_refuses_new_ones_until_it_is_started_again() {
    Sim::with_seed(2).run(|sim| async move {
        let (hive, _client, expert) = one_expert(&sim, ScriptedBackend::scale(2.0).costing(millis(100))).await;
        let node = hive.servers()[0].node().clone();
        let call = expert.forward(vec![sim.rows(1, 4)], within(&sim, 1000));
        let crash = async {
            sim.advance(millis(50)).await;
            node.crash();
        };
        let (broken, ()) = futures::join!(call, crash);
        assert!(matches!(broken, Err(RpcError::Unreachable { step: Step::Exchange, .. })), "{broken:?}");
        let refused = expert.forward(vec![sim.rows(1, 4)], within(&sim, 1000)).await;
        assert!(matches!(refused, Err(RpcError::Unreachable { step: Step::Dial, .. })), "{refused:?}");
        node.bounce();
        hive.servers()[0].server().ready(within(&sim, 5000)).await.unwrap();
        expert.forward(vec![sim.rows(1, 4)], within(&sim, 1000)).await.expect("it serves again");
    });
}

#[test]
fn a_bounced_server_keeps_its_identity_and_forgets_the_rest() {
    Sim::with_seed(3).run(|sim| async move {
        let (hive, client, expert) = one_expert(&sim, ScriptedBackend::affine(3.0, 0.5)).await;
        let rows = || vec![skep_wire::HostTensor::from_f32([1, 1], &[1.0]).unwrap()];
        expert.backward(rows(), rows(), within(&sim, 1000)).await.unwrap();
        assert_eq!(expert.forward(rows(), within(&sim, 1000)).await.unwrap()[0].to_f32().unwrap(), [2.5]);
        let peer = hive.servers()[0].peer();
        hive.pick(1).bounce();
        hive.servers()[0].server().ready(within(&sim, 5000)).await.unwrap();
        let uids = vec!["expert.0".parse().unwrap()];
        let found = client.dht.find_experts(uids, Freshness::Latest, within(&sim, 5000)).await.unwrap();
        assert_eq!(found[0].as_ref().unwrap().value, peer);
        assert_eq!(expert.forward(rows(), within(&sim, 1000)).await.unwrap()[0].to_f32().unwrap(), [3.0]);
    });
}

#[test]
fn a_frozen_node_goes_on_where_it_stood() {
    Sim::with_seed(4).run(|sim| async move {
        let (hive, _client, expert) = one_expert(&sim, ScriptedBackend::scale(2.0).costing(millis(100))).await;
        let node = hive.servers()[0].node().clone();
        let start = sim.now();
        let call = expert.forward(vec![sim.rows(1, 4)], within(&sim, 5000));
        let sleep = async {
            sim.advance(millis(50)).await;
            node.freeze();
            sim.advance(millis(1000)).await;
            node.thaw();
        };
        let (answer, ()) = futures::join!(call, sleep);
        assert!(answer.is_ok());
        assert_eq!(sim.now() - start, millis(1050));
    });
}

#[test]
fn a_slow_node_takes_so_many_times_as_long() {
    Sim::with_seed(5).run(|sim| async move {
        let backend = ScriptedBackend::scale(2.0).costing(millis(10)).costing_per_row(millis(1));
        let (hive, _client, expert) = one_expert(&sim, backend).await;
        for (factor, takes) in [(1.0, 15), (4.0, 60)] {
            hive.pick(1).slow(factor);
            let start = sim.now();
            expert.forward(vec![sim.rows(5, 4)], within(&sim, 5000)).await.unwrap();
            assert_eq!(sim.now() - start, millis(takes));
        }
    });
}

#[test]
fn a_clock_that_is_off_too_far_is_told_so() {
    for (skew, joins) in [(2.5, true), (-2.5, true), (10.0, false), (-10.0, false)] {
        Sim::with_seed(6).run(|sim| async move {
            let first = sim.dht_node(&[]);
            let second = sim.dht_node(&[first.peer()]);
            second.node().clock_skew(skew);
            let joined = second.dht().joined(within(&sim, 10_000)).await;
            assert_eq!(joined.is_ok(), joins, "{skew}: {joined:?}");
            if let Err(error) = joined {
                assert!(matches!(error, skep_dht::DhtError::ClockSkew { .. }), "{error}");
            }
        });
    }
}

#[test]
fn picks_are_drawn_by_the_seed_among_those_that_are_well() {
    let run = |seed| {
        Sim::with_seed(seed).run(|sim| async move {
            let hive = sim.servers(8).experts("m.[0:8]").start().await;
            let killed = hive.pick(3);
            killed.kill();
            let frozen = hive.pick(3);
            frozen.freeze();
            let numbers = |nodes: skep_testkit::Nodes| nodes.iter().map(|node| node.number()).collect::<Vec<_>>();
            let (killed, frozen) = (numbers(killed), numbers(frozen));
            assert!(killed.iter().all(|number| !frozen.contains(number)));
            assert_eq!(hive.well().iter().count(), 2);
            (killed, frozen)
        })
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_partition_is_silence_and_heals() {
    Sim::with_seed(8).run(|sim| async move {
        let (hive, client, expert) = one_expert(&sim, ScriptedBackend::scale(2.0)).await;
        let (server, us) = (hive.servers()[0].peer(), client.node().peer());
        sim.network().partition(&[server], &[us]);
        let late = expert.forward(vec![sim.rows(1, 4)], within(&sim, 500)).await;
        assert!(matches!(late, Err(RpcError::Deadline { .. })));
        sim.network().heal();
        assert!(expert.forward(vec![sim.rows(1, 4)], within(&sim, 500)).await.is_ok());
        sim.network().one_way(server, us).cut();
        let before = sim.network().delivered(Method::Forward);
        assert!(expert.forward(vec![sim.rows(1, 4)], within(&sim, 500)).await.is_err());
        assert_eq!(sim.network().delivered(Method::Forward), before + 1, "the request arrives, its answer does not");
    });
}
