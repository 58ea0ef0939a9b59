//! As hivemind's `benchmark_dht.py`: a large network, experts declared in batches by random nodes and looked up by others.

use std::time::Duration;

use rand::{Rng, seq::IndexedRandom};
use skep_dht::Freshness;
use skep_testkit::{Latency, Sim, SimDht};
use skep_wire::{ExpertUid, Method};

use crate::common::*;

/// Experts that are declared or looked up together.
const BATCH: usize = 32;
/// Nodes that join at the same time.
const NEWCOMERS: usize = 50;

#[test]
fn a_large_grid_is_declared_and_found_completely() {
    let watch = Stopwatch::start("9, grid");
    let (nodes, side) = size((60, 16), (1000, 128));
    let told = Sim::with_seed(9).run(|sim| schedule(sim, nodes, side));
    watch.report(told);
    let peak = peak_memory();
    watch.report(format!("{} MB at the most", peak >> 20));
    assert!(!is_soak() || peak < 1 << 30, "{peak} bytes");
}

async fn schedule(sim: Sim, count: usize, side: usize) -> String {
    let random = &mut random(sim.seed());
    sim.network().latency(Latency::uniform(millis(10)..millis(90)));
    let mut nodes: Vec<SimDht> = vec![sim.dht_node(&[])];
    while nodes.len() < count {
        let doors: Vec<_> = nodes.choose_multiple(random, 3).map(SimDht::peer).collect();
        let newcomers: Vec<SimDht> = (0..NEWCOMERS.min(count - nodes.len())).map(|_| sim.dht_node(&doors)).collect();
        for newcomer in &newcomers {
            newcomer.dht().joined(within(&sim, secs(60))).await.unwrap();
        }
        nodes.extend(newcomers);
        sim.advance(secs(1)).await;
    }
    let joined = sim.now();

    let uids = (0..side).flat_map(|i| (0..side).map(move |j| format!("expert.{i}.{j}").parse().unwrap()));
    let uids: Vec<ExpertUid> = uids.collect();
    let expiration = sim.clock().wall() + 20_000.0;
    let (mut store, mut get) = (Vec::new(), Vec::new());
    let mut hosts = Vec::new();
    for batch in uids.chunks(BATCH) {
        let node = nodes.choose(random).unwrap();
        let started = sim.now();
        let stored = node.dht().declare_experts(batch.to_vec(), expiration, within(&sim, secs(60))).await.unwrap();
        assert!(stored.values().all(|stored| *stored), "{stored:?}");
        store.push(sim.now() - started);
        hosts.extend(batch.iter().map(|_| node.peer()));
    }
    for (batch, hosts) in uids.chunks(BATCH).zip(hosts.chunks(BATCH)) {
        let node = &nodes[random.random_range(0..nodes.len())];
        let started = sim.now();
        let found = node.dht().find_experts(batch.to_vec(), Freshness::Valid, within(&sim, secs(60))).await.unwrap();
        get.push(sim.now() - started);
        let found: Vec<_> = found.into_iter().map(|found| found.map(|found| found.value)).collect();
        assert!(found.iter().zip(hosts).all(|(found, host)| *found == Some(*host)), "{found:?} instead of {hosts:?}");
    }
    let methods = [Method::Ping, Method::Store, Method::Find];
    let calls: u64 = methods.iter().map(|method| sim.network().delivered(*method)).sum();
    let [store, get] = [store, get].map(|times| describe(&times));
    let node_hours = count as f64 * (sim.now() - joined).as_secs_f64() / 3600.0;
    format!(
        "{count} nodes, {} experts in batches of {BATCH}: store {store}, get {get} (virtual); {calls} calls, \
         {node_hours:.0} node-hours",
        uids.len()
    )
}

fn describe(times: &[Duration]) -> String {
    let mut times: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    times.sort_by(f64::total_cmp);
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    format!(
        "{mean:.2} s a batch, 95 % within {:.2} s, all within {:.2} s",
        times[times.len() * 95 / 100],
        times[times.len() - 1]
    )
}

/// Most bytes of memory that this process has held; 0 where the system does not tell.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}
