//! What outlives an expert: checkpoints taken while it serves and when it stops, and put back.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::*;
use skep_expert::{
    Backend, BackendError, Checkpoint, CheckpointId, CheckpointStore, ExpertHandle, ExpertState, HostedExpert, Kind,
    MemoryCheckpoints, Server, ServerConfig, ServerError, StoreError,
};
use skep_kernel::Deadline;
use skep_testkit::{ScriptedBackend, Sim};
use skep_wire::ExpertUid;

const WIDTH: usize = 2;

fn uid(text: &str) -> ExpertUid {
    text.parse().unwrap()
}

/// An expert whose weight goes down by the sum of `x · g` with each step.
fn affine() -> ScriptedBackend {
    ScriptedBackend::affine(100.0, 1.0).of_width(WIDTH)
}

fn hosted(name: &str, backend: ScriptedBackend) -> HostedExpert {
    let factory = move || Ok(Box::new(backend.clone()) as Box<dyn Backend>);
    HostedExpert { uid: uid(name), factory: Box::new(factory) }
}

fn config() -> ServerConfig {
    ServerConfig { checkpoint_period: Duration::from_secs(60), keep_checkpoints: 2, ..ServerConfig::default() }
}

async fn serve(sim: &Sim, store: Arc<dyn CheckpointStore>, experts: Vec<HostedExpert>) -> Server {
    let mut parts = server_parts(sim, config());
    parts.checkpoints = Some(store);
    start_parts(sim, parts, experts).await
}

/// One step: the weight loses 2.
async fn train(sim: &Sim, expert: &ExpertHandle) {
    let pair = vec![rows(1, WIDTH, 1.0), rows(1, WIDTH, 1.0)];
    expert.submit(Kind::Backward, pair, within(sim, 60_000)).unwrap().answer().await.unwrap();
}

async fn weight(sim: &Sim, expert: &ExpertHandle) -> f32 {
    let answer = expert.submit(Kind::Forward, vec![rows(1, WIDTH, 1.0)], within(sim, 60_000)).unwrap().answer().await;
    answer.unwrap()[0].to_f32().unwrap()[0]
}

fn soon(sim: &Sim) -> Deadline {
    Deadline::after(sim.now(), Duration::from_secs(10))
}

fn steps(store: &dyn CheckpointStore, name: &str) -> Vec<u64> {
    let uid = uid(name);
    store.list(&uid).unwrap().iter().map(|id| store.read(&uid, *id).unwrap().snapshot.step).collect()
}

#[test]
fn a_server_that_stops_in_order_loses_no_step() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        let e = expert(&server, "e.0");
        for _ in 0..3 {
            train(&sim, &e).await;
        }
        server.stop(soon(&sim)).await.unwrap();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        let e = expert(&server, "e.0");
        assert_eq!((e.status().steps, e.status().saved_step), (3, Some(3)));
        assert_eq!(weight(&sim, &e).await, 94.0);
    });
}

#[test]
fn a_new_expert_has_a_checkpoint_at_once_and_then_one_a_period_while_it_trains() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let experts = vec![hosted("e.0", affine()), hosted("e.1", affine())];
        let server = serve(&sim, Arc::new(store.clone()), experts).await;
        sim.advance(millis(100)).await;
        assert_eq!(store.experts().unwrap(), [uid("e.0"), uid("e.1")]);
        assert_eq!(steps(&store, "e.0"), [0]);
        train(&sim, &expert(&server, "e.0")).await;
        assert_eq!(steps(&store, "e.0"), [0], "not before the period is over");
        sim.advance(Duration::from_secs(61)).await;
        assert_eq!(steps(&store, "e.0"), [1, 0]);
        sim.advance(Duration::from_secs(600)).await;
        assert_eq!(steps(&store, "e.0"), [1, 0], "nothing new, nothing written");
        assert_eq!(steps(&store, "e.1"), [0]);
        for _ in 0..3 {
            train(&sim, &expert(&server, "e.0")).await;
            sim.advance(Duration::from_secs(60)).await;
        }
        assert_eq!(steps(&store, "e.0"), [4, 3], "the newest two are kept");
    });
}

