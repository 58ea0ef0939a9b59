//! The sections of `skep.toml`. Each crate owns the limits it enforces; here they are gathered, named and given defaults.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use multiaddr::Multiaddr;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

/// Everything the daemon can be told. `config/skep.toml` shows every key at its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Identity, addresses, peers.
    pub node: Node,
    /// The DHT protocol.
    pub dht: Dht,
    /// How experts batch and announce.
    pub server: Server,
    /// What is hosted.
    pub experts: Vec<Experts>,
    /// What is refused when there is too much of it.
    pub limits: Limits,
    /// What is written to stderr.
    pub log: Log,
    /// The status page.
    pub http: Http,
}

/// `[node]`: who we are and where we are found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Addresses to listen on.
    #[serde(deserialize_with = "addresses")]
    pub host_maddrs: Vec<Multiaddr>,
    /// Addresses that others are told, when they differ from those listened on.
    #[serde(deserialize_with = "addresses")]
    pub announce_maddrs: Vec<Multiaddr>,
    /// Peers of the network to join, each with its `/p2p/…`; empty starts a network of one's own.
    #[serde(deserialize_with = "addresses")]
    pub initial_peers: Vec<Multiaddr>,
    /// Private key; made when the file does not exist. Without one every start is a new peer.
    pub identity_path: Option<PathBuf>,
    /// A file of peer ids, one a line: nobody else may connect.
    pub allow_peers: Option<PathBuf>,
    /// Expert calls travel on skep's own wire where the other side offers it; else all of them on hivemind's.
    pub native: bool,
    /// TLS is offered beside noise, and preferred where both sides have it.
    pub tls: bool,
    /// Threads that carry connections.
    pub network_threads: usize,
    /// Seconds that such a thread looks for more after it had something to do, before it sleeps; 0: not at all.
    pub busy_poll: f64,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            host_maddrs: vec!["/ip4/127.0.0.1/tcp/0".parse().expect("a literal multiaddr")],
            announce_maddrs: Vec::new(),
            initial_peers: Vec::new(),
            identity_path: None,
            allow_peers: None,
            native: true,
            tls: true,
            network_threads: 1,
            busy_poll: 0.0001,
        }
    }
}

/// `[dht]`: the hivemind DHT protocol. Defaults are hivemind's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dht {
    /// Peers in one routing-table bucket.
    pub bucket_size: usize,
    /// Peers that keep a copy of each record.
    pub num_replicas: usize,
    /// Seconds to wait for one answer of another node.
    pub wait_timeout: f64,
    /// Concurrent requests of one search.
    pub num_workers: usize,
    /// Seconds between looks for a random key, which keep the routing table fresh; a node without experts then says what it
    /// holds.
    pub refresh_period: f64,
}

impl Default for Dht {
    fn default() -> Self {
        Self { bucket_size: 20, num_replicas: 5, wait_timeout: 3.0, num_workers: 4, refresh_period: 30.0 }
    }
}

/// `[server]`: batching and announcing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Rows below which a batch waits for more, at most `max_wait`.
    pub min_batch_size: u32,
    /// Rows of one batch at the most.
    pub max_batch_size: u32,
    /// Seconds that a batch below `min_batch_size` waits.
    pub max_wait: f64,
    /// Executor threads per device; 0 is one per core.
    pub executors: usize,
    /// How much nicer executors are than the other threads, in steps of nice(1), 0 to 19. Linux only.
    pub executor_niceness: u8,
    /// Seconds between announcements in the DHT.
    pub update_period: f64,
    /// Seconds for which an announcement holds; by default twice `update_period`.
    pub expiration: Option<f64>,
    /// Refuse inputs and gradients that are not finite.
    pub check_finite: bool,
    /// Folder of the experts' checkpoints, made when it does not exist; by default none are taken.
    pub checkpoint_dir: Option<PathBuf>,
    /// Seconds between checkpoints of an expert that trains.
    pub checkpoint_period: f64,
    /// Checkpoints kept of each expert, the newest ones.
    pub keep_checkpoints: usize,
    /// Seconds between statistics in the log; by default none.
    pub stats_report_interval: Option<f64>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            min_batch_size: 1,
            max_batch_size: 16384,
            max_wait: 0.05,
            executors: 0,
            executor_niceness: 5,
            update_period: 30.0,
            expiration: None,
            check_finite: false,
            checkpoint_dir: None,
            checkpoint_period: 300.0,
            keep_checkpoints: 3,
            stats_report_interval: None,
        }
    }
}

