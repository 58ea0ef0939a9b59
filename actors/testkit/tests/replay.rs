//! A run is replayed by its seed.

use std::{process::Command, time::Duration};

use skep_testkit::{Latency, ScriptedBackend, Sim};

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
