//! Servers die, freeze and dawdle: a fan-out keeps its deadline and says who is missing.

mod common;

use common::*;
use skep_moe::{Mixture, MoeConfig, MoeError};
use skep_rpc::RpcError;
use skep_testkit::{Latency, ScriptedBackend, Sim};
use skep_wire::Method;

#[test]
fn a_forward_without_enough_answers_ends_at_its_deadline() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let config = MoeConfig::grid("m.", [2]).k_best(2).k_min(2).forward_timeout(millis(500));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap();
        sim.network().freeze(hive.hosting("m.1").peer());
        let start = sim.now();
        let error = moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap_err();
        assert_eq!(sim.now() - start, millis(500));
        let text = error.to_string();
        assert!(text.contains("m.1") && text.contains("deadline"), "{text}");
        assert!(matches!(error, MoeError::TooFewAnswers { rows, k_min: 2, .. } if rows == [0, 1]));
    });
}

#[test]
fn k_min_answers_are_enough_and_the_rest_is_masked_out() {
    Sim::with_seed(2).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let config = MoeConfig::grid("m.", [2]).k_best(2).forward_timeout(millis(500)).timeout_after_k_min(millis(100));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap();
        sim.network().freeze(hive.hosting("m.0").peer());
        let start = sim.now();
        let gather = moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap();
        assert_eq!(sim.now() - start, millis(100), "no longer than timeout_after_k_min");
        assert_eq!(gather.mask, [false, true, false, true]);
        assert_eq!(&gather.outputs[0].to_f32().unwrap()[..8], [0., 0., 0., 0., 2., 4., 6., 8.]);
        assert!(gather.failures.is_empty(), "to be slower than others is no failure");
    });
}

#[test]
fn rows_that_a_failure_leaves_short_go_to_other_experts() {
    Sim::with_seed(3).run(|sim| async move {
        let hive = sim.servers(3).experts(["m.0", "m.1", "m.2"]).start().await;
        let config = MoeConfig::grid("m.", [3]).k_best(1).forward_timeout(millis(500));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(1)], descending(1, &[3])).await.unwrap();
        sim.network().refuse(hive.hosting("m.0").peer());
        let start = sim.now();
        let gather = moe.forward(vec![rows(2)], descending(2, &[3])).await.unwrap();
        assert_eq!(sim.now(), start, "a refusal costs no time");
        assert_eq!(chosen(&gather), [["m.1"], ["m.1"]]);
        assert_eq!(gather.mask, [true, true]);
        assert!(matches!(&gather.failures[..], [(uid, RpcError::Unreachable { .. })] if uid.as_str() == "m.0"));
        let again = moe.forward(vec![rows(1)], descending(1, &[3])).await.unwrap();
        assert!(again.failures.is_empty(), "a banned peer is passed over");
    });
}

#[test]
fn a_peer_is_chosen_again_as_soon_as_its_ban_ends() {
    Sim::with_seed(11).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let client = sim.client(&hive).await;
        let moe = Mixture::new(&client, MoeConfig::grid("m.", [2]).k_best(1)).unwrap();
        client.dht.bans().failed(sim.now(), hive.hosting("m.0").peer());
        let forward = || async { moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap() };
        assert_eq!(chosen(&forward().await), [["m.1"]]);
        // Shorter than what was read counts as read.
        sim.advance(millis(5001)).await;
        assert_eq!(chosen(&forward().await), [["m.0"]]);
    });
}

#[test]
fn a_peer_that_is_at_work_may_be_asked_for_rows_that_a_failure_left_short() {
    Sim::with_seed(10).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).costing(millis(50)).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(1)).unwrap();
        let each_its_own = scores(&[&[&[1.0, 0.0]], &[&[0.0, 1.0]]]);
        moe.forward(vec![rows(2)], each_its_own.clone()).await.unwrap();
        sim.network().refuse(hive.hosting("m.0").peer());
        let gather = moe.forward(vec![rows(2)], each_its_own).await.unwrap();
        assert_eq!(chosen(&gather), [["m.1"], ["m.1"]]);
        assert_eq!(gather.failures.len(), 1);
    });
}

#[test]
fn an_expert_that_fails_is_replaced_by_another_one_of_the_same_server() {
    Sim::with_seed(9).run(|sim| async move {
        let backend = |uid: &skep_wire::ExpertUid| match uid.as_str() {
            "m.0" => ScriptedBackend::scale(2.0).of_width(WIDTH).fail_on(1),
            _ => ScriptedBackend::scale(2.0).of_width(WIDTH),
        };
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend_by_uid(backend).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(1)).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        assert_eq!(chosen(&gather), [["m.1"]]);
        assert!(matches!(&gather.failures[..], [(uid, RpcError::Remote { .. })] if uid.as_str() == "m.0"));
    });
}

#[test]
fn rows_that_silence_leaves_short_go_to_other_experts_half_way() {
    Sim::with_seed(4).run(|sim| async move {
        let hive = sim.servers(3).experts(["m.0", "m.1", "m.2"]).start().await;
        let config = MoeConfig::grid("m.", [3]).k_best(1).forward_timeout(millis(500));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(1)], descending(1, &[3])).await.unwrap();
        sim.network().freeze(hive.hosting("m.0").peer());
        let start = sim.now();
        let gather = moe.forward(vec![rows(1)], descending(1, &[3])).await.unwrap();
        assert_eq!(sim.now() - start, millis(250));
        assert_eq!(chosen(&gather), [["m.1"]]);
    });
}

