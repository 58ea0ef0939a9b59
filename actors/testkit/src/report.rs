//! What is told of a run that failed.

use std::{fmt::Write, thread};

use crate::Sim;

/// Events that are printed.
const EVENTS: usize = 40;
/// Waits that are printed.
const WAITS: usize = 20;

/// Seed, virtual time, last events, who waits for whom, and how to see it again.
pub(crate) fn report(sim: &Sim) -> String {
    let (trace, seed) = (sim.trace(), sim.seed());
    let nanos = sim.now().as_nanos();
    let mut text = String::from("\n");
    let mut line = |line: String| writeln!(text, "{line}").expect("a string takes everything");
    line(format!(
        "simulation with seed {seed} failed at {}.{:06} s of virtual time, after {} events (hash {:016x})",
        nanos / 1_000_000_000,
        nanos % 1_000_000_000 / 1000,
        trace.events(),
        trace.hash(),
    ));
    let events = trace.last();
    for event in &events[events.len().saturating_sub(EVENTS)..] {
        line(format!("  {event}"));
    }
    let waits = sim.waits();
    for wait in waits.iter().take(WAITS) {
        line(format!("  {wait}"));
    }
    if waits.len() > WAITS {
        line(format!("  and {} calls more", waits.len() - WAITS));
    }
    let nodes = sim.nodes();
    let unwell = nodes.iter().filter(|node| node.health() != crate::Health::Running);
    unwell.for_each(|node| line(format!("  {node:?}")));
    line(format!("replay: SKEP_SEED={seed} cargo test{}", test_name()));
    text
}

/// The name of the test that runs on this thread, as the test harness gives it to its threads.
fn test_name() -> String {
    match thread::current().name() {
        Some(name) if name != "main" => format!(" {name}"),
        _ => String::new(),
    }
}
