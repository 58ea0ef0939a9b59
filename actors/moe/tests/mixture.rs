//! A batch through a mixture: who is asked, what comes back, what trains.

mod common;

use std::collections::BTreeMap;

use common::*;
use skep_kernel::time::before;
use skep_moe::{Mixture, MoeConfig, MoeError};
use skep_rpc::RpcError;
use skep_testkit::{ScriptedBackend, Sim};
use skep_wire::Method;

/// Experts scale by one more than the number their last coordinate makes.
fn by_coordinate(uid: &skep_wire::ExpertUid) -> ScriptedBackend {
    let last = *uid.coordinates().unwrap().last().unwrap();
    ScriptedBackend::affine(last as f32 + 1.0, 0.0).of_width(WIDTH)
}

#[test]
fn rows_get_the_outputs_of_their_best_experts() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(2).grid("m.", &[2, 3]).backend_by_uid(by_coordinate).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2, 3]).k_best(2)).unwrap();
        let scores = scores(&[&[&[0., 9.], &[1., 2., 3.]], &[&[9., 0.], &[3., 2., 1.]]]);
        let gather = moe.forward(vec![rows(2)], scores).await.unwrap();
        assert_eq!(chosen(&gather), [["m.1.2", "m.1.1"], ["m.0.0", "m.0.1"]]);
        assert_eq!(gather.chosen[0][0].coordinates, [1, 2]);
        assert_eq!(gather.chosen[0][0].peer, hive.hosting("m.1.2").peer());
        assert_eq!(gather.mask, [true; 4]);
        assert!(gather.failures.is_empty());
        assert_eq!(gather.outputs[0].shape(), [2, 2, WIDTH]);
        let expected = [3., 6., 9., 12., 2., 4., 6., 8., 5., 6., 7., 8., 10., 12., 14., 16.];
        assert_eq!(gather.outputs[0].to_f32().unwrap(), expected);
    });
}

#[test]
fn each_expert_is_called_once_with_all_its_rows() {
    Sim::with_seed(2).run(|sim| async move {
        let hive = sim.servers(3).grid("m.", &[4, 4]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [4, 4]).k_best(3)).unwrap();
        let gather = moe.forward(vec![rows(64)], descending(64, &[4, 4])).await.unwrap();
        assert_eq!(sim.network().delivered(Method::Forward), 3, "hivemind makes 192 calls");
        let gradients = filled(&[64, 3, WIDTH], 1.0);
        let backward = moe.backward(&gather, vec![rows(64)], vec![gradients]).await.unwrap();
        assert_eq!(sim.network().delivered(Method::Backward), 3);
        assert_eq!(backward.grad_inputs[0], filled(&[64, WIDTH], 6.0));
        assert_eq!(backward.mask, [true; 192]);
        assert_eq!(hive.steps("m.0.0"), 1);
        assert_eq!(sim.network().delivered(Method::Info), 3, "schemas are fetched once");
    });
}

#[test]
fn only_experts_that_answered_are_trained() {
    Sim::with_seed(3).run(|sim| async move {
        let backend = |uid: &skep_wire::ExpertUid| match uid.as_str() {
            "m.0" => ScriptedBackend::scale(2.0).of_width(WIDTH).fail_on(1),
            _ => ScriptedBackend::scale(2.0).of_width(WIDTH),
        };
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend_by_uid(backend).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(2)).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        assert_eq!((chosen(&gather), &gather.mask[..]), (vec![vec!["m.0", "m.1"]], &[false, true][..]));
        assert_eq!(gather.outputs[0].to_f32().unwrap(), [0., 0., 0., 0., 2., 4., 6., 8.]);
        assert!(matches!(&gather.failures[..], [(uid, RpcError::Remote { .. })] if uid.as_str() == "m.0"));
        let backward = moe.backward(&gather, vec![rows(1)], vec![filled(&[1, 2, WIDTH], 1.0)]).await.unwrap();
        assert_eq!((hive.steps("m.0"), hive.steps("m.1")), (0, 1));
        assert_eq!(backward.grad_inputs[0], filled(&[1, WIDTH], 2.0));
        assert_eq!(backward.mask, [false, true]);
    });
}

#[test]
fn an_expert_that_fails_in_backward_gives_no_gradient_and_a_batch_without_any_is_an_error() {
    Sim::with_seed(4).run(|sim| async move {
        let backend = |uid: &skep_wire::ExpertUid| match uid.as_str() {
            "m.0" => ScriptedBackend::scale(2.0).of_width(WIDTH).fail_on(2).fail_on(3),
            _ => ScriptedBackend::scale(2.0).of_width(WIDTH).fail_on(3).fail_on(4),
        };
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend_by_uid(backend).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(2)).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        let gradients = filled(&[1, 2, WIDTH], 1.0);
        let backward = moe.backward(&gather, vec![rows(1)], vec![gradients.clone()]).await.unwrap();
        assert_eq!(backward.mask, [false, true]);
        assert_eq!(backward.grad_inputs[0], filled(&[1, WIDTH], 2.0));
        let failed = moe.backward(&gather, vec![rows(1)], vec![gradients]).await;
        assert!(
            matches!(failed, Err(MoeError::TooFewAnswers { ref rows, k_min: 1, .. }) if *rows == [0]),
            "{failed:?}"
        );
    });
}