#[test]
fn what_a_crash_loses_are_the_steps_since_the_last_checkpoint() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        train(&sim, &expert(&server, "e.0")).await;
        sim.advance(Duration::from_secs(61)).await;
        train(&sim, &expert(&server, "e.0")).await;
        // Not stopped: another process takes over with what is on the disk.
        let next = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        assert_eq!(expert(&next, "e.0").status().steps, 1);
        assert_eq!(weight(&sim, &expert(&next, "e.0")).await, 98.0);
    });
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        sim.advance(millis(100)).await;
        train(&sim, &expert(&server, "e.0")).await;
        server.stop(soon(&sim)).await.unwrap();
        assert_eq!(store.list(&uid("e.0")).unwrap(), [CheckpointId(2), CheckpointId(1)]);
        store.damage(&uid("e.0"), CheckpointId(2));
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        assert_eq!(expert(&server, "e.0").status().steps, 0);
        train(&sim, &expert(&server, "e.0")).await;
        train(&sim, &expert(&server, "e.0")).await;
        server.stop(soon(&sim)).await.unwrap();
        let newest = store.list(&uid("e.0")).unwrap()[0];
        assert_eq!(newest, CheckpointId(3), "the damaged one's number is not used again");
        assert_eq!(store.read(&uid("e.0"), newest).unwrap().snapshot.step, 2);
    });
}

/// Why a server that must not start does not.
async fn refused(sim: &Sim, store: &MemoryCheckpoints, experts: Vec<HostedExpert>) -> String {
    let mut parts = server_parts(sim, config());
    parts.checkpoints = Some(Arc::new(store.clone()));
    let executors = skep_expert::Executors::Inline { cost: Arc::new(|_, _, _| millis(1)) };
    let server = Server::with_executors(parts, experts, executors).unwrap();
    let error = server.ready(soon(sim)).await.unwrap_err();
    assert!(matches!(&error, ServerError::Build { uid, .. } if uid.as_str() == "e.0"), "{error}");
    error.to_string()
}

#[test]
fn a_server_does_not_begin_anew_over_checkpoints_that_it_cannot_use() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine())]).await;
        server.stop(soon(&sim)).await.unwrap();
        let wider = refused(&sim, &store, vec![hosted("e.0", ScriptedBackend::affine(100.0, 1.0).of_width(3))]).await;
        assert!(wider.contains("float32 [batch, 2]") && wider.contains("float32 [batch, 3]"), "{wider}");
        let other = refused(&sim, &store, vec![Closures::echo().hosted("e.0")]).await;
        assert!(other.contains("class \"scripted\"") && other.contains("\"closures\""), "{other}");
        store.damage(&uid("e.0"), CheckpointId(1));
        let damaged = refused(&sim, &store, vec![hosted("e.0", affine())]).await;
        assert!(damaged.contains("none of its 1 checkpoints can be read"), "{damaged}");
    });
}

#[test]
fn a_poisoned_expert_goes_on_from_its_newest_good_checkpoint() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        // Batch 1 trains, batch 2 tears the step; a new backend counts its batches anew.
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine().tear_on(2))]).await;
        let e = expert(&server, "e.0");
        sim.advance(millis(100)).await;
        train(&sim, &e).await;
        sim.advance(Duration::from_secs(61)).await;
        assert_eq!(steps(&store, "e.0"), [1, 0]);
        let torn = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], within(&sim, 1000)).unwrap();
        assert!(torn.answer().await.is_err());
        assert!(matches!(e.state(), ExpertState::Poisoned { .. }));
        sim.advance(Duration::from_secs(1)).await;
        assert_eq!(e.state(), ExpertState::Serving);
        assert_eq!((weight(&sim, &e).await, e.status().steps), (98.0, 1));
        sim.advance(Duration::from_secs(600)).await;
        assert_eq!(steps(&store, "e.0"), [1, 0], "the torn state was never written");
    });
}

#[test]
fn a_poisoned_expert_without_a_readable_checkpoint_stays_withdrawn() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine().tear_on(1))]).await;
        let e = expert(&server, "e.0");
        sim.advance(millis(100)).await;
        store.damage(&uid("e.0"), CheckpointId(1));
        let torn = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], within(&sim, 1000)).unwrap();
        assert!(torn.answer().await.is_err());
        sim.advance(Duration::from_secs(3600)).await;
        assert!(matches!(e.state(), ExpertState::Poisoned { .. }));
        server.stop(soon(&sim)).await.unwrap();
        assert_eq!(store.list(&uid("e.0")).unwrap(), [CheckpointId(1)], "its torn state is not saved at the end");
    });
}

