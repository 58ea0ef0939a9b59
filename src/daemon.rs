//! From a configuration to a running node, until a signal ends it.

use std::{
    io::{IsTerminal, Write},
    path::Path,
    str::FromStr,
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use libp2p_identity::PeerId;
use skep_kernel::Moment;
#[cfg(feature = "torch")]
use skep_torch::Schedule;
#[cfg(feature = "torch")]
use skep_wire::Compression;

use crate::{
    Runtime, RuntimeBuilder,
    config::{Config, validate::is_loopback},
    error::Error,
    http,
};

/// What runs when a signal comes may go on so long. The last steps take up to a second more: 5 s in all are promised.
const STOP_WITHIN: Duration = Duration::from_millis(3800);
/// How often a node that is not ready yet looks for a signal.
const LOOK: Duration = Duration::from_millis(200);
/// Seconds between words about what a node that is not ready yet waits for.
const PROGRESS: f64 = 5.0;

/// A node without experts.
pub fn node(config: &Config) -> Result<RuntimeBuilder, Error> {
    raise_file_limit();
    let mut builder = Runtime::builder().initial_peers(config.node.initial_peers.clone());
    if let Some(path) = &config.node.identity_path {
        builder = builder.identity_file(path);
    }
    let net = builder.net_config();
    net.listen = config.node.host_maddrs.clone();
    net.announce = config.node.announce_maddrs.clone();
    net.allow_peers = config.node.allow_peers.as_deref().map(read_peers).transpose()?;
    (net.native, net.tls) = (config.node.native, config.node.tls);
    net.threads = config.node.network_threads;
    net.busy_poll = Duration::from_secs_f64(config.node.busy_poll);
    net.limits.max_inbound_calls = config.limits.max_inbound_calls;
    net.limits.max_inbound_bytes = config.limits.max_inbound_bytes;
    net.limits.max_answer_bytes = config.limits.max_answer_bytes;
    net.limits.max_body_bytes = config.limits.max_body_bytes;
    net.limits.max_connections = config.limits.max_connections as usize;
    net.limits.reserved_connections = net.limits.max_connections / 2;
    net.timeouts.legacy_deadline = Duration::from_secs_f64(config.limits.legacy_deadline);
    let dht = builder.dht_config();
    dht.bucket_size = config.dht.bucket_size;
    dht.num_replicas = config.dht.num_replicas;
    dht.num_workers = config.dht.num_workers;
    dht.wait_timeout = config.dht.wait_timeout;
    dht.update_period = config.server.update_period;
    dht.expiration = config.server.expiration;
    dht.max_records = config.limits.dht_records;
    dht.max_record_bytes = config.limits.dht_bytes;
    if config.node.host_maddrs.iter().any(|address| !is_loopback(address)) && config.node.allow_peers.is_none() {
        let risk = if config.experts.is_empty() { "store records" } else { "train the experts" };
        tracing::warn!("listening beyond loopback: whoever reaches these addresses can {risk} here");
    }
    Ok(builder)
}

/// A node that hosts what `[[experts]]` names.
#[cfg(feature = "torch")]
pub fn server(config: &Config) -> Result<RuntimeBuilder, Error> {
    skep_torch::process::tune(&skep_torch::process::Tuning::default())
        .map_err(|error| Error::Invalid(error.to_string()))?;
    let mut builder = node(config)?;
    let server = builder.server_config();
    server.min_batch_size = config.server.min_batch_size;
    server.max_batch_size = config.server.max_batch_size;
    server.max_wait = Duration::from_secs_f64(config.server.max_wait);
    server.executors = config.server.executors;
    server.executor_niceness = config.server.executor_niceness;
    server.check_finite = config.server.check_finite;
    server.mailbox_rows = config.limits.mailbox_rows;
    server.mailbox_bytes = config.limits.mailbox_bytes;
    server.legacy_deadline = Duration::from_secs_f64(config.limits.legacy_deadline);
    server.checkpoint_period = Duration::from_secs_f64(config.server.checkpoint_period);
    server.keep_checkpoints = config.server.keep_checkpoints;
    if let Some(path) = &config.server.checkpoint_dir {
        builder = builder.checkpoint_dir(path);
    }
    for group in &config.experts {
        builder = builder.host(experts(group)?);
    }
    Ok(builder)
}

/// The experts of a group.
#[cfg(feature = "torch")]
pub(crate) fn experts(group: &crate::config::Experts) -> Result<crate::Experts, Error> {
    use crate::Experts;

    let experts = match (&group.expert_pattern, group.num_experts) {
        (Some(pattern), _) => Experts::pattern(pattern),
        (None, Some(count)) if group.expert_uids.is_empty() => Experts::numbered(count),
        (None, None) if group.expert_uids.is_empty() => Experts::from_checkpoints(),
        (None, _) => {
            let uids = group.expert_uids.iter().map(|uid| uid.parse()).collect::<Result<Vec<_>, _>>();
            Experts::uids(uids.map_err(|error: skep_wire::UidError| Error::Invalid(error.to_string()))?)
        }
    };
    let experts = match group.num_experts {
        Some(count) => experts.count(count),
        None => experts,
    };
    let invalid = |error: skep_torch::Error| Error::Invalid(error.to_string());
    let width = usize::try_from(group.hidden_dim).expect("checked to be a width");
    let mut module = match &group.module {
        Some(path) => script(path, group),
        None => skep_torch::ModuleSpec::named(&group.expert_cls, width).map_err(invalid)?,
    };
    if let Some(dropout) = group.dropout {
        module = module.dropout(dropout).map_err(invalid)?;
    }
    let mut optimizer = optimizer(group).map_err(invalid)?;
    if let Some(norm) = group.clip_grad_norm {
        optimizer = optimizer.clip_grad_norm(norm);
    }
    if let (true, Some(total)) = (group.scheduler == "linear", group.num_training_steps) {
        optimizer = optimizer.schedule(Schedule::Linear { warmup_steps: group.num_warmup_steps, total_steps: total });
    }
    let device = skep_torch::parse_device(&group.device).map_err(invalid)?;
    // Here, before anything computes: CUDA can be loaded only before torch is first asked for it.
    skep_torch::check_device(device).map_err(invalid)?;
    let compression = Compression::from_name(&group.compression).expect("checked to be a codec");
    let experts = experts.module(module).optimizer(optimizer).device(device).compression(compression);
    Ok(match group.seed {
        Some(seed) => experts.seed(seed),
        None => experts,
    })
}

#[cfg(feature = "torch")]
fn script(path: &Path, group: &crate::config::Experts) -> skep_torch::ModuleSpec {
    let tensor = |spec: &crate::config::TensorSpec| skep_torch::TensorSpec {
        dtype: spec.dtype.clone(),
        shape: spec.shape.clone(),
    };
    let named = |spec: &crate::config::TensorSpec| Some((spec.name.clone()?, tensor(spec)));
    skep_torch::Script::spec(skep_torch::ScriptSpec {
        path: path.to_owned(),
        inputs: group.inputs.iter().filter(|spec| spec.name.is_none()).map(tensor).collect(),
        keyword_inputs: group.inputs.iter().filter_map(named).collect(),
        outputs: group.outputs.iter().map(tensor).collect(),
    })
}

#[cfg(feature = "torch")]
fn optimizer(group: &crate::config::Experts) -> Result<skep_torch::OptimizerSpec, skep_torch::Error> {
    use skep_torch::Rule;

    let mut optimizer = skep_torch::OptimizerSpec::named(&group.optimizer)?;
    if let Some(rate) = group.learning_rate {
        optimizer = optimizer.learning_rate(rate);
    }
    match &mut optimizer.rule {
        Rule::None => {}
        Rule::Sgd(rule) => {
            rule.momentum = group.momentum.unwrap_or(rule.momentum);
            rule.nesterov = group.nesterov.unwrap_or(rule.nesterov);
            rule.weight_decay = group.weight_decay.unwrap_or(rule.weight_decay);
        }
        Rule::Adam(rule) => {
            rule.betas = group.betas.unwrap_or(rule.betas);
            rule.eps = group.eps.unwrap_or(rule.eps);
            rule.weight_decay = group.weight_decay.unwrap_or(rule.weight_decay);
        }
        Rule::AdamW(rule) => {
            rule.betas = group.betas.unwrap_or(rule.betas);
            rule.eps = group.eps.unwrap_or(rule.eps);
            rule.weight_decay = group.weight_decay.unwrap_or(rule.weight_decay);
        }
    }
    Ok(optimizer)
}

/// Runs a node until a signal: prints its addresses on stdout once it is ready, ends it in order.
pub fn run(builder: RuntimeBuilder, config: &Config, signal: &Receiver<()>) -> Result<(), Error> {
    // Before anything else starts: a taken port leaves nothing behind.
    let listener = config.http.enabled.then(|| http::bind(&config.http)).transpose()?;
    let runtime = builder.launch()?;
    let _page = listener.map(|listener| http::serve(listener, &config.http, runtime.watcher())).transpose()?;
    let ready = become_ready(&runtime, signal)?;
    if ready {
        announce(&runtime)?;
        watch(&runtime, config, signal)?;
    }
    tracing::info!("stopping");
    runtime.stop(STOP_WITHIN)
}

/// Waits for as long as it takes; `false` when a signal came first.
fn become_ready(runtime: &Runtime, signal: &Receiver<()>) -> Result<bool, Error> {
    let mut progress = Every::new(Some(PROGRESS), runtime.now());
    loop {
        match runtime.ready(LOOK) {
            Ok(()) => return Ok(true),
            Err(Error::NotReady { waiting_for, .. }) if progress.is_due(runtime.now()) => {
                tracing::info!("not ready yet: {waiting_for}");
            }
            Err(Error::NotReady { .. }) => {}
            Err(error) => return Err(error),
        }
        if signal.try_recv().is_ok() {
            return Ok(false);
        }
    }
}

fn announce(runtime: &Runtime) -> Result<(), Error> {
    let addresses = runtime.addresses();
    let mut stdout = std::io::stdout().lock();
    for address in &addresses {
        writeln!(stdout, "{address}")
            .map_err(|source| Error::System { what: "cannot write to stdout".into(), source })?;
    }
    stdout.flush().map_err(|source| Error::System { what: "cannot write to stdout".into(), source })?;
    drop(stdout);
    if let (Some(address), true) = (addresses.first(), std::io::stderr().is_terminal()) {
        eprintln!("ready; try from another terminal:");
        match runtime.experts().first() {
            Some(expert) => eprintln!("  skep call {} --peer {address}", expert.uid),
            None => eprintln!("  skep serve --expert_pattern \"expert.[0:5]\" --initial_peers {address}"),
        }
    }
    Ok(())
}

/// Until a signal or a failure that the supervisors could not mend.
fn watch(runtime: &Runtime, config: &Config, signal: &Receiver<()>) -> Result<(), Error> {
    let mut refresh = Every::new(Some(config.dht.refresh_period), runtime.now());
    let mut statistics = Every::new(config.server.stats_report_interval, runtime.now());
    let hosts = !config.experts.is_empty();
    if !hosts {
        report_dht(runtime);
    }
    loop {
        match signal.recv_timeout(LOOK) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(error) = runtime.failure() {
            return Err(error);
        }
        if refresh.is_due(runtime.now()) {
            if !hosts {
                report_dht(runtime);
            }
            runtime.refresh_table();
        }
        if statistics.is_due(runtime.now()) {
            runtime.experts().iter().for_each(|expert| tracing::info!(status = ?expert, "statistics"));
        }
    }
}

/// What `hivemind-dht` reports, too. The table does not hold this node itself.
fn report_dht(runtime: &Runtime) {
    let status = runtime.status();
    let (dht, connections) = (status.dht, status.network.connections);
    tracing::info!(
        nodes = dht.nodes + 1,
        records = dht.records,
        bytes = dht.record_bytes,
        cached = dht.cached,
        connections,
        "nodes in the routing table, this one included, and records held"
    );
}

/// Something that is done again and again.
struct Every(Option<(Duration, Moment)>);

impl Every {
    /// First after one interval; never without one.
    fn new(seconds: Option<f64>, now: Moment) -> Self {
        Self(seconds.map(Duration::from_secs_f64).map(|interval| (interval, now + interval)))
    }

    fn is_due(&mut self, now: Moment) -> bool {
        match &mut self.0 {
            Some((interval, at)) if *at <= now => {
                *at = now + *interval;
                true
            }
            _ => false,
        }
    }
}

/// Many connections need many files; hivemind asks for a flag, here the limit is always raised as far as allowed.
fn raise_file_limit() {
    if let Err(error) = rlimit::increase_nofile_limit(u64::from(u16::MAX)) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn read_peers(path: &Path) -> Result<Vec<PeerId>, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::System { what: format!("cannot read allow_peers {}", path.display()), source })?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            PeerId::from_str(line).map_err(|error| {
                Error::Invalid(format!("{}: {line:?} is no peer id ({error}); one looks like 12D3Koo…", path.display()))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_the_transport_reach_the_network() {
        let mut config = Config::default();
        (config.node.network_threads, config.node.busy_poll) = (3, 0.001);
        for (native, tls) in [(true, true), (false, true), (true, false)] {
            (config.node.native, config.node.tls) = (native, tls);
            let mut builder = node(&config).expect("nothing is read or opened");
            let net = builder.net_config();
            assert_eq!((net.native, net.tls), (native, tls));
            assert_eq!((net.threads, net.busy_poll), (3, Duration::from_millis(1)));
        }
    }
}