/// `[[experts]]`: one group of experts that are made alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Experts {
    /// Uids to choose from, as in `expert.[0:5]` or `ffn.[0:4].[0:16]`.
    pub expert_pattern: Option<String>,
    /// Uids to host, in full.
    pub expert_uids: Vec<String>,
    /// How many to host; by default all that the pattern names. Without pattern and uids so many of `expert.0`,
    /// `expert.1` and so on, the first free ones.
    pub num_experts: Option<usize>,
    /// The module: `ffn`, `transformer`, `nop`, `nop_delay`, `det_dropout`, or a class of the program's own.
    pub expert_cls: String,
    /// Width of the module's input.
    pub hidden_dim: i64,
    /// A TorchScript file, in place of a class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<PathBuf>,
    /// Inputs of that module; those with a name are given by it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<TensorSpec>,
    /// Outputs of that module.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<TensorSpec>,
    /// Dropout probability of a transformer; by default 0.1.
    pub dropout: Option<f64>,
    /// `sgd`, `adam`, `adamw` or `none`.
    pub optimizer: String,
    /// By default 0.01 for sgd and 0.001 for the others.
    pub learning_rate: Option<f64>,
    /// Share of the last direction that sgd keeps; by default 0.
    pub momentum: Option<f64>,
    /// Whether sgd's momentum is Nesterov's; by default not.
    pub nesterov: Option<bool>,
    /// Decay of adam's and adamw's moments; by default 0.9 and 0.999.
    pub betas: Option<(f64, f64)>,
    /// What adam and adamw add to the root of the second moment; by default 1e-8.
    pub eps: Option<f64>,
    /// Decay of the weights; by default 0, with adamw 0.01.
    pub weight_decay: Option<f64>,
    /// `none` or `linear`.
    pub scheduler: String,
    /// Steps of linear warm-up.
    pub num_warmup_steps: u64,
    /// Steps after which the linear schedule reaches zero.
    pub num_training_steps: Option<u64>,
    /// Largest norm of a step's gradients; by default they are not clipped.
    pub clip_grad_norm: Option<f64>,
    /// How inputs are compressed on the way: `NONE`, `FLOAT16`, `MEANSTD_16BIT`, `QUANTILE_8BIT`, `UNIFORM_8BIT`,
    /// `BLOCKWISE_8BIT`.
    pub compression: String,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Makes the initial weights repeatable.
    pub seed: Option<u64>,
}

impl Default for Experts {
    fn default() -> Self {
        Self {
            expert_pattern: None,
            expert_uids: Vec::new(),
            num_experts: None,
            expert_cls: "ffn".to_owned(),
            hidden_dim: 1024,
            module: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
            dropout: None,
            optimizer: "sgd".to_owned(),
            learning_rate: None,
            momentum: None,
            nesterov: None,
            betas: None,
            eps: None,
            weight_decay: None,
            scheduler: "none".to_owned(),
            num_warmup_steps: 0,
            num_training_steps: None,
            clip_grad_norm: None,
            compression: "NONE".to_owned(),
            device: "cpu".to_owned(),
            seed: None,
        }
    }
}

/// A tensor of a TorchScript module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// The keyword of an input that is given by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Element type, as in `float32`, `bfloat16`, `int64`, `bool`.
    pub dtype: String,
    /// Sizes behind the batch dimension; -1 takes any.
    #[serde(default)]
    pub shape: Vec<i64>,
}

/// `[limits]`: what is refused when there is too much of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Calls served at once.
    pub max_inbound_calls: usize,
    /// Bytes of requests held at once.
    pub max_inbound_bytes: usize,
    /// Bytes of answers to calls of our own that are under way at once.
    pub max_answer_bytes: usize,
    /// Bytes of one request or answer.
    pub max_body_bytes: usize,
    /// Connections in all.
    pub max_connections: u32,
    /// Rows waiting per expert and direction; 0 is four times `max_batch_size`.
    pub mailbox_rows: u32,
    /// Payload bytes waiting per expert and direction.
    pub mailbox_bytes: usize,
    /// Seconds after which a call of a hivemind client ends with a TimeoutError.
    pub legacy_deadline: f64,
    /// DHT records kept for others.
    pub dht_records: usize,
    /// Bytes of DHT records kept for others.
    pub dht_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_inbound_calls: 4096,
            max_inbound_bytes: 1 << 30,
            max_answer_bytes: 1 << 30,
            max_body_bytes: 1 << 28,
            max_connections: 1024,
            mailbox_rows: 0,
            mailbox_bytes: 1 << 30,
            legacy_deadline: 300.0,
            dht_records: 1 << 20,
            dht_bytes: 1 << 29,
        }
    }
}

/// `[log]`: what is written to stderr.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A filter in `tracing`'s terms, as in `info` or `info,skep_net=debug`.
    pub filter: String,
    /// `text` or `json`.
    pub format: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: "text".to_owned() }
    }
}

/// `[http]`: a status page, `GET /live`, `/ready`, `/status` (JSON) and `/metrics` (for Prometheus).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it listens; port 0 takes a free one and the log says which.
    pub listen: SocketAddr,
    /// Connections at once; more wait.
    pub max_connections: usize,
    /// Seconds that a client has for its request.
    pub request_timeout: f64,
}

impl Default for Http {
    fn default() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 9464));
        Self { enabled: false, listen, max_connections: 32, request_timeout: 5.0 }
    }
}

/// Reads addresses so that an error shows the one that is wrong.
fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Multiaddr>, D::Error> {
    struct Address(Multiaddr);

    impl<'de> Deserialize<'de> for Address {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            let bad = |error| format!("{text:?} is no address as in \"/ip4/127.0.0.1/tcp/31337\": {error}");
            text.parse().map(Self).map_err(bad).map_err(D::Error::custom)
        }
    }

    Ok(Vec::<Address>::deserialize(deserializer)?.into_iter().map(|address| address.0).collect())
}
