//! Who gets an error when a backend fails, and what it costs the others.

mod common;

use common::*;
use skep_expert::{BackendError, ExpertState, HostedExpert, Kind, Server, ServerConfig, ServerError};
use skep_rpc::ServeError;
use skep_testkit::Sim;

const BAD: f32 = 13.0;

fn pair(value: f32) -> Vec<skep_wire::HostTensor> {
    vec![rows(1, 2, value), rows(1, 2, 1.0)]
}

#[test]
fn only_the_guilty_task_of_a_batch_gets_the_error() {
    Sim::with_seed(1).run(|sim| async move {
        let picky = |batch: &skep_expert::Batch| match contains(batch, BAD) {
            true => Err(BackendError::Invalid("13 is unlucky".to_owned())),
            false => Ok(batch.inputs.clone()),
        };
        let hosted = Closures::echo().on_forward(picky).on_backward(picky).hosted("e.0");
        let server = start(&sim, ServerConfig::default(), vec![hosted]).await;
        let e = expert(&server, "e.0");
        for (kind, steps) in [(Kind::Forward, 0), (Kind::Backward, 2)] {
            let first = occupy(&sim, &e);
            sim.advance(millis(1)).await;
            let tasks = [1.0, BAD, 2.0].map(|value| {
                let tensors = if kind == Kind::Forward { vec![rows(1, 2, value)] } else { pair(value) };
                e.submit(kind, tensors, within(&sim, 1000)).unwrap()
            });
            first.answer().await.unwrap();
            let results = answers(tasks).await;
            assert_eq!(results[0].as_ref().unwrap(), &[rows(1, 2, 1.0)]);
            assert_eq!(results[1].as_ref().unwrap_err(), &ServeError::Invalid("13 is unlucky".to_owned()));
            assert_eq!(results[2].as_ref().unwrap(), &[rows(1, 2, 2.0)]);
            assert_eq!(e.status().steps, steps, "each innocent task was applied once");
        }
        assert_eq!(e.status().failures, 2);
    });
}

#[test]
fn a_panic_in_forward_is_an_error_of_its_task_only() {
    Sim::with_seed(1).run(|sim| async move {
        let hosted = Closures::echo().on_forward(|batch| {
            assert!(!contains(batch, BAD), "unlucky");
            Ok(batch.inputs.clone())
        });
        let server = start(&sim, ServerConfig::default(), vec![hosted.hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let first = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let tasks = [1.0, BAD].map(|v| e.submit(Kind::Forward, vec![rows(1, 2, v)], within(&sim, 1000)).unwrap());
        first.answer().await.unwrap();
        let results = answers(tasks).await;
        assert!(results[0].is_ok());
        assert_eq!(results[1], Err(ServeError::Internal("forward panicked: unlucky".to_owned())));
        occupy(&sim, &e).answer().await.unwrap();
    });
}

#[test]
fn a_torn_step_poisons_the_expert_and_nobody_else() {
    for panics in [false, true] {
        Sim::with_seed(1).run(|sim| async move {
            let torn = Closures::echo().on_backward(move |_| {
                assert!(!panics, "out of luck");
                Err(BackendError::Torn("out of luck".to_owned()))
            });
            let hosted = vec![torn.hosted("e.0"), Closures::echo().hosted("e.1")];
            let server = start(&sim, ServerConfig::default(), hosted).await;
            let (e, other) = (expert(&server, "e.0"), expert(&server, "e.1"));
            let guilty = e.submit(Kind::Backward, pair(1.0), within(&sim, 1000)).unwrap();
            sim.advance(millis(1)).await;
            let behind = e.submit(Kind::Forward, vec![rows(1, 2, 0.0)], within(&sim, 1000)).unwrap();
            for result in answers([guilty, behind]).await {
                let Err(ServeError::Poisoned { uid, reason }) = result else { panic!("{result:?}") };
                assert!(uid == "e.0" && reason.contains("out of luck"), "{uid}: {reason}");
            }
            assert!(matches!(e.state(), ExpertState::Poisoned { .. }));
            let refused = e.submit(Kind::Forward, vec![rows(1, 2, 0.0)], within(&sim, 1000));
            assert!(matches!(refused, Err(ServeError::Poisoned { .. })));
            occupy(&sim, &other).answer().await.unwrap();
        });
    }
}

#[test]
fn a_poisoned_expert_serves_again_once_it_is_reloaded() {
    Sim::with_seed(1).run(|sim| async move {
        let mut broken = true;
        let factory = move || {
            let torn = std::mem::replace(&mut broken, false);
            let backend = Closures::echo().on_backward(move |batch| match torn {
                true => Err(BackendError::Torn("half a step".to_owned())),
                false => Ok(batch.grad_outputs.clone()),
            });
            Ok(Box::new(backend) as Box<dyn skep_expert::Backend>)
        };
        let hosted = HostedExpert { uid: "e.0".parse().unwrap(), factory: Box::new(factory) };
        let server = start(&sim, ServerConfig::default(), vec![hosted]).await;
        let e = expert(&server, "e.0");
        let snapshot = e.save(within(&sim, 1000)).await.unwrap();
        let torn = e.submit(Kind::Backward, pair(1.0), within(&sim, 1000)).unwrap();
        assert!(torn.answer().await.is_err());
        e.reload(snapshot, within(&sim, 1000)).await.unwrap();
        assert_eq!(e.state(), ExpertState::Serving);
        let whole = e.submit(Kind::Backward, pair(1.0), within(&sim, 1000)).unwrap();
        whole.answer().await.unwrap();
        assert_eq!(e.status().steps, 1);
    });
}

#[test]
fn a_backend_that_returns_too_little_is_an_internal_error() {
    Sim::with_seed(1).run(|sim| async move {
        let hosted = Closures::echo().on_forward(|_| Ok(vec![])).hosted("e.0");
        let server = start(&sim, ServerConfig::default(), vec![hosted]).await;
        let result = occupy(&sim, &expert(&server, "e.0")).answer().await;
        assert_eq!(result, Err(ServeError::Internal("the backend returned 0 outputs instead of 1".to_owned())));
    });
}

#[test]
fn a_factory_that_fails_or_panics_is_named_by_ready() {
    for panics in [false, true] {
        Sim::with_seed(1).run(|sim| async move {
            let factory = move || {
                assert!(!panics, "no weights");
                Err(BackendError::Failed("no weights".to_owned()))
            };
            let hosted = HostedExpert { uid: "e.0".parse().unwrap(), factory: Box::new(factory) };
            let parts = server_parts(&sim, ServerConfig::default());
            let executors = skep_expert::Executors::Inline { cost: std::sync::Arc::new(|_: &_, _, _| millis(1)) };
            let server = Server::with_executors(parts, vec![hosted], executors).unwrap();
            let error = server.ready(within(&sim, 1000)).await.unwrap_err();
            assert!(matches!(&error, ServerError::Build { uid, .. } if uid.as_str() == "e.0"), "{error}");
            assert!(error.to_string().contains("no weights"), "{error}");
        });
    }
}

#[test]
fn one_uid_is_hosted_once() {
    Sim::with_seed(1).run(|sim| async move {
        let hosted = vec![Closures::echo().hosted("e.0"), Closures::echo().hosted("e.0")];
        let error = Server::new(server_parts(&sim, ServerConfig::default()), hosted).err().unwrap();
        assert_eq!(error, ServerError::DuplicateUid("e.0".parse().unwrap()));
    });
}
