//! A backward call is applied at most once by request id.

mod common;

use common::{calls::*, *};
use skep_expert::{BackendError, ServerConfig};
use skep_rpc::{Body, RequestId, RpcError};
use skep_testkit::{Sim, Wire};
use skep_wire::Method;

fn backward() -> Body {
    body("e.0", &[rows(1, 2, 1.0), rows(1, 2, 2.0)])
}

async fn steps(hive: &Hive) -> u64 {
    hive.sim.advance(millis(200)).await;
    hive.server.status().experts[0].steps
}

#[test]
fn a_repeat_gets_the_first_answer_and_trains_nothing() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![Closures::echo().hosted("e.0")]).await;
        for _ in 0..3 {
            let answer = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await.unwrap();
            assert_eq!(tensors(answer), [rows(1, 2, 2.0)]);
        }
        assert_eq!(steps(&hive).await, 1);
        hive.call_as(Method::Backward, backward(), RequestId(6), within(&sim, 1000)).await.unwrap();
        assert_eq!(steps(&hive).await, 2);
    });
}

#[test]
fn a_repeat_joins_the_call_that_runs() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![Closures::echo().hosted("e.0")]).await;
        let calls = (0..4).map(|_| hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)));
        for result in futures::future::join_all(calls).await {
            assert_eq!(tensors(result.unwrap()), [rows(1, 2, 2.0)]);
        }
        assert_eq!(steps(&hive).await, 1);
    });
}

#[test]
fn a_step_is_remembered_even_if_its_caller_left_meanwhile() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![Closures::echo().hosted("e.0")]).await;
        let hasty = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 5)).await;
        assert!(hasty.is_err());
        assert_eq!(steps(&hive).await, 1);
        let again = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await.unwrap();
        assert_eq!(tensors(again), [rows(1, 2, 2.0)]);
        assert_eq!(steps(&hive).await, 1);
    });
}

#[test]
fn a_call_that_was_skipped_or_failed_before_its_step_may_run_again() {
    Sim::with_seed(1).run(|sim| async move {
        let mut fails = 1;
        let flaky = Closures::echo().on_backward(move |batch| {
            fails -= 1;
            if fails == 0 { Err(BackendError::Failed("once".to_owned())) } else { Ok(batch.grad_outputs.clone()) }
        });
        let hive = Hive::with(&sim, ServerConfig::default(), vec![flaky.hosted("e.0")]).await;
        let busy = occupy(&sim, &hive.server.experts()[0]);
        sim.advance(millis(1)).await;
        let hasty = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 3));
        let patient = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000));
        let (hasty, patient) = futures::join!(hasty, patient);
        assert!(hasty.is_err());
        assert_eq!(patient, Err(RpcError::Remote { text: "once".to_owned() }), "it ran for the one who stayed");
        busy.answer().await.unwrap();
        assert_eq!(steps(&hive).await, 0);
        hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await.unwrap();
        assert_eq!(steps(&hive).await, 1);
    });
}

#[test]
fn an_answer_too_large_to_remember_is_known_as_applied() {
    Sim::with_seed(1).run(|sim| async move {
        let config = ServerConfig { remembered_bytes: 4, ..Default::default() };
        let hive = Hive::with(&sim, config, vec![Closures::echo().hosted("e.0")]).await;
        hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await.unwrap();
        let again = hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await;
        assert_eq!(again, Err(RpcError::AlreadyApplied));
        assert_eq!(steps(&hive).await, 1);
    });
}

#[test]
fn hivemind_callers_carry_no_ids_and_train_each_time() {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().wire(Wire::Hivemind);
        let hive = Hive::with(&sim, ServerConfig::default(), vec![Closures::echo().hosted("e.0")]).await;
        for _ in 0..2 {
            hive.call_as(Method::Backward, backward(), RequestId(5), within(&sim, 1000)).await.unwrap();
        }
        assert_eq!(steps(&hive).await, 2);
    });
}
