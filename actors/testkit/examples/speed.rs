//! How fast simulations run: node-hours of virtual time per second of real time, with a quiet hive and a busy one; also per
//! second of processor time, which says the same on a machine that has other work.
//!
//! `cargo run --release -p skep-testkit --example speed [nodes]`
#![allow(clippy::disallowed_methods, reason = "real time is what is measured here")]

use std::time::{Duration, Instant};

use skep_kernel::Deadline;
use skep_testkit::{Latency, ScriptedBackend, Sim};

fn main() {
    let nodes = std::env::args().nth(1).map_or(100, |text| text.parse().expect("a number of nodes"));
    println!("{nodes} nodes; node-hours of virtual time per second of real time and of processor time");
    report("quiet: DHT nodes that refresh", quiet(nodes));
    report("announcing: every node hosts and announces an expert", announcing(nodes));
    report("busy: a tenth as many clients train without a pause", busy(nodes));
}

/// What one simulation did in which time.
struct Measured {
    node_hours: f64,
    events: u64,
    real: Duration,
    processor: f64,
}

fn report(what: &str, measured: Measured) {
    let Measured { node_hours, events, real, processor } = measured;
    let real = real.as_secs_f64();
    let (per_real, per_processor) = (node_hours / real, node_hours / processor);
    println!("{per_real:>12.1} {per_processor:>12.1}  {what} ({events} events, {real:.2} s, {processor:.2} s)");
}

/// A simulation, the real time and the processor time when its nodes were ready.
struct Start {
    from: skep_kernel::Moment,
    began: Instant,
    processor: f64,
}

impl Start {
    fn now(sim: &Sim) -> Self {
        Self { from: sim.now(), began: Instant::now(), processor: processor_seconds() }
    }

    fn until_now(self, sim: &Sim, nodes: usize) -> Measured {
        let hours = (sim.now() - self.from).as_secs_f64() / 3600.0;
        let (real, processor) = (self.began.elapsed(), processor_seconds() - self.processor);
        Measured { node_hours: hours * nodes as f64, events: sim.trace().events(), real, processor }
    }
}

/// Processor time of this thread; without `/proc` not a number.
fn processor_seconds() -> f64 {
    let ran = std::fs::read_to_string("/proc/thread-self/schedstat");
    let nanos = ran.ok().and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    nanos.map_or(f64::NAN, |nanos| nanos / 1e9)
}

fn quiet(nodes: usize) -> Measured {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let first = sim.dht_node(&[]);
        let others: Vec<_> = (1..nodes).map(|_| sim.dht_node(&[first.peer()])).collect();
        for node in &others {
            node.dht().joined(Deadline::after(sim.now(), Duration::from_secs(60))).await.expect("the first answers");
        }
        let start = Start::now(&sim);
        sim.advance(Duration::from_secs(3600)).await;
        start.until_now(&sim, nodes)
    })
}

fn announcing(nodes: usize) -> Measured {
    Sim::with_seed(2).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let hive = sim.servers(nodes).experts(&*format!("ffn.[0:{nodes}]")).start().await;
        let start = Start::now(&sim);
        sim.advance(Duration::from_secs(600)).await;
        start.until_now(&sim, hive.servers().len() + 1)
    })
}

fn busy(nodes: usize) -> Measured {
    Sim::with_seed(3).run(|sim| async move {
        sim.network().latency(Latency::constant(Duration::from_millis(50)));
        let backend = ScriptedBackend::affine(1.0, 0.01).costing(Duration::from_millis(3));
        let hive = sim.servers(nodes).experts(&*format!("ffn.[0:{nodes}]")).backend(backend).start().await;
        let mut clients = Vec::new();
        for _ in 0..nodes.div_ceil(10) {
            clients.push(sim.client(&hive).moe("ffn.", [nodes]).k_best(4).build().await);
        }
        let start = Start::now(&sim);
        let until = sim.now() + Duration::from_secs(60);
        let training = clients.iter().map(|moe| async {
            while sim.now() < until {
                let out = moe.forward(sim.rows(8, 16)).await.expect("all servers live");
                moe.backward(&out, out.ones()).await.expect("all servers live");
            }
        });
        futures::future::join_all(training).await;
        start.until_now(&sim, nodes + clients.len() + 1)
    })
}
