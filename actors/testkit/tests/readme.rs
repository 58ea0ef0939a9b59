//! The README's test is a test.

use std::time::Duration;

use skep_testkit::{Latency, ScriptedBackend, Sim};

#[test]
fn a_mixture_keeps_its_deadline_when_servers_die() {
    let millis = Duration::from_millis;
    Sim::with_seed(0xBEE).run(|sim| async move {
        sim.network().latency(Latency::uniform(millis(20)..millis(80))).loss(0.01);
        let expert = ScriptedBackend::scale(2.0).costing(millis(3));
        let hive = sim.servers(20).experts("ffn.[0:5].[0:4]").backend(expert).start().await;
        let moe = sim.client(&hive).moe("ffn.", [5, 4]).k_best(4).k_min(2);
        let moe = moe.forward_timeout(millis(500)).build().await;
        moe.forward(sim.rows(8, 64)).await.expect("all servers live");
        hive.pick(5).kill();
        hive.pick(2).freeze();
        let start = sim.now();
        let out = moe.forward(sim.rows(8, 64)).await.expect("two answers for every row");
        assert!(sim.now() - start <= millis(500));
        assert!(out.responders_per_row().all(|n| (2..=4).contains(&n)));
    }); // fails, too, if an actor, a task or a timer is left
}

#[test]
fn the_readme_shows_the_test_above() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let blocks = readme.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("rust\n"));
    let shown = blocks.filter(|block| block.contains("Sim::with_seed")).collect::<Vec<_>>();
    let [shown] = shown.as_slice() else { panic!("the README shows one simulated test, not {}", shown.len()) };
    assert!(include_str!("readme.rs").contains(shown), "the README's test is not the one in this file");
    assert!(shown.lines().count() <= 25);
}
