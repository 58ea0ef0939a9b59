//! Experts on the streams of a device that goes on after a launch, on real threads.

mod common;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use common::*;
use skep_expert::{
    Backend, BackendError, Batch, Device, Executors, Kind, Outcome, Server, ServerConfig, ServerParts, Streams,
};
use skep_kernel::{Deadline, Moment, SharedClock};
use skep_rpc::ServeError;

/// What a device was told, in order.
#[derive(Clone, Debug, PartialEq)]
enum Told {
    Stage,
    Launch,
    Collect,
}

/// A device whose batches take a while after their launch.
#[derive(Clone)]
struct Slow {
    clock: SharedClock,
    run: Duration,
    free_at: Arc<Mutex<Moment>>,
    told: Arc<Mutex<Vec<Told>>>,
    threads: Arc<Mutex<BTreeSet<String>>>,
}

impl Slow {
    fn new(clock: &SharedClock, run: Duration) -> Self {
        let (free_at, told, threads) = Default::default();
        Self { clock: clock.clone(), run, free_at, told, threads }
    }

    fn streams(&self, count: usize) -> Executors {
        let device = self.clone();
        let streams = Streams::new("slow0", count, move || Ok(Slow { free_at: Arc::default(), ..device.clone() }));
        Executors::Placed { place: Box::new(move |_| Some(streams.clone())) }
    }

    fn note(&self, what: Told) {
        self.told.lock().unwrap().push(what);
        self.threads.lock().unwrap().insert(thread::current().name().unwrap_or_default().to_owned());
    }

    fn told(&self) -> Vec<Told> {
        self.told.lock().unwrap().clone()
    }
}

impl Device for Slow {
    type Staged = Batch;
    type Launched = Outcome;
    type Mark = Moment;

    fn stage(&mut self, batch: Batch) -> Batch {
        self.note(Told::Stage);
        batch
    }

    fn launch(&mut self, kind: Kind, staged: Batch, backend: &mut dyn Backend) -> Outcome {
        self.note(Told::Launch);
        let mut free_at = self.free_at.lock().unwrap();
        *free_at = (*free_at).max(self.clock.now()) + self.run;
        drop(free_at);
        match kind {
            Kind::Forward => backend.forward(&staged),
            Kind::Backward => backend.backward(&staged),
        }
    }

    fn record(&mut self) -> Moment {
        *self.free_at.lock().unwrap()
    }

    fn query(&mut self, mark: &Moment) -> bool {
        *mark <= self.clock.now()
    }

    fn collect(&mut self, launched: Outcome) -> Outcome {
        self.note(Told::Collect);
        launched
    }
}

fn run<R, F: Future<Output = R>>(test: impl FnOnce(ServerParts, SharedClock) -> F) -> R {
    in_real_time(ServerConfig { executors: 1, max_batch_size: 1, ..Default::default() }, test)
}

fn soon(clock: &SharedClock) -> Deadline {
    Deadline::after(clock.now(), Duration::from_secs(60))
}

#[test]
fn the_next_batch_is_launched_behind_the_running_one_and_answers_come_in_order() {
    run(|parts, clock| async move {
        let device = Slow::new(&clock, millis(30));
        let server = Server::with_executors(parts, vec![Closures::echo().hosted("e.0")], device.streams(1)).unwrap();
        server.ready(soon(&clock)).await.unwrap();
        let e = expert(&server, "e.0");
        let tasks: Vec<_> =
            (0..4).map(|i| e.submit(Kind::Forward, vec![rows(1, 2, i as f32)], soon(&clock)).unwrap()).collect();
        for (i, answer) in answers(tasks).await.into_iter().enumerate() {
            assert_eq!(answer.unwrap(), [rows(1, 2, i as f32)]);
        }
        let told = device.told();
        let place = |what: Told, nth: usize| {
            told.iter().enumerate().filter(|(_, told)| **told == what).nth(nth).expect("it was told").0
        };
        for nth in 0..4 {
            assert!(
                place(Told::Stage, nth) < place(Told::Launch, nth)
                    && place(Told::Launch, nth) < place(Told::Collect, nth)
            );
        }
        assert!(place(Told::Launch, 1) < place(Told::Collect, 0), "the device is never idle: {told:?}");
        assert!(place(Told::Stage, 2) < place(Told::Collect, 0), "one more is on its way: {told:?}");
        assert!(place(Told::Launch, 2) > place(Told::Collect, 0), "two are in the stream at the most: {told:?}");
        server.stop(soon(&clock)).await.unwrap();
    });
}

