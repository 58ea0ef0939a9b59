//! A status as text for Prometheus. Each scrape writes one snapshot into a recorder of its own, so that experts that are
//! gone leave no series behind and nothing in the process is global.

use std::{collections::BTreeMap, fmt::Write as _};

use metrics::{counter, describe_counter, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::PrometheusBuilder;
use skep_dht::DhtStatus;
use skep_expert::{ExpertState, ExpertStatus};
use skep_net::NetStatus;

use crate::Status;

/// The text of `/metrics`.
pub(super) fn render(status: &Status) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    with_local_recorder(&recorder, || {
        set("skep_ready", "1 when the node is ready, 0 when /ready says why not", f64::from(status.ready));
        set("skep_calls_serving", "Calls to experts being served", count(status.calls));
        set("skep_experts", "Hosted experts that are built", count(status.experts.len()));
        network(&status.network);
        dht(&status.dht);
        describe_experts();
        status.experts.iter().for_each(expert);
    });
    let experts = &status.experts;
    let rows = Sizes::of(experts.iter().map(|expert| (&expert.batch_rows[..], expert.rows)));
    let waits = Sizes::of(experts.iter().map(|expert| (&expert.queue_wait_us[..], expert.queue_wait_us_total)));
    recorder.handle().render()
        + &rows.render("skep_batch_rows", "Rows of the batches of all experts", 1.0)
        + &waits.render("skep_queue_wait_seconds", "Waits of tasks in line, of all experts", 1e6)
}

/// Numbers of all experts, counted by powers of two. The recorder makes histograms from single numbers only.
#[derive(Default)]
struct Sizes {
    /// Up to which number, and how often.
    counts: BTreeMap<u64, u64>,
    sum: u64,
}

/// Powers of two that have a bucket; larger numbers are in the last one, without a bound.
const BUCKETS: u32 = 31;

impl Sizes {
    fn of<'a>(each: impl Iterator<Item = (&'a [(u64, u64)], u64)>) -> Self {
        let mut all = Self::default();
        for (counts, sum) in each {
            counts.iter().for_each(|(up_to, count)| *all.counts.entry(*up_to).or_default() += count);
            all.sum += sum;
        }
        all
    }

    /// The text for Prometheus; so many make a unit.
    fn render(&self, name: &str, help: &str, in_a_unit: f64) -> String {
        let mut text = format!("# HELP {name} {help}\n# TYPE {name} histogram\n");
        let mut line = |labels: &str, value: &dyn std::fmt::Display| {
            writeln!(text, "{name}{labels} {value}").expect("strings take everything");
        };
        let mut below = 0;
        for up_to in (0..BUCKETS).map(|size| 1 << size) {
            below += self.counts.get(&up_to).copied().unwrap_or(0);
            line(&format!("_bucket{{le=\"{}\"}}", up_to as f64 / in_a_unit), &below);
        }
        let all: u64 = self.counts.values().sum();
        line("_bucket{le=\"+Inf\"}", &all);
        line("_sum", &(self.sum as f64 / in_a_unit));
        line("_count", &all);
        text + "\n"
    }
}

fn network(net: &NetStatus) {
    set("skep_connections", "Live connections", count(net.connections));
    set("skep_peers_connected", "Peers that are connected", count(net.connected.len()));
    set("skep_peers_known", "Peers in the address book", count(net.peers_known));
    set("skep_peers_ours", "Peers in the address book that speak our protocols", count(net.peers_ours));
    set("skep_peers_banned", "Peers that failed lately and are left alone", count(net.banned.len()));
    set("skep_streams_out", "Streams open at peers", count(net.streams_out));
    add("skep_calls_out_total", "Calls made", net.calls_out);
    add("skep_calls_out_failed_total", "Calls made that brought no answer", net.calls_out_failed);
    add("skep_calls_in_total", "Calls of others that were served", net.calls_in);
    add("skep_calls_in_refused_total", "Calls of others refused at the door", net.calls_in_refused);
    add("skep_calls_in_left_total", "Calls of others whose caller left", net.calls_in_left);
    add("skep_streams_in_refused_total", "Streams of others that were reset", net.streams_in_refused);
}

fn dht(dht: &DhtStatus) {
    set("skep_dht_joined", "1 when the DHT is joined", f64::from(dht.joined));
    set("skep_dht_nodes", "Nodes in the routing table", count(dht.nodes));
    set("skep_dht_records", "Records held for the network", count(dht.records));
    set("skep_dht_record_bytes", "Bytes of records held for the network", count(dht.record_bytes));
    set("skep_dht_cached", "Records in the cache", count(dht.cached));
    set("skep_dht_cached_bytes", "Bytes of records in the cache", count(dht.cached_bytes));
    set("skep_dht_calls", "Calls to other nodes under way", count(dht.calls));
}

fn describe_experts() {
    describe_gauge!("skep_expert_parameters", "Trainable parameters");
    describe_gauge!("skep_expert_serving", "1 when it takes work; /status says why not");
    describe_gauge!("skep_expert_waiting_rows", "Rows in line");
    describe_gauge!("skep_expert_oldest_wait_seconds", "How long the oldest of them has waited");
    describe_gauge!("skep_expert_announced_until_seconds", "Unix time until which its announcement holds");
    describe_counter!("skep_expert_steps_total", "Optimizer steps");
    describe_counter!("skep_expert_forward_tasks_total", "Forward tasks begun");
    describe_counter!("skep_expert_backward_tasks_total", "Backward tasks begun");
    describe_counter!("skep_expert_batches_total", "Batches run");
    describe_counter!("skep_expert_rows_total", "Rows of those batches");
    describe_counter!("skep_expert_failures_total", "Tasks answered with an error of the expert");
    describe_counter!("skep_expert_skipped_total", "Tasks that never ran");
}

fn expert(expert: &ExpertStatus) {
    let labels = || [("uid", expert.uid.clone()), ("class", expert.class.clone())];
    let set = |name: &'static str, value: f64| gauge!(name, &labels()).set(value);
    let add = |name: &'static str, value: u64| counter!(name, &labels()).absolute(value);
    // Exact up to 2^53 parameters.
    set("skep_expert_parameters", expert.parameters as f64);
    set("skep_expert_serving", f64::from(expert.state == ExpertState::Serving));
    set("skep_expert_waiting_rows", expert.waiting_rows.into());
    set("skep_expert_oldest_wait_seconds", expert.oldest_wait_seconds);
    if let Some(until) = expert.announced_until {
        set("skep_expert_announced_until_seconds", until);
    }
    add("skep_expert_steps_total", expert.steps);
    add("skep_expert_forward_tasks_total", expert.forward_tasks);
    add("skep_expert_backward_tasks_total", expert.backward_tasks);
    add("skep_expert_batches_total", expert.batches);
    add("skep_expert_rows_total", expert.rows);
    add("skep_expert_failures_total", expert.failures);
    add("skep_expert_skipped_total", expert.skipped);
}

fn set(name: &'static str, help: &'static str, value: f64) {
    describe_gauge!(name, help);
    gauge!(name).set(value);
}

fn add(name: &'static str, help: &'static str, value: u64) {
    describe_counter!(name, help);
    counter!(name).absolute(value);
}

/// Exact up to 2^53.
fn count(n: usize) -> f64 {
    n as f64
}
