//! Executors on real threads, under real time.

mod common;

use std::time::Duration;

use common::*;
use skep_expert::{HostedExpert, Kind, Server, ServerConfig, ServerParts, Snapshot};
use skep_kernel::{Deadline, SharedClock};
use skep_rpc::ServeError;

fn run<R, F: Future<Output = R>>(test: impl FnOnce(ServerParts, SharedClock) -> F) -> R {
    in_real_time(ServerConfig { executors: 3, max_batch_size: 16, ..Default::default() }, test)
}

#[test]
fn threads_answer_everybody_and_end() {
    run(|parts, clock| async move {
        let soon = |n| Deadline::after(clock.now(), Duration::from_secs(n));
        let hosted = (0..4).map(|i| Closures::echo().hosted(&format!("e.{i}"))).collect();
        let server = Server::new(parts, hosted).unwrap();
        server.ready(soon(60)).await.unwrap();
        let mut calls = Vec::new();
        for i in 0..400u32 {
            let e = expert(&server, &format!("e.{}", i % 4));
            let width = 1 + i as usize % 3;
            let tensor = rows(1 + i as usize % 5, width, i as f32);
            let (kind, tensors) = match i % 2 {
                0 => (Kind::Forward, vec![tensor.clone()]),
                _ => (Kind::Backward, vec![rows(tensor.rows(), width, 0.0), tensor.clone()]),
            };
            let accepted = e.submit_when_room(kind, tensors, soon(60)).await.unwrap();
            calls.push(async move { assert_eq!(accepted.answer().await.unwrap(), [tensor]) });
        }
        futures::future::join_all(calls).await;
        let served: u64 = server.status().experts.iter().map(|e| e.forward_tasks + e.backward_tasks).sum();
        assert_eq!(served, 400);
        server.stop(soon(60)).await.unwrap();
    });
}

#[test]
fn a_panicking_expert_does_not_take_its_thread_along() {
    run(|parts, clock| async move {
        let soon = |n| Deadline::after(clock.now(), Duration::from_secs(n));
        let bad = Closures::echo().on_forward(|_| panic!("boom"));
        let server = Server::new(parts, vec![bad.hosted("e.0"), Closures::echo().hosted("e.1")]).unwrap();
        server.ready(soon(60)).await.unwrap();
        for _ in 0..10 {
            let bad = expert(&server, "e.0").submit(Kind::Forward, vec![rows(1, 2, 0.0)], soon(60)).unwrap();
            assert_eq!(bad.answer().await, Err(ServeError::Internal("forward panicked: boom".to_owned())));
            let good = expert(&server, "e.1").submit(Kind::Forward, vec![rows(1, 2, 0.0)], soon(60)).unwrap();
            good.answer().await.unwrap();
        }
        server.stop(soon(60)).await.unwrap();
    });
}

#[cfg(target_os = "linux")]
#[test]
fn executors_stand_behind_the_threads_that_answer_calls() {
    use rustix::process::getpriority_process;
    run(|parts, clock| async move {
        let soon = |n| Deadline::after(clock.now(), Duration::from_secs(n));
        let own = getpriority_process(None).unwrap();
        let parts = ServerParts { config: ServerConfig { executor_niceness: 3, ..parts.config }, ..parts };
        let telling = Closures::echo().on_forward(|_| Ok(vec![rows(1, 1, getpriority_process(None).unwrap() as f32)]));
        let server = Server::new(parts, vec![telling.hosted("e.0")]).unwrap();
        server.ready(soon(60)).await.unwrap();
        let asked = expert(&server, "e.0").submit(Kind::Forward, vec![rows(1, 1, 0.0)], soon(60)).unwrap();
        assert_eq!(asked.answer().await.unwrap(), [rows(1, 1, (own + 3).min(19) as f32)]);
        assert_eq!(getpriority_process(None).unwrap(), own, "nobody else's changes");
        server.stop(soon(60)).await.unwrap();
    });
}

#[test]
fn a_backend_that_panics_when_dropped_does_not_take_its_thread_along() {
    struct Fragile;
    impl Drop for Fragile {
        fn drop(&mut self) {
            panic!("told to");
        }
    }
    run(|parts, clock| async move {
        let soon = |n| Deadline::after(clock.now(), Duration::from_secs(n));
        let parts = ServerParts { config: ServerConfig { executors: 1, ..parts.config }, ..parts };
        let factory = || {
            let fragile = Fragile;
            let backend = Closures::echo().on_forward(move |batch| {
                let _held = &fragile;
                Ok(batch.inputs.clone())
            });
            Ok(Box::new(backend) as Box<dyn skep_expert::Backend>)
        };
        let bad = HostedExpert { uid: "e.0".parse().unwrap(), factory: Box::new(factory) };
        let server = Server::new(parts, vec![bad, Closures::echo().hosted("e.1")]).unwrap();
        server.ready(soon(60)).await.unwrap();
        for step in 0..3 {
            let empty = Snapshot { step, tensors: vec![] };
            expert(&server, "e.0").reload(empty, soon(60)).await.unwrap();
            let good = expert(&server, "e.1").submit(Kind::Forward, vec![rows(1, 2, 0.0)], soon(60)).unwrap();
            good.answer().await.unwrap();
        }
        server.stop(soon(60)).await.unwrap();
    });
}

#[test]
fn whatever_was_accepted_while_a_server_stops_is_answered() {
    run(|parts, clock| async move {
        let soon = |n| Deadline::after(clock.now(), Duration::from_secs(n));
        let hosted = (0..2).map(|i| Closures::echo().hosted(&format!("e.{i}"))).collect();
        let server = Server::new(parts, hosted).unwrap();
        server.ready(soon(60)).await.unwrap();
        let callers = (0..4).map(|i| {
            let (e, deadline) = (expert(&server, &format!("e.{}", i % 2)), soon(60));
            std::thread::Builder::new().spawn(move || {
                let mut accepted = Vec::new();
                loop {
                    match e.submit(Kind::Forward, vec![rows(1, 1 + i, 0.0)], deadline) {
                        Ok(task) => accepted.push(task),
                        Err(ServeError::Overloaded { .. }) => std::thread::yield_now(),
                        Err(error) => return (accepted, error),
                    }
                }
            })
        });
        let callers: Vec<_> = callers.map(Result::unwrap).collect();
        while server.status().experts.iter().any(|e| e.forward_tasks < 100) {
            actix_rt::task::yield_now().await;
        }
        server.stop(soon(60)).await.unwrap();
        for caller in callers {
            let (accepted, refused) = caller.join().unwrap();
            assert_eq!(refused, ServeError::Stopping);
            for result in answers(accepted).await {
                assert!(matches!(result, Ok(_) | Err(ServeError::Stopping)), "{result:?}");
            }
        }
    });
}
