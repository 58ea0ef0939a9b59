//! Panics of foreign code beside the batches themselves: what a backend or a request leaves behind when it is dropped,
//! what a backend says of itself. None of them costs a neighbour anything.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::*;
use skep_expert::{
    Backend, BackendError, Batch, Executors, ExpertState, HostedExpert, Kind, Server, ServerConfig, ServerError,
    Snapshot,
};
use skep_rpc::ServeError;
use skep_testkit::Sim;
use skep_wire::{DType, ExpertInfo, HostTensor};

/// Panics when dropped.
struct Fragile(Vec<u8>);

impl Drop for Fragile {
    fn drop(&mut self) {
        panic!("told to");
    }
}

impl AsRef<[u8]> for Fragile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// One row of two values; its memory panics when nobody uses it any more.
fn fragile_row() -> HostTensor {
    HostTensor::new(DType::F32, [1, 2], Bytes::from_owner(Fragile(vec![0; 8]))).unwrap()
}

fn ones(batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
    Ok(vec![rows(batch.rows.0 as usize, 2, 1.0)])
}

#[test]
fn a_task_that_panics_when_dropped_leaves_the_rest_of_its_batch_alone() {
    Sim::with_seed(1).run(|sim| async move {
        let hosted = Closures::echo().on_forward(ones).on_backward(ones).hosted("e.0");
        let server = start(&sim, ServerConfig::default(), vec![hosted]).await;
        let e = expert(&server, "e.0");
        for kind in [Kind::Forward, Kind::Backward] {
            let first = occupy(&sim, &e);
            sim.advance(millis(1)).await;
            let tasks = [fragile_row(), rows(1, 2, 0.0), fragile_row(), rows(1, 2, 0.0)].map(|tensor| {
                let mut tensors = vec![tensor];
                tensors.extend((kind == Kind::Backward).then(|| rows(1, 2, 1.0)));
                e.submit(kind, tensors, within(&sim, 1000)).unwrap()
            });
            first.answer().await.unwrap();
            for result in answers(tasks).await {
                assert_eq!(result.unwrap(), [rows(1, 2, 1.0)]);
            }
        }
        assert_eq!((e.state(), e.status().steps), (ExpertState::Serving, 1));
    });
}

#[test]
fn an_answer_that_nobody_takes_and_that_panics_when_dropped_costs_nobody_else() {
    Sim::with_seed(1).run(|sim| async move {
        let fragile = |_: &Batch| Ok(vec![fragile_row()]);
        let hosted = vec![Closures::echo().on_forward(fragile).hosted("e.0"), Closures::echo().hosted("e.1")];
        let server = start(&sim, ServerConfig::default(), hosted).await;
        let (e, other) = (expert(&server, "e.0"), expert(&server, "e.1"));
        let left = e.submit(Kind::Forward, vec![rows(1, 2, 0.0)], within(&sim, 1000)).unwrap();
        sim.advance(millis(5)).await;
        drop(left);
        sim.advance(millis(20)).await;
        assert_eq!((e.status().forward_tasks, e.state()), (1, ExpertState::Serving));
        occupy(&sim, &other).answer().await.unwrap();
    });
}

#[test]
fn results_that_break_their_promise_and_panic_when_dropped_are_an_error_of_their_expert() {
    Sim::with_seed(1).run(|sim| async move {
        // Two rows were asked for.
        let fragile = |_: &Batch| Ok(vec![fragile_row()]);
        let hosted = vec![Closures::echo().on_forward(fragile).hosted("e.0"), Closures::echo().hosted("e.1")];
        let server = start(&sim, ServerConfig::default(), hosted).await;
        let e = expert(&server, "e.0");
        let result = e.submit(Kind::Forward, vec![rows(2, 2, 0.0)], within(&sim, 1000)).unwrap().answer().await;
        assert_eq!(result, Err(ServeError::Internal("forward panicked: told to".to_owned())));
        occupy(&sim, &expert(&server, "e.1")).answer().await.unwrap();
    });
}

#[test]
fn a_backend_that_panics_when_dropped_is_replaced_and_removed_all_the_same() {
    Sim::with_seed(1).run(|sim| async move {
        let factory = || {
            let fragile = Fragile(vec![]);
            let backend = Closures::echo().on_forward(move |batch| {
                let _held = &fragile;
                Ok(batch.inputs.clone())
            });
            Ok(Box::new(backend) as Box<dyn Backend>)
        };
        let hosted = HostedExpert { uid: "e.0".parse().unwrap(), factory: Box::new(factory) };
        let server = start(&sim, ServerConfig::default(), vec![hosted, Closures::echo().hosted("e.1")]).await;
        let e = expert(&server, "e.0");
        e.reload(Snapshot { step: 7, tensors: vec![] }, within(&sim, 1000)).await.unwrap();
        assert_eq!((e.state(), e.status().steps), (ExpertState::Serving, 7));
        occupy(&sim, &e).answer().await.unwrap();
        // The last one to know the expert is an executor's task.
        assert!(e.stop(within(&sim, 1000)).await);
        drop(e);
        occupy(&sim, &expert(&server, "e.1")).answer().await.unwrap();
        server.stop(within(&sim, 1000)).await.unwrap();
    });
}

/// A backend that panics when it is asked about itself.
struct Shy {
    inner: Closures,
    is_asked_for_its_class: bool,
    steps_asked: std::sync::atomic::AtomicU32,
}

impl Backend for Shy {
    fn info(&self) -> &ExpertInfo {
        self.inner.info()
    }

    fn class(&self) -> &str {
        assert!(!self.is_asked_for_its_class, "shy");
        "shy"
    }

    fn parameter_count(&self) -> u64 {
        0
    }

    fn steps(&self) -> u64 {
        // The first time is when it is built.
        assert_eq!(self.steps_asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed), 0, "shy");
        0
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.inner.forward(batch)
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.inner.backward(batch)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        self.inner.save()
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        self.inner.load(snapshot)
    }
}

fn shy(is_asked_for_its_class: bool) -> HostedExpert {
    let factory = move || {
        let steps_asked = Default::default();
        Ok(Box::new(Shy { inner: Closures::echo(), is_asked_for_its_class, steps_asked }) as Box<dyn Backend>)
    };
    HostedExpert { uid: "e.0".parse().unwrap(), factory: Box::new(factory) }
}

#[test]
fn a_backend_that_panics_while_its_steps_are_counted_is_poisoned_and_its_neighbour_goes_on() {
    Sim::with_seed(1).run(|sim| async move {
        let server = start(&sim, ServerConfig::default(), vec![shy(false), Closures::echo().hosted("e.1")]).await;
        let e = expert(&server, "e.0");
        occupy(&sim, &e).answer().await.unwrap();
        let ExpertState::Poisoned { reason } = e.state() else { panic!("{:?}", e.state()) };
        assert!(reason.contains("shy"), "{reason}");
        occupy(&sim, &expert(&server, "e.1")).answer().await.unwrap();
    });
}

#[test]
fn a_backend_that_panics_while_it_is_described_is_named() {
    Sim::with_seed(1).run(|sim| async move {
        let executors = Executors::Inline { cost: Arc::new(|_: &_, _, _| millis(1)) };
        let server = Server::with_executors(server_parts(&sim, ServerConfig::default()), vec![shy(true)], executors);
        let error = server.unwrap().ready(within(&sim, 1000)).await.unwrap_err();
        assert!(matches!(&error, ServerError::Build { uid, .. } if uid.as_str() == "e.0"), "{error}");
        assert!(error.to_string().contains("building panicked: shy"), "{error}");
    });
}
