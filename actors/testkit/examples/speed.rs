//! How fast simulations run: node-hours of virtual time per second of real time, with a quiet hive and a busy one.
//!
//! `cargo run --release -p skep-testkit --example speed [nodes]`
#![allow(clippy::disallowed_methods, reason = "real time is what is measured here")]

use std::time::{Duration, Instant};

use skep_kernel::Deadline;
use skep_testkit::{Latency, ScriptedBackend, Sim};

fn main() {
    let nodes = std::env::args().nth(1).map_or(100, |text| text.parse().expect("a number of nodes"));
    println!("{nodes} nodes; node-hours of virtual time per second of real time");
    report("quiet: DHT nodes that refresh", quiet(nodes));
    report("announcing: every node hosts and announces an expert", announcing(nodes));
    report("busy: a tenth as many clients train without a pause", busy(nodes));
}

fn report(what: &str, (node_hours, real, events): (f64, Duration, u64)) {
    let real = real.as_secs_f64();
    println!("{:>12.1}  {what} ({events} events, {real:.2} s)", node_hours / real);
}

/// Node-hours, the real time that they took, and events of the trace.
fn measured(sim: &Sim, nodes: usize, from: skep_kernel::Moment, began: Instant) -> (f64, Duration, u64) {
    let hours = (sim.now() - from).as_secs_f64() / 3600.0;
    (hours * nodes as f64, began.elapsed(), sim.trace().events())
}

fn quiet(nodes: usize) -> (f64, Duration, u64) {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let first = sim.dht_node(&[]);
        let others: Vec<_> = (1..nodes).map(|_| sim.dht_node(&[first.peer()])).collect();
        for node in &others {
            node.dht().joined(Deadline::after(sim.now(), Duration::from_secs(60))).await.expect("the first answers");
        }
        let (from, began) = (sim.now(), Instant::now());
        sim.advance(Duration::from_secs(3600)).await;
        measured(&sim, nodes, from, began)
    })
}

fn announcing(nodes: usize) -> (f64, Duration, u64) {
    Sim::with_seed(2).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let hive = sim.servers(nodes).experts(&*format!("ffn.[0:{nodes}]")).start().await;
        let (from, began) = (sim.now(), Instant::now());
        sim.advance(Duration::from_secs(600)).await;
        measured(&sim, hive.servers().len() + 1, from, began)
    })
}

fn busy(nodes: usize) -> (f64, Duration, u64) {
    Sim::with_seed(3).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let backend = ScriptedBackend::affine(1.0, 0.01).costing(Duration::from_millis(3));
        let hive = sim.servers(nodes).experts(&*format!("ffn.[0:{nodes}]")).backend(backend).start().await;
        let mut clients = Vec::new();
        for _ in 0..nodes.div_ceil(10) {
            clients.push(sim.client(&hive).moe("ffn.", [nodes]).k_best(4).build().await);
        }
        let (from, began) = (sim.now(), Instant::now());
        let until = sim.now() + Duration::from_secs(60);
        let training = clients.iter().map(|moe| async {
            while sim.now() < until {
                let out = moe.forward(sim.rows(8, 16)).await.expect("all servers live");
                moe.backward(&out, out.ones()).await.expect("all servers live");
            }
        });
        futures::future::join_all(training).await;
        measured(&sim, nodes + clients.len() + 1, from, began)
    })
}
