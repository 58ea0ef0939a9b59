//! A run is replayed by its seed.

use std::{process::Command, time::Duration};

use skep_expert::{ExpertHandle, ExpertState};
use skep_kernel::{Deadline, Phase, Shutdown};
use skep_rpc::{Body, Call, Meta, RequestId, TensorBody, Transport};
use skep_testkit::{Latency, ScriptedBackend, Sim};
use skep_wire::{Compression, Method, compression::compress};

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A hive that goes through every kind of hardship; the hash of all that happened and how often experts stepped.
fn hard_times(seed: u64) -> (u64, u64, Vec<u64>) {
    Sim::with_seed(seed).run(|sim| async move {
        let backend = ScriptedBackend::affine(1.0, 0.01).costing(millis(3)).costing_per_row(millis(1));
        let hive = sim.servers(4).experts("ffn.[0:2].[0:3]").backend(backend).with_checkpoints().start().await;
        let moe = sim.client(&hive).moe("ffn.", [2, 3]).k_best(3).forward_timeout(millis(900));
        let moe = moe.backward_timeout(millis(900)).build().await;
        sim.network().latency(Latency::exponential(millis(20))).jitter(millis(5)).loss(0.03).duplication(0.1);
        sim.network().reordering(0.2, millis(50)).reset(0.02).refusal(0.02).bandwidth(1_000_000);
        for round in 0..4 {
            match round {
                1 => _ = hive.pick(1).bounce(),
                2 => _ = hive.pick(1).freeze(),
                3 => {
                    // Many calls wait for the frozen one by now.
                    hive.nodes().thaw();
                    hive.pick(1).kill();
                }
                _ => _ = hive.pick(1).slow(5.0),
            }
            if let Ok(out) = moe.forward(sim.rows(4, 8)).await {
                let _whoever_answers = moe.backward(&out, out.ones()).await;
            }
            sim.advance(millis(700)).await;
        }
        let steps = hive.servers().iter().flat_map(|server| server.server().experts()).map(|e| e.status().steps);
        (sim.trace().hash(), sim.trace().events(), steps.collect())
    })
}

#[test]
fn the_same_seed_gives_the_same_hash_and_another_seed_another_one() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let first = hard_times(seed);
        assert_eq!(first, hard_times(seed), "seed {seed}");
        assert!(first.1 > 100, "hardly anything happened: {} events", first.1);
        hashes.insert(first.0);
    }
    assert_eq!(hashes.len(), 100);
}

/// Eight wait for each thing that actors tell to whoever wants to know; the hash of who was told when.
fn many_wait(seed: u64) -> (u64, u64) {
    Sim::with_seed(seed).run(|sim| async move {
        sim.network().latency(Latency::exponential(millis(20)));
        let backend = ScriptedBackend::affine(1.0, 0.01).costing(millis(50));
        let hive = sim.servers(1).experts("m.0").backend(backend).start().await;
        let (server, node) = (&hive.servers()[0], sim.dht_node(hive.initial_peers()));
        server.node().bounce();
        let (dht, hosting, shutdown, client) = (node.dht(), server.server(), Shutdown::new(), sim.network().client());
        let soon = Deadline::after(sim.now(), Duration::from_secs(60));
        for n in 0..8 {
            let (dht, hosting, shutdown) = (dht.clone(), hosting.clone(), shutdown.clone());
            wait(&sim, format!("joined, {n}"), async move { dht.joined(soon).await.is_ok() });
            wait(&sim, format!("ready, {n}"), async move { hosting.ready(soon).await.is_ok() });
            wait(&sim, format!("shut down, {n}"), async move {
                shutdown.reached(Phase::Drain).await;
                true
            });
        }
        hosting.ready(soon).await.unwrap();
        // One request, repeated while it runs.
        let pair = [sim.rows(1, 4), sim.rows(1, 4)].map(|tensor| compress(&tensor, Compression::None).unwrap());
        let body = Body::Tensors(TensorBody { uid: "m.0".to_owned(), tensors: pair.into() });
        let meta = Meta { deadline: soon, request_id: RequestId(7), trace: None };
        let call = Call { peer: server.peer(), method: Method::Backward, body, meta };
        for n in 0..8 {
            let answer = client.call(call.clone());
            wait(&sim, format!("answered, {n}"), async move { answer.await.is_ok() });
            wait(&sim, format!("stopped, {n}"), stopped(hosting.expert(&"m.0".parse().unwrap()).unwrap()));
        }
        sim.advance(Duration::from_secs(10)).await;
        let clock = sim.clock();
        assert_eq!(shutdown.run(&clock, soon).await, []);
        server.node().stop(soon).await.unwrap();
        sim.advance(millis(1)).await;
        (sim.trace().hash(), sim.trace().events())
    })
}