#[test]
fn not_a_number_is_a_failure_when_anomalies_are_looked_for() {
    Sim::with_seed(5).run(|sim| async move {
        let backend = ScriptedBackend::scale(1.0).of_width(WIDTH).nan_on(1);
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend(backend).start().await;
        let config = MoeConfig::grid("m.", [2]).k_best(1).detect_anomalies(true).allow_zero_outputs(true);
        let moe = Mixture::new(&sim.client(&hive).await, config).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await;
        assert!(
            matches!(gather, Err(MoeError::TooFewAnswers { .. })),
            "nobody has shown the shape of zeros: {gather:?}"
        );
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        assert_eq!(gather.mask, [true]);
        let bad = moe.forward(vec![filled(&[1, WIDTH], f32::NAN)], descending(1, &[2])).await;
        assert!(matches!(bad, Err(MoeError::Invalid(_))), "{bad:?}");
    });
}

#[test]
fn batches_that_fit_neither_scores_nor_grid_are_refused() {
    Sim::with_seed(6).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(1)).unwrap();
        for (inputs, scores) in [
            (vec![rows(2)], descending(1, &[2])),
            (vec![rows(1)], descending(1, &[3])),
            (vec![], descending(1, &[2])),
            (vec![rows(0)], descending(0, &[2])),
        ] {
            let refused = moe.forward(inputs, scores).await;
            assert!(matches!(refused, Err(MoeError::Invalid(_))), "{refused:?}");
        }
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        let flat = moe.backward(&gather, vec![rows(1)], vec![rows(1)]).await;
        assert!(matches!(flat, Err(MoeError::Invalid(_))), "{flat:?}");
        assert_eq!(hive.steps("m.0"), 0);
    });
}

#[test]
fn configurations_that_cannot_work_are_refused_at_once() {
    Sim::with_seed(7).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let client = sim.client(&hive).await;
        let good = MoeConfig::grid("m.", [2, 2]);
        let bad = [
            MoeConfig::grid("m", [2]),
            MoeConfig::grid("m.3.", [2]),
            MoeConfig::grid("m.", []),
            MoeConfig::grid("m.", [2, 0]),
            good.clone().k_best(0),
            good.clone().k_best(2).k_min(3),
            good.clone().k_best(2).backward_k_min(3),
            good.clone().forward_timeout(millis(0)),
        ];
        for config in bad {
            assert!(Mixture::new(&client, config.clone()).is_err(), "{config:?}");
        }
        assert_eq!(Mixture::new(&client, good.clone()).unwrap().config(), &good);
    });
}

#[test]
fn an_empty_grid_says_so() {
    Sim::with_seed(8).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("other.", [2]).k_best(1)).unwrap();
        let nobody = moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap_err();
        assert!(nobody.to_string().contains("no expert was found under other."), "{nobody}");
        assert!(matches!(nobody, MoeError::TooFewAnswers { rows, .. } if rows == [0, 1]));
    });
}

#[test]
fn what_is_missing_is_remembered_here_for_a_while_and_never_stored() {
    Sim::with_seed(12).run(|sim| async move {
        let hive = sim.servers(3).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("other.", [2]).k_best(1)).unwrap();
        let counted = || (sim.network().delivered(Method::Find), sim.network().delivered(Method::Store));
        let forward = || async { moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap_err() };
        let before = counted();
        forward().await;
        let (asked, stored) = counted();
        assert!(asked > before.0);
        assert_eq!(stored, before.1, "no mark of ours keeps others from seeing what comes");
        forward().await;
        assert_eq!(counted().0, asked, "known for a while");
        sim.advance(millis(3000)).await;
        forward().await;
        assert!(counted().0 > asked, "and asked again soon");
    });
}

#[test]
fn fan_outs_at_once_do_not_wait_for_each_other() {
    Sim::with_seed(9).run(|sim| async move {
        let hive = sim.servers(4).grid("m.", &[2, 2]).costing(millis(20)).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2, 2]).k_best(4)).unwrap();
        moe.forward(vec![rows(1)], descending(1, &[2, 2])).await.unwrap();
        let start = sim.now();
        let all = (1..=16).map(|n| moe.forward(vec![rows(n)], descending(n, &[2, 2])));
        let gathers = futures::future::join_all(all).await;
        for (n, gather) in (1..=16).zip(gathers) {
            assert_eq!(gather.unwrap().outputs[0].shape(), [n, 4, WIDTH]);
        }
        assert!(sim.now() - start <= millis(60), "what waits together is one batch: {:?}", sim.now() - start);
    });
}

#[test]
fn a_dropped_forward_ends_its_calls() {
    Sim::with_seed(10).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [1]).k_best(1)).unwrap();
        moe.forward(vec![rows(1)], descending(1, &[1])).await.unwrap();
        sim.network().freeze(hive.servers()[0].peer());
        let calls = sim.network().in_flight();
        let forward = moe.forward(vec![rows(1)], descending(1, &[1]));
        assert!(before(&*sim.clock(), within(&sim, millis(10)), forward).await.is_err());
        sim.advance(millis(1)).await;
        assert_eq!(sim.network().in_flight(), calls);
    });
}

#[test]
fn experts_with_another_shape_of_output_count_as_failed() {
    Sim::with_seed(11).run(|sim| async move {
        let widths = BTreeMap::from([("m.0", 4), ("m.1", 3)]);
        let backend = move |uid: &skep_wire::ExpertUid| ScriptedBackend::scale(1.0).of_width(widths[uid.as_str()]);
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend_by_uid(backend).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [2]).k_best(2)).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[2])).await.unwrap();
        assert_eq!(gather.mask, [true, false]);
        assert_eq!(gather.failures.len(), 1);
    });
}
