//! What a test leaves behind fails it, and misuse of a simulation is reported.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use actix::{Actor, Context};
use futures::future::pending;
use skep_kernel::Deadline;
use skep_rpc::{Body, Call, Meta, RequestId, Router, Transport};
use skep_testkit::{Setup, Sim};
use skep_wire::Method;

/// The message with which a run panics.
fn failure<F: Future<Output = ()>>(setup: Setup, test: impl Fn(Sim) -> F) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| setup.run(test))).expect_err("the run fails");
    panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap()
}

#[test]
fn a_task_that_is_left_is_named_with_where_it_was_started() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        sim.spawner().spawn(pending());
    });
    assert!(text.contains("a task of the test, started at actors/testkit/tests/leaks.rs:"), "{text}");
}

#[test]
fn a_task_that_is_left_in_a_node_is_named_with_its_node() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        let hive = sim.servers(1).experts("m.0").start().await;
        let client = sim.client(&hive).await;
        let clock = client.clock.clone();
        client.spawner.spawn(async move { clock.sleep_until(clock.now() + Duration::from_secs(10_000)).await });
    });
    assert!(text.contains("client 3, started at actors/testkit/tests/leaks.rs:"), "{text}");
    assert!(text.contains("a task started at actors/testkit/tests/leaks.rs:") && text.contains("1 timers"), "{text}");
}

struct Idle;

impl Actor for Idle {
    type Context = Context<Self>;
}

#[test]
fn an_actor_that_is_left_is_noticed_until_leaks_are_allowed() {
    let test = |_sim| async {
        std::mem::forget(Idle.start());
    };
    let text = failure(Sim::with_seed(1), test);
    assert!(text.contains("an actor or a task that the test started outside of all nodes"), "{text}");
    Sim::with_seed(1).allow_leaks().run(test);
}

#[test]
fn an_actor_that_is_left_is_named_with_where_it_was_started() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        std::mem::forget(sim.start_actor(Idle));
    });
    assert!(text.contains("an actor leaks::Idle, started at actors/testkit/tests/leaks.rs:"), "{text}");
    let text = failure(Sim::with_seed(1), |sim| async move {
        let _idle = sim.start_actor(Idle);
        sim.assert_quiet().await;
    });
    assert!(text.contains("an actor leaks::Idle, started at"), "{text}");
    Sim::with_seed(1).run(|sim| async move { drop(sim.start_actor(Idle)) });
}

#[test]
fn a_call_that_is_left_is_told_with_caller_and_callee() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        let (server, client) = (sim.network().node(Router::new()), sim.network().client());
        sim.network().freeze(server.local_peer());
        let deadline = Deadline::after(sim.now(), Duration::from_secs(1_000_000));
        let meta = Meta { deadline, request_id: RequestId(1), trace: None };
        let body = Body::Message(Default::default());
        let call = client.call(Call { peer: server.local_peer(), method: Method::Ping, body, meta });
        sim.spawner().spawn(async move { drop(call.await) });
        sim.advance(Duration::from_secs(1)).await;
    });
    assert!(text.contains("node 2 waits since") && text.contains("rpc_ping of node 1"), "{text}");
}

#[test]
fn what_is_to_be_done_at_the_end_is_done() {
    Sim::with_seed(1).run(|sim| async move {
        let dht = {
            let transport = Arc::new(sim.network().node(Router::new()));
            skep_dht::Dht::start_unsupervised(skep_dht::DhtParts {
                transport,
                router: Router::new(),
                bans: skep_rpc::Bans::new(),
                clock: sim.clock(),
                seed: 1,
                config: skep_dht::DhtConfig::default(),
                initial_peers: Vec::new(),
            })
        };
        let ending = dht.clone();
        sim.at_end(async move { ending.stop().await });
        sim.advance(Duration::from_secs(1)).await;
        sim.assert_quiet().await;
    });
}

#[test]
fn nothing_of_a_simulation_stays_in_memory() {
    // Everything in a simulation holds its clock.
    let clock = Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(5).experts("m.[0:5]").with_checkpoints().start().await;
        let moe = sim.client(&hive).moe("m.", [5]).k_best(2).build().await;
        moe.forward(sim.rows(1, 4)).await.expect("all servers live");
        hive.pick(1).kill();
        hive.pick(1).freeze();
        hive.pick(1).crash();
        hive.pick(1).bounce();
        Arc::downgrade(&sim.clock())
    });
    assert!(clock.upgrade().is_none());
}

#[test]
fn a_deadlock_ends_with_who_waits_for_whom() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        let (server, client) = (sim.network().node(Router::new()), sim.network().client());
        sim.network().hold(server.local_peer(), client.local_peer());
        let deadline = Deadline::at(skep_kernel::Moment::from_nanos(u64::MAX / 2));
        let meta = Meta { deadline, request_id: RequestId(1), trace: None };
        let body = Body::Message(Default::default());
        let _answer = client.call(Call { peer: server.local_peer(), method: Method::Ping, body, meta }).await;
    });
    assert!(text.contains("deadlock") && text.contains("rpc_ping of node 1"), "{text}");
    let text = failure(Sim::with_seed(1), |_sim| pending());
    assert!(text.contains("deadlock") && text.contains("no call is under way"), "{text}");
}

#[test]
fn a_test_ends_at_its_time_limit() {
    let limit = Sim::with_seed(1).time_limit(Duration::from_secs(300));
    let text = failure(limit, |sim| async move {
        let _busy = sim.servers(1).experts("m.0").start().await;
        pending().await
    });
    assert!(text.contains("not done after 300s"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
#[allow(clippy::disallowed_methods, reason = "this is the misuse")]
fn a_thread_that_sleeps_in_a_node_is_noticed() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        let hive = sim.servers(1).experts("m.0").start().await;
        let client = sim.client(&hive).await;
        client.spawner.spawn(async { std::thread::sleep(Duration::from_millis(300)) });
        sim.advance(Duration::from_millis(1)).await;
    });
    assert!(text.contains("node 3 waited") && text.contains("of real time"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_wait_for_another_thread_is_noticed() {
    let text = failure(Sim::with_seed(1), |_sim| async move {
        let (done, result) = tokio::sync::oneshot::channel();
        let slow = move || {
            std::thread::park_timeout(Duration::from_millis(300));
            done.send(()).unwrap();
        };
        std::thread::Builder::new().name("slow".into()).spawn(slow).unwrap();
        result.await.unwrap();
    });
    assert!(text.contains("the test waited") || text.contains("deadlock"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_wait_for_a_real_socket_is_noticed() {
    let text = failure(Sim::with_seed(1), |_sim| async move {
        let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = door.local_addr().unwrap();
        let late = move || {
            std::thread::park_timeout(Duration::from_millis(300));
            drop(std::net::TcpStream::connect(address));
        };
        std::thread::Builder::new().name("late".into()).spawn(late).unwrap();
        drop(door.accept().unwrap());
    });
    assert!(text.contains("the test waited") && text.contains("a real socket inside a simulation"), "{text}");
    let text = failure(Sim::with_seed(1), |_sim| async move {
        let door = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        drop(door.accept().await.unwrap());
    });
    assert!(text.contains("deadlock") && text.contains("a real socket"), "{text}");
}

#[test]
fn a_panic_in_a_task_of_the_test_fails_it() {
    let text = failure(Sim::with_seed(1), |sim| async move {
        sim.spawner().spawn(async { panic!("in a task") });
        sim.advance(Duration::from_secs(1)).await;
    });
    assert!(text.contains("in a task"), "{text}");
}