#[test]
fn an_expert_that_is_poisoned_again_and_again_stays_withdrawn() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![hosted("e.0", affine().tear_on(1))]).await;
        let e = expert(&server, "e.0");
        sim.advance(millis(100)).await;
        let mut torn = 0;
        while e.state() == ExpertState::Serving && torn < 20 {
            let pair = vec![rows(1, 2, 1.0), rows(1, 2, 1.0)];
            assert!(e.submit(Kind::Backward, pair, within(&sim, 1000)).unwrap().answer().await.is_err());
            torn += 1;
            let state = e.watch_state();
            let revived = state.until(|state| (*state == ExpertState::Serving).then_some(()));
            let _stays = skep_kernel::time::before(&*sim.clock(), soon(&sim), revived).await;
        }
        assert_eq!(torn, 6, "revived five times within a minute");
        sim.advance(Duration::from_secs(3600)).await;
        assert!(matches!(e.state(), ExpertState::Poisoned { .. }));
    });
}

/// A disk that refuses writes while it is told to.
struct Full {
    inner: MemoryCheckpoints,
    refuses: Arc<AtomicBool>,
}

impl CheckpointStore for Full {
    fn experts(&self) -> Result<Vec<ExpertUid>, StoreError> {
        self.inner.experts()
    }
    fn list(&self, uid: &ExpertUid) -> Result<Vec<CheckpointId>, StoreError> {
        self.inner.list(uid)
    }
    fn read(&self, uid: &ExpertUid, id: CheckpointId) -> Result<Checkpoint, StoreError> {
        self.inner.read(uid, id)
    }
    fn write(&self, uid: &ExpertUid, checkpoint: &Checkpoint) -> Result<CheckpointId, StoreError> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(StoreError::Io { what: "write".into(), reason: "no space left".into() });
        }
        self.inner.write(uid, checkpoint)
    }
    fn prune(&self, uid: &ExpertUid, keep: usize) -> Result<(), StoreError> {
        self.inner.prune(uid, keep)
    }
}

#[test]
fn a_full_disk_costs_no_call_and_is_tried_again() {
    Sim::with_seed(1).run(|sim| async move {
        let (inner, refuses) = (MemoryCheckpoints::new(), Arc::new(AtomicBool::new(false)));
        let store = Full { inner: inner.clone(), refuses: refuses.clone() };
        let server = serve(&sim, Arc::new(store), vec![hosted("e.0", affine())]).await;
        sim.advance(millis(100)).await;
        refuses.store(true, Ordering::SeqCst);
        train(&sim, &expert(&server, "e.0")).await;
        sim.advance(Duration::from_secs(61)).await;
        assert_eq!(steps(&inner, "e.0"), [0]);
        assert_eq!(weight(&sim, &expert(&server, "e.0")).await, 98.0);
        refuses.store(false, Ordering::SeqCst);
        sim.advance(Duration::from_secs(61)).await;
        assert_eq!(steps(&inner, "e.0"), [1, 0]);
        train(&sim, &expert(&server, "e.0")).await;
        refuses.store(true, Ordering::SeqCst);
        let error = server.stop(soon(&sim)).await.unwrap_err();
        assert!(matches!(&error, ServerError::Unsaved { uids, .. } if uids == &[uid("e.0")]), "{error}");
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(steps(&inner, "e.0"), [1, 0]);
    });
}

#[test]
fn a_reload_that_fails_leaves_expert_and_checkpoints_as_they_were() {
    Sim::with_seed(1).run(|sim| async move {
        let store = MemoryCheckpoints::new();
        let server = serve(&sim, Arc::new(store.clone()), vec![Closures::echo().hosted("e.0")]).await;
        sim.advance(millis(100)).await;
        let reload = expert(&server, "e.0").reload(Default::default(), soon(&sim)).await;
        assert!(matches!(reload, Err(BackendError::Failed(_))), "its factory works once: {reload:?}");
        assert_eq!(expert(&server, "e.0").state(), ExpertState::Serving);
        assert_eq!(steps(&store, "e.0"), [0]);
    });
}
