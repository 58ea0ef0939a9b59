//! Checks what types cannot: values that are well-formed and make no sense.

use std::collections::BTreeSet;

use multiaddr::{Multiaddr, Protocol};
use skep_expert::ExpertPattern;
use skep_wire::ExpertUid;
use tracing_subscriber::EnvFilter;

use super::{Config, Experts, Limits, Node};
use crate::runtime::peer_of;

/// A value that makes no sense.
#[derive(Debug, PartialEq)]
pub struct Bad {
    /// Dotted path of the key.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

fn bad(path: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Result<(), Bad> {
    Err(Bad { path: path.into(), problem: problem.into(), remedy: remedy.into() })
}

/// Names that `expert_cls` takes.
pub const EXPERT_CLASSES: &[&str] = &["ffn", "transformer", "nop", "nop_delay", "det_dropout"];
/// Names that `optimizer` takes.
pub const OPTIMIZERS: &[&str] = &["sgd", "adam", "adamw", "none"];
/// Names that `scheduler` takes.
pub const SCHEDULERS: &[&str] = &["none", "linear"];
/// Names that `compression` takes.
pub const COMPRESSIONS: &[&str] =
    &["NONE", "MEANSTD_16BIT", "FLOAT16", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT"];
/// Names that `log.format` takes.
pub const LOG_FORMATS: &[&str] = &["text", "json"];

/// Finds the first value that makes no sense.
pub fn check(config: &Config) -> Result<(), Bad> {
    node(config)?;
    numbers(config)?;
    log(config)?;
    for (i, experts) in config.experts.iter().enumerate() {
        group(&format!("experts.{i}"), experts)?;
        uids(&format!("experts.{i}"), experts, config)?;
    }
    Ok(())
}

fn node(config: &Config) -> Result<(), Bad> {
    if config.node.host_maddrs.is_empty() {
        return bad("node.host_maddrs", "no address to listen on", "give one, as in \"/ip4/127.0.0.1/tcp/0\"");
    }
    for address in &config.node.initial_peers {
        if peer_of(address).is_none() {
            return bad(
                "node.initial_peers",
                format!("{address} does not say which peer is there"),
                "end it with /p2p/ and the peer id, as the other node prints it when it is ready",
            );
        }
    }
    threads(&config.node)
}

/// Whether the network leaves the machine to others.
fn threads(node: &Node) -> Result<(), Bad> {
    if !(1..=256).contains(&node.network_threads) {
        return bad("node.network_threads", "must be from 1 to 256", "leave the key out to use its default");
    }
    if !(0.0..=0.01).contains(&node.busy_poll) {
        let text = format!("{} is no number of seconds from 0 to 0.01", node.busy_poll);
        return bad("node.busy_poll", text, "give seconds, as in 0.0001");
    }
    Ok(())
}

fn log(config: &Config) -> Result<(), Bad> {
    one_of("log.format", &config.log.format, LOG_FORMATS)?;
    match EnvFilter::try_new(&config.log.filter) {
        Ok(_) => Ok(()),
        Err(error) => bad(
            "log.filter",
            format!("{:?} is no filter: {error}", config.log.filter),
            "give a level, or levels by crate, as in \"info,skep_net=debug\"",
        ),
    }
}

/// Whether only this machine reaches an address.
pub fn is_loopback(address: &Multiaddr) -> bool {
    address.iter().any(|part| match part {
        Protocol::Ip4(ip) => ip.is_loopback(),
        Protocol::Ip6(ip) => ip.is_loopback(),
        Protocol::Memory(_) => true,
        _ => false,
    })
}

fn numbers(config: &Config) -> Result<(), Bad> {
    let server = &config.server;
    let positive = [
        ("dht.wait_timeout", config.dht.wait_timeout),
        ("dht.refresh_period", config.dht.refresh_period),
        ("server.max_wait", server.max_wait),
        ("server.update_period", server.update_period),
        ("server.checkpoint_period", server.checkpoint_period),
        ("server.expiration", server.expiration.unwrap_or(1.0)),
        ("server.stats_report_interval", server.stats_report_interval.unwrap_or(1.0)),
        ("limits.legacy_deadline", config.limits.legacy_deadline),
        ("http.request_timeout", config.http.request_timeout),
    ];
    for (path, seconds) in positive {
        if !(seconds > 0.0 && seconds <= 1e9) {
            return bad(path, format!("{seconds} is no number of seconds above 0"), "give seconds, as in 30.0");
        }
    }
    let counts = [
        ("dht.bucket_size", config.dht.bucket_size),
        ("dht.num_replicas", config.dht.num_replicas),
        ("dht.num_workers", config.dht.num_workers),
        ("server.keep_checkpoints", server.keep_checkpoints),
        ("server.max_batch_size", server.max_batch_size as usize),
        ("limits.max_inbound_calls", config.limits.max_inbound_calls),
        ("limits.max_inbound_bytes", config.limits.max_inbound_bytes),
        ("limits.max_answer_bytes", config.limits.max_answer_bytes),
        ("limits.max_body_bytes", config.limits.max_body_bytes),
        ("limits.max_connections", config.limits.max_connections as usize),
        ("limits.mailbox_bytes", config.limits.mailbox_bytes),
        ("limits.dht_records", config.limits.dht_records),
        ("limits.dht_bytes", config.limits.dht_bytes),
        ("http.max_connections", config.http.max_connections),
    ];
    for (path, count) in counts {
        if count == 0 {
            return bad(path, "must be at least 1", "leave the key out to use its default");
        }
    }
    if server.min_batch_size > server.max_batch_size {
        return bad(
            "server.min_batch_size",
            format!("{} is above server.max_batch_size {}", server.min_batch_size, server.max_batch_size),
            "lower it, or raise max_batch_size",
        );
    }
    bodies(&config.limits)
}

/// Whether the largest body fits the memory for all of them.
fn bodies(limits: &Limits) -> Result<(), Bad> {
    let body = limits.max_body_bytes;
    if u32::try_from(body).is_err() {
        return bad("limits.max_body_bytes", format!("{body} is 4 GiB or more"), "give at most 4294967295");
    }
    for (key, bytes) in [("max_inbound_bytes", limits.max_inbound_bytes), ("max_answer_bytes", limits.max_answer_bytes)]
    {
        if body > bytes {
            return bad(
                "limits.max_body_bytes",
                format!("{body} is above limits.{key} {bytes}, so that such a body would never fit"),
                format!("lower it, or raise {key}"),
            );
        }
    }
    Ok(())
}

/// Whether it is said which experts to host, once.
fn uids(path: &str, experts: &Experts, config: &Config) -> Result<(), Bad> {
    let at = |key: &str| format!("{path}.{key}");
    let names_none = |experts: &&Experts| {
        experts.expert_pattern.is_none() && experts.expert_uids.is_empty() && experts.num_experts.is_none()
    };
    match (&experts.expert_pattern, experts.expert_uids.len(), experts.num_experts) {
        (None, 0, None) if config.server.checkpoint_dir.is_some() => {
            match config.experts.iter().filter(names_none).count() {
                0 | 1 => Ok(()),
                _ => bad(
                    at("expert_pattern"),
                    "several groups would host whatever has checkpoints",
                    "give all groups but one an expert_pattern or expert_uids",
                ),
            }
        }
        (None, 0, None) => bad(
            at("expert_pattern"),
            "nothing says which experts to host",
            "give expert_pattern = \"expert.[0:5]\", expert_uids = [\"expert.0\"], or num_experts",
        ),
        (Some(_), 1.., _) => {
            bad(at("expert_uids"), "expert_pattern and expert_uids exclude each other", "leave one of them out")
        }
        (None, given @ 1.., Some(wanted)) if given != wanted => {
            bad(at("num_experts"), format!("{wanted}, but {given} uids are given"), "leave num_experts out")
        }
        _ => Ok(()),
    }
}

fn group(path: &str, experts: &Experts) -> Result<(), Bad> {
    let at = |key: &str| format!("{path}.{key}");
    if !is_registered(&experts.expert_cls) {
        one_of(at("expert_cls"), &experts.expert_cls, EXPERT_CLASSES)?;
    }
    script(path, experts)?;
    one_of(at("optimizer"), &experts.optimizer, OPTIMIZERS)?;
    one_of(at("scheduler"), &experts.scheduler, SCHEDULERS)?;
    one_of(at("compression"), &experts.compression, COMPRESSIONS)?;
    if !is_device(&experts.device) {
        return bad(at("device"), format!("{:?} is no device", experts.device), "use cpu, cuda or cuda:0");
    }
    for uid in &experts.expert_uids {
        if let Err(error) = uid.parse::<ExpertUid>() {
            return bad(at("expert_uids"), error.to_string(), "name experts in full, as in \"expert.3\"");
        }
    }
    if let Some(text) = &experts.expert_pattern {
        pattern(path, text, experts.num_experts)?;
    }
    if experts.num_experts == Some(0) {
        return bad(at("num_experts"), "must be at least 1", "leave it out to host all that the pattern names");
    }
    if !(1..=1 << 20).contains(&experts.hidden_dim) {
        return bad(at("hidden_dim"), format!("{} is no width", experts.hidden_dim), "give 1 to 1048576");
    }
    if experts.scheduler == "linear" && experts.num_training_steps.is_none() {
        return bad(
            at("num_training_steps"),
            "the linear schedule needs the number of steps after which it reaches zero",
            "give num_training_steps, or scheduler = \"none\"",
        );
    }
    if let Some(dropout) = experts.dropout {
        if experts.expert_cls != "transformer" {
            return bad(at("dropout"), format!("{} has no dropout to set", experts.expert_cls), "leave it out");
        }
        if !(0.0..1.0).contains(&dropout) {
            return bad(at("dropout"), format!("{dropout} is no probability below 1"), "give 0 to switch it off");
        }
    }
    optimizer(path, experts)?;
    let rates = [("learning_rate", experts.learning_rate), ("clip_grad_norm", experts.clip_grad_norm)];
    for (key, value) in rates {
        if value.is_some_and(|v| !(v > 0.0 && v.is_finite())) {
            return bad(at(key), "must be a number above 0", "leave the key out to use its default");
        }
    }
    Ok(())
}

/// The numbers of an optimizer: each belongs to some, and has a range.
fn optimizer(path: &str, experts: &Experts) -> Result<(), Bad> {
    const MOMENTS: &[&str] = &["adam", "adamw"];
    let within = |value: Option<f64>, below: f64| value.is_none_or(|value| (0.0..below).contains(&value));
    let betas = experts.betas.is_none_or(|(first, second)| within(Some(first), 1.0) && within(Some(second), 1.0));
    let numbers = [
        ("momentum", experts.momentum.is_some(), within(experts.momentum, 1.0), &["sgd"][..], "0 to below 1"),
        ("nesterov", experts.nesterov.is_some(), true, &["sgd"], "true or false"),
        ("betas", experts.betas.is_some(), betas, MOMENTS, "two numbers from 0 to below 1"),
        ("eps", experts.eps.is_some(), within(experts.eps, f64::INFINITY), MOMENTS, "a number of at least 0"),
        (
            "weight_decay",
            experts.weight_decay.is_some(),
            within(experts.weight_decay, f64::INFINITY),
            &["sgd", "adam", "adamw"],
            "a number of at least 0",
        ),
    ];
    for (key, given, in_range, owners, range) in numbers {
        let path = format!("{path}.{key}");
        if given && !owners.contains(&experts.optimizer.as_str()) {
            let text = format!("{} has no {key}", experts.optimizer);
            return bad(path, text, format!("leave it out, or use optimizer = \"{}\"", owners[0]));
        }
        if !in_range {
            return bad(path, "is out of range", format!("give {range}"));
        }
    }
    if experts.nesterov == Some(true) && experts.momentum.unwrap_or(0.0) == 0.0 {
        return bad(format!("{path}.nesterov"), "Nesterov's momentum needs a momentum", "give momentum = 0.9");
    }
    Ok(())
}

/// Whether a program of its own has such a class.
fn is_registered(_class: &str) -> bool {
    #[cfg(feature = "torch")]
    return skep_torch::ModuleSpec::classes().iter().any(|name| name == _class);
    #[cfg(not(feature = "torch"))]
    false
}

/// A TorchScript module needs a description, and nothing else has one.
fn script(path: &str, experts: &Experts) -> Result<(), Bad> {
    let at = |key: &str| format!("{path}.{key}");
    let described = !experts.inputs.is_empty() || !experts.outputs.is_empty();
    if experts.module.is_none() {
        return match described {
            true => {
                bad(at("module"), "inputs and outputs of which module?", "give module = \"file.pt\", or leave them out")
            }
            false => Ok(()),
        };
    }
    if experts.inputs.is_empty() {
        let remedy = "give inputs = [{ dtype = \"float32\", shape = [64] }]";
        return bad(at("inputs"), "what the module takes is not said", remedy);
    }
    if experts.outputs.is_empty() {
        let remedy = "give outputs = [{ dtype = \"float32\", shape = [64] }]";
        return bad(at("outputs"), "what the module gives is not said", remedy);
    }
    let lists = [("inputs", &experts.inputs), ("outputs", &experts.outputs)];
    for (key, tensor) in lists.iter().flat_map(|(key, tensors)| tensors.iter().map(move |tensor| (*key, tensor))) {
        if skep_wire::DType::from_name(&tensor.dtype).is_none() {
            let known = skep_wire::DType::ALL.map(|dtype| dtype.to_string()).join(", ");
            return bad(at(key), format!("no dtype is called {:?}", tensor.dtype), format!("use one of {known}"));
        }
        if let Some(size) = tensor.shape.iter().find(|size| **size < -1 || **size == 0) {
            return bad(at(key), format!("{size} is no size"), "give 1 or more, or -1 for any");
        }
    }
    if experts.outputs.iter().any(|tensor| tensor.name.is_some()) {
        return bad(at("outputs"), "outputs have no names", "leave name out; they are counted in order");
    }
    let mut names = BTreeSet::new();
    for input in &experts.inputs {
        let taken = input.name.as_ref().is_some_and(|name| !names.insert(name));
        if taken || (input.name.is_none() && !names.is_empty()) {
            let remedy = "give inputs without a name first, then each name once";
            return bad(at("inputs"), "inputs in an order that no call has", remedy);
        }
    }
    Ok(())
}

fn pattern(path: &str, text: &str, wanted: Option<usize>) -> Result<(), Bad> {
    let at = |key: &str| format!("{path}.{key}");
    let pattern = match text.parse::<ExpertPattern>() {
        Ok(pattern) => pattern,
        Err(error) => return bad(at("expert_pattern"), error.to_string(), "write a range as in \"expert.[0:5]\""),
    };
    let places = pattern.places();
    match wanted {
        Some(wanted) if wanted as u64 > places => bad(
            at("num_experts"),
            format!("{wanted}, but {text:?} names only {places}"),
            "widen expert_pattern, or host fewer experts",
        ),
        _ => Ok(()),
    }
}

/// Whether a name is one of a device; whether the device is there shows when experts are built.
fn is_device(name: &str) -> bool {
    let number = |text: &str| text.parse::<usize>().is_ok();
    ["cpu", "cuda"].contains(&name) || name.strip_prefix("cuda:").is_some_and(number)
}

fn one_of(path: impl Into<String>, value: &str, names: &[&str]) -> Result<(), Bad> {
    if names.contains(&value) {
        return Ok(());
    }
    bad(path, format!("{value:?} is none of {}", names.join(", ")), format!("use one of {}", names.join(", ")))
}