#[test]
fn experts_stay_on_one_stream_each_and_threads_end_with_the_server() {
    run(|parts, clock| async move {
        let device = Slow::new(&clock, Duration::ZERO);
        let seen: Arc<Mutex<Vec<BTreeSet<String>>>> = Arc::new(Mutex::new(vec![BTreeSet::new(); 4]));
        let hosted = (0..4).map(|i| {
            let seen = seen.clone();
            let echo = Closures::echo().on_forward(move |batch| {
                seen.lock().unwrap()[i].insert(thread::current().name().unwrap_or_default().to_owned());
                Ok(batch.inputs.clone())
            });
            echo.hosted(&format!("e.{i}"))
        });
        let server = Server::with_executors(parts, hosted.collect(), device.streams(2)).unwrap();
        server.ready(soon(&clock)).await.unwrap();
        for n in 0..80 {
            let e = expert(&server, &format!("e.{}", n % 4));
            let task = e.submit_when_room(Kind::Forward, vec![rows(1, 2, 1.0)], soon(&clock)).await.unwrap();
            task.answer().await.unwrap();
        }
        let seen = seen.lock().unwrap().clone();
        assert!(seen.iter().all(|threads| threads.len() == 1), "{seen:?}");
        let all: BTreeSet<_> = seen.into_iter().flatten().collect();
        assert_eq!(all, BTreeSet::from(["skep-exec-slow0-0".to_owned(), "skep-exec-slow0-1".to_owned()]));
        server.stop(soon(&clock)).await.unwrap();
    });
}

#[test]
fn a_torn_step_poisons_the_expert_and_what_was_launched_behind_it_is_refused() {
    run(|parts, clock| async move {
        let device = Slow::new(&clock, millis(30));
        let torn = Closures::echo().on_backward(|_| Err(BackendError::Torn("half way".to_owned())));
        let hosted = vec![torn.hosted("e.0"), Closures::echo().hosted("e.1")];
        let server = Server::with_executors(parts, hosted, device.streams(1)).unwrap();
        server.ready(soon(&clock)).await.unwrap();
        let e = expert(&server, "e.0");
        let step = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], soon(&clock)).unwrap();
        let behind = e.submit(Kind::Forward, vec![rows(1, 2, 1.0)], soon(&clock)).unwrap();
        for answer in answers([step, behind]).await {
            assert!(matches!(answer, Err(ServeError::Poisoned { .. })), "{answer:?}");
        }
        let other = expert(&server, "e.1").submit(Kind::Forward, vec![rows(1, 2, 1.0)], soon(&clock)).unwrap();
        other.answer().await.unwrap();
        server.stop(soon(&clock)).await.unwrap();
    });
}

#[test]
fn a_panic_at_a_launch_costs_its_own_batch_and_not_the_thread() {
    run(|parts, clock| async move {
        let device = Slow::new(&clock, millis(1));
        let bad = Closures::echo().on_forward(|batch| match contains(batch, 13.0) {
            true => panic!("boom"),
            false => Ok(batch.inputs.clone()),
        });
        let server = Server::with_executors(parts, vec![bad.hosted("e.0")], device.streams(1)).unwrap();
        server.ready(soon(&clock)).await.unwrap();
        let e = expert(&server, "e.0");
        let tasks =
            [1.0, 13.0, 2.0].map(|value| e.submit(Kind::Forward, vec![rows(1, 2, value)], soon(&clock)).unwrap());
        let answers = answers(tasks).await;
        assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
        assert!(matches!(&answers[1], Err(ServeError::Internal(text)) if text.contains("boom")), "{answers:?}");
        server.stop(soon(&clock)).await.unwrap();
    });
}

#[test]
fn a_device_that_is_not_there_is_named_by_the_start() {
    run(|parts, _clock| async move {
        let streams = Streams::new("none0", 1, || Err::<Slow, _>(BackendError::Failed("no such device".to_owned())));
        let executors = Executors::Placed { place: Box::new(move |_| Some(streams.clone())) };
        let refused = Server::with_executors(parts, vec![Closures::echo().hosted("e.0")], executors);
        let error = refused.err().expect("nothing can run").to_string();
        assert!(error.contains("e.0") && error.contains("no such device"), "{error}");
    });
}