async fn stopped(expert: ExpertHandle) -> bool {
    expert.watch_state().until(|state| (*state == ExpertState::Stopped).then_some(true)).await
}

/// Notes when one of those who wait is told.
fn wait(sim: &Sim, what: String, wait: impl Future<Output = bool> + Send + 'static) {
    let noting = sim.clone();
    let waiting = async move {
        assert!(wait.await, "{what}");
        noting.note(what);
    };
    assert!(sim.spawner().spawn(waiting));
}

#[test]
fn many_who_wait_for_the_same_are_told_in_the_same_order_in_each_run_of_a_seed() {
    for seed in 0..100 {
        let first = many_wait(seed);
        assert_eq!(first, many_wait(seed), "seed {seed}");
    }
}

/// Runs one of the tests below in a process of its own; whether it succeeded and what it printed.
fn run(test: &str, variables: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env_remove("SKEP_SEED").env_remove("SKEP_SEEDS");
    command.env("RUST_BACKTRACE", "0").envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[test]
#[ignore = "run by the tests beside it"]
fn fails_with_seed_1005() {
    Sim::with_seed(1000).run(|sim| async move {
        println!("ran {}", sim.seed());
        let _hive = sim.servers(1).experts("m.0").start().await;
        sim.advance(Duration::from_secs(100)).await;
        sim.note("about to decide");
        assert_ne!(sim.seed(), 1005, "unlucky seed");
    });
}

#[test]
fn the_environment_names_a_seed_or_asks_for_many() {
    let (passed, text) = run("fails_with_seed_1005", &[]);
    assert!(passed && text.contains("ran 1000") && !text.contains("ran 1001"), "{text}");
    let (passed, text) = run("fails_with_seed_1005", &[("SKEP_SEED", "0x3ed")]);
    assert!(!passed && text.contains("ran 1005"), "{text}");
    let (passed, text) = run("fails_with_seed_1005", &[("SKEP_SEEDS", "5")]);
    assert!(passed && text.contains("ran 1004"), "{text}");
    let (passed, text) = run("fails_with_seed_1005", &[("SKEP_SEEDS", "50")]);
    assert!(!passed && text.contains("ran 1005") && !text.contains("ran 1006"), "{text}");
}

#[test]
fn a_failure_tells_seed_time_last_events_and_how_to_see_it_again() {
    let (passed, text) = run("fails_with_seed_1005", &[("SKEP_SEED", "1005")]);
    assert!(!passed);
    for part in [
        "unlucky seed",
        "simulation with seed 1005 failed at 100.",
        "about to decide",
        "rpc_store of node",
        "replay: SKEP_SEED=1005 cargo test fails_with_seed_1005",
    ] {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
}

#[test]
fn logs_of_the_code_under_test_are_events_of_the_trace() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(1).experts("m.0").start().await;
        let joined = |event: &skep_testkit::Event| event.to_string().contains("INFO: joined the DHT");
        let number = hive.servers()[0].node().number();
        assert!(sim.trace().last().iter().any(|event| joined(event) && event.node == number));
    });
}