#[test]
fn the_only_server_is_asked_again_although_it_failed() {
    Sim::with_seed(5).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let config = MoeConfig::grid("m.", [1]).k_best(1).forward_timeout(millis(200));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(1)], descending(1, &[1])).await.unwrap();
        let peer = hive.servers()[0].peer();
        sim.network().freeze(peer);
        assert!(moe.forward(vec![rows(1)], descending(1, &[1])).await.is_err());
        sim.network().restore(peer);
        assert!(moe.forward(vec![rows(1)], descending(1, &[1])).await.is_ok());
    });
}

#[test]
fn zero_rows_stand_for_missing_ones_where_that_is_allowed() {
    Sim::with_seed(6).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let config = MoeConfig::grid("m.", [2]).k_best(1).forward_timeout(millis(200)).allow_zero_outputs(true);
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        let only = |i: usize| {
            let mut row = [f32::NEG_INFINITY; 2];
            row[i] = 0.0;
            row
        };
        let scores = scores(&[&[&only(0)], &[&only(1)]]);
        moe.forward(vec![rows(2)], scores.clone()).await.unwrap();
        sim.network().freeze(hive.hosting("m.1").peer());
        let gather = moe.forward(vec![rows(2)], scores.clone()).await.unwrap();
        assert_eq!(gather.mask, [true, false]);
        assert_eq!(gather.outputs[0].to_f32().unwrap(), [2., 4., 6., 8., 0., 0., 0., 0.]);
        sim.network().freeze(hive.hosting("m.0").peer());
        let none = moe.forward(vec![rows(2)], scores).await.unwrap();
        assert_eq!((none.mask, none.outputs[0].clone()), (vec![false; 2], filled(&[2, 1, WIDTH], 0.0)));
        let gradients =
            moe.backward(&none_gather(none.outputs), vec![rows(2)], vec![filled(&[2, 1, WIDTH], 1.0)]).await;
        assert_eq!(gradients.unwrap().grad_inputs[0], filled(&[2, WIDTH], 0.0));
    });
}

fn none_gather(outputs: Vec<skep_wire::HostTensor>) -> skep_moe::Gather {
    skep_moe::Gather { chosen: vec![vec![], vec![]], mask: vec![false; 2], outputs, failures: vec![] }
}

#[test]
fn backward_goes_on_without_the_dead_and_keeps_its_deadline() {
    Sim::with_seed(7).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let config = MoeConfig::grid("m.", [2]).k_best(2).backward_timeout(millis(300));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        sim.network().kill(hive.hosting("m.0").peer());
        let start = sim.now();
        let backward = moe.backward(&gather, vec![rows(1)], vec![filled(&[1, 2, WIDTH], 1.0)]).await.unwrap();
        assert_eq!(sim.now() - start, millis(300));
        assert_eq!(backward.mask, [false, true]);
        assert_eq!(backward.grad_inputs[0], filled(&[1, WIDTH], 2.0));
        assert!(matches!(&backward.failures[..], [(uid, RpcError::Deadline { .. })] if uid.as_str() == "m.0"));
    });
}

#[test]
fn an_overloaded_expert_is_asked_again_and_trains_once() {
    Sim::with_seed(8).run(|sim| async move {
        let config =
            skep_expert::ServerConfig { max_batch_size: 4, mailbox_rows: 4, executors: 1, ..Default::default() };
        let backend = ScriptedBackend::scale(2.0).of_width(WIDTH);
        let hive = sim.servers(1).experts(["m.0"]).backend(backend).costing(millis(30)).config(config).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [1]).k_best(1)).unwrap();
        let gather = moe.forward(vec![rows(4)], descending(4, &[1])).await.unwrap();
        let gradients = vec![filled(&[4, 1, WIDTH], 1.0)];
        let passes = (0..3).map(|_| moe.backward(&gather, vec![rows(4)], gradients.clone()));
        let passes = futures::future::join_all(passes).await;
        assert!(passes.iter().all(Result::is_ok), "{passes:?}");
        assert_eq!(hive.steps("m.0"), 3);
        assert!(sim.network().delivered(Method::Backward) > 3, "some were refused first");
    });
}

#[test]
fn a_join_keeps_its_deadline_when_servers_die() {
    Sim::with_seed(0xBEE).run(|sim| async move {
        let hive = sim.servers(20).grid("ffn.", &[5, 4]).costing(millis(3)).start().await;
        let config = MoeConfig::grid("ffn.", [5, 4]).k_best(4).k_min(2);
        let config = config.forward_timeout(millis(500)).timeout_after_k_min(millis(100));
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        moe.forward(vec![rows(8)], descending(8, &[5, 4])).await.unwrap();
        sim.network().latency(Latency::uniform(millis(20)..millis(80)));
        for server in &hive.servers()[..5] {
            sim.network().kill(server.peer());
        }
        for server in &hive.servers()[5..7] {
            sim.network().freeze(server.peer());
        }
        for round in 0..10u32 {
            let noise =
                |i: usize| ((i as u32).wrapping_mul(2_654_435_761) ^ round.wrapping_mul(40_503) >> 3) as f32 % 7.0;
            let dimensions = [5, 4].map(|size| (size, (0..8 * size).map(noise).collect()));
            let scores = skep_moe::GridScores { rows: 8, dimensions: dimensions.to_vec() };
            let start = sim.now();
            let gather = moe.forward(vec![rows(8)], scores).await.expect("k_min experts for every row");
            assert!(sim.now() - start <= millis(500));
            for row in gather.mask.chunks(4) {
                let answered = row.iter().filter(|answered| **answered).count();
                assert!((2..=4).contains(&answered), "round {round}: {answered}");
            }
        }
    });
}
