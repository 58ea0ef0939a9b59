//! Every benchmark in a tiny form: it ends, says what scripts read, and what it says can be. How fast it was is not asked.

mod common;

use common::skep;
use serde_json::Value;

fn report(args: &[&str]) -> Value {
    let output = skep(&[&["bench"], args, &["--json"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {output:?}"));
    assert!(output.status.success(), "{output:?}");
    report
}

/// The number at a path, as in `latency_us.p50`.
fn number(report: &Value, path: &str) -> f64 {
    let value = path.split('.').fold(report, |value, key| &value[key]);
    value.as_f64().unwrap_or_else(|| panic!("{path} is no number in {report:#}"))
}

fn positive(report: &Value, paths: &[&str]) {
    for path in paths {
        assert!(number(report, path) > 0.0, "{path} in {report:#}");
    }
}

/// Counts by size add up to as many as there were.
fn counted(pairs: &Value) -> u64 {
    let pairs = pairs.as_array().expect("a list of pairs");
    pairs.iter().map(|pair| pair[1].as_u64().expect("a count")).sum()
}

#[test]
fn throughput_of_training_comes_with_its_limit_and_what_the_server_did() {
    let words =
        "throughput --preset ffn_small_batch --backward --hidden 16 --batch 4 --experts 2 --clients 2 --seconds 0.3";
    let report = report(&words.split(' ').collect::<Vec<_>>());
    positive(&report, &["calls", "calls_per_second", "limit.calls_per_second", "of_limit", "server.start_seconds"]);
    assert_eq!(number(&report, "failed"), 0.0, "{report:#}");
    assert_eq!(number(&report, "latency_us.count"), number(&report, "calls"));
    let latencies = ["p50", "p99", "p99_9", "max"].map(|name| number(&report, &format!("latency_us.{name}")));
    assert!(latencies.is_sorted(), "{report:#}");
    let served = &report["server"]["served"];
    assert_eq!(counted(&served["batch_rows"]) as f64, number(served, "batches"));
    // Callers try each expert before they measure, which is before the server is asked.
    assert_eq!(counted(&served["queue_wait_us"]) as f64, 2.0 * number(&report, "calls"), "{report:#}");
    assert_eq!(number(served, "rows"), 8.0 * number(&report, "calls"));
    assert_eq!(report["parameters"]["backward"], true);
}

#[test]
fn throughput_is_measured_over_each_wire_and_security() {
    for (security, wire) in [("noise", "native"), ("tls", "hivemind")] {
        let words = "throughput --preset nop --hidden 16 --batch 1 --experts 1 --clients 1 --in_flight 4 --seconds 0.2";
        let args = words.split(' ').chain(["--security", security, "--wire", wire]).collect::<Vec<_>>();
        let report = report(&args);
        positive(&report, &["calls", "samples_per_second"]);
        assert!(report["limit"].is_null() && report["parameters"]["wire"] == wire, "{report:#}");
    }
}

#[test]
fn a_mixture_makes_one_call_for_each_expert_that_it_chooses() {
    let report =
        report(&"moe --grid 2 2 --k_best 2 --hidden 16 --batch 4 --seconds 0.3".split(' ').collect::<Vec<_>>());
    positive(&report, &["steps", "steps_per_second", "limit.steps_per_second", "chosen_per_step"]);
    assert_eq!((number(&report, "calls_per_chosen"), number(&report, "failed")), (1.0, 0.0), "{report:#}");
}

#[test]
fn nodes_find_what_another_one_stored() {
    let report = report(&["dht", "--num_peers", "3", "--num_experts", "8", "--expert_batch_size", "4"]);
    positive(&report, &["join_seconds", "stores_per_second", "gets_per_second"]);
    assert_eq!((number(&report, "stored"), number(&report, "found")), (8.0, 8.0), "{report:#}");
}

#[test]
fn calls_of_all_sizes_have_bare_streams_beside_them() {
    let report = report(&["network", "--sizes", "1024", "3000000", "--seconds", "0.2"]);
    let sizes = report["sizes"].as_array().expect("a list");
    assert_eq!(sizes.len(), 2);
    for size in sizes {
        positive(size, &["call_us.p50", "tcp_us.p50", "tls_us.p50", "of_tcp", "of_tls"]);
    }
    assert!(number(&sizes[1], "bytes") >= 3_000_000.0);
}

#[test]
fn the_hops_of_a_call_add_up_to_it() {
    let report = report(&["hops", "--seconds", "0.4"]);
    let hops = report["hops_us"].as_object().expect("times by hop");
    let sum: f64 = hops.values().map(|times| times["mean"].as_f64().expect("a mean")).sum();
    let whole = number(&report, "call_us.mean");
    // Times are kept with three digits.
    assert!(hops.len() == 5 && (sum - whole).abs() < 0.01 * whole, "{report:#}");
    positive(&report, &["call_us.p50", "tls_us.p50", "threads_us.p50"]);
}

#[test]
fn a_start_tells_what_the_server_holds() {
    let report = report(&["startup", "--experts", "3", "--hidden", "16", "--idle", "0.2"]);
    positive(&report, &["start_seconds", "limit.seconds", "used.rss", "used.threads"]);
    assert_eq!(number(&report, "weight_bytes"), 3.0 * 4.0 * (8.0 * 256.0 + 7.0 * 16.0));
}
