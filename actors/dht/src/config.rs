//! The `[dht]` section: hivemind's defaults, and limits that hivemind does not have.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a DHT node behaves. Times are in seconds, as in hivemind; the names are hivemind's where it has them
/// (docs/wire.md §6.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DhtConfig {
    /// Ask only: show no node id, serve nobody, hold no records for others.
    pub client_mode: bool,
    /// Nodes in one bucket of the table, neighbours in one answer, and width of a search.
    pub bucket_size: usize,
    /// Nodes that hold a record.
    pub num_replicas: usize,
    /// Buckets are split down to depths that are multiples of this.
    pub depth_modulo: u32,
    /// Time that another node has for an answer.
    pub wait_timeout: f64,
    /// Calls of one search at the same time.
    pub num_workers: usize,
    /// Keys of a get in one call, at the most.
    pub chunk_size: usize,
    /// Nodes that one search asks about one key, at the most.
    pub max_visits: usize,
    /// How far the clocks of two nodes may be apart.
    pub allowed_clock_difference: f64,
    /// Keep what was found elsewhere.
    pub cache_locally: bool,
    /// Keep what we stored elsewhere.
    pub cache_on_store: bool,
    /// Nodes near a key that are given a value they lacked.
    pub cache_nearest: usize,
    /// How long before its expiration a cached value that was read is fetched again.
    pub cache_refresh_before_expiry: f64,
    /// How often experts are announced again.
    pub update_period: f64,
    /// How long announcements hold; twice the period, at least 3 s, when absent.
    pub expiration: Option<f64>,
    /// Records held for the network. At the limit stores are refused; one peer may fill a quarter.
    pub max_records: usize,
    /// Bytes of records held for the network.
    pub max_record_bytes: usize,
    /// Bytes under one key.
    pub max_bytes_per_key: usize,
    /// How long a record is held, however late it expires, for the network or in the cache.
    pub max_record_life: f64,
    /// Records in the cache. At the limit what expires first goes.
    pub max_cached_records: usize,
    /// Bytes in the cache.
    pub max_cached_bytes: usize,
    /// Commands of this process that wait or run; more are refused.
    pub max_commands: usize,
    /// Calls of other nodes that wait or run; more are refused.
    pub max_inbound: usize,
    /// Calls to other nodes at the same time; more wait.
    pub max_calls: usize,
}

impl Default for DhtConfig {
    fn default() -> Self {
        Self {
            client_mode: false,
            bucket_size: 20,
            num_replicas: 5,
            depth_modulo: 5,
            wait_timeout: 3.0,
            num_workers: 4,
            chunk_size: 16,
            max_visits: 128,
            allowed_clock_difference: 3.0,
            cache_locally: true,
            cache_on_store: true,
            cache_nearest: 1,
            cache_refresh_before_expiry: 5.0,
            update_period: 30.0,
            expiration: None,
            max_records: 200_000,
            max_record_bytes: 64 << 20,
            max_bytes_per_key: 1 << 20,
            max_record_life: 86_400.0,
            max_cached_records: 50_000,
            max_cached_bytes: 16 << 20,
            max_commands: 256,
            max_inbound: 512,
            max_calls: 128,
        }
    }
}

/// Why a configuration makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dht.{key}: {reason}")]
pub struct BadDhtConfig {
    /// The key at fault.
    pub key: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl DhtConfig {
    /// A node that only asks.
    pub fn client() -> Self {
        Self { client_mode: true, ..Self::default() }
    }

    /// Checks values that types cannot.
    pub fn validate(&self) -> Result<(), BadDhtConfig> {
        let seconds = [
            ("wait_timeout", self.wait_timeout),
            ("allowed_clock_difference", self.allowed_clock_difference),
            ("update_period", self.update_period),
            ("expiration", self.expiration.unwrap_or(1.0)),
            ("max_record_life", self.max_record_life),
        ];
        for (key, value) in seconds {
            if !(value > 0.0 && value <= MAX_SECONDS) {
                return Err(BadDhtConfig { key, reason: format!("{value} s is not between 0 and {MAX_SECONDS} s") });
            }
        }
        if !(0.0..=MAX_SECONDS).contains(&self.cache_refresh_before_expiry) {
            let reason = format!("must be between 0 and {MAX_SECONDS} s");
            return Err(BadDhtConfig { key: "cache_refresh_before_expiry", reason });
        }
        let counts = [
            ("bucket_size", self.bucket_size),
            ("num_replicas", self.num_replicas),
            ("depth_modulo", self.depth_modulo as usize),
            ("num_workers", self.num_workers),
            ("chunk_size", self.chunk_size),
            ("max_visits", self.max_visits),
            ("max_commands", self.max_commands),
            ("max_inbound", self.max_inbound),
            ("max_calls", self.max_calls),
        ];
        match counts.into_iter().find(|(_, count)| *count == 0) {
            Some((key, _)) => Err(BadDhtConfig { key, reason: "must be at least 1".to_owned() }),
            None => Ok(()),
        }
    }

    /// How long announcements hold, in seconds.
    pub fn announced_for(&self) -> f64 {
        self.expiration.unwrap_or_else(|| (2.0 * self.update_period).max(3.0))
    }

    pub(crate) fn wait(&self) -> Duration {
        seconds(self.wait_timeout)
    }
}

/// A year: longer waits are mistakes.
const MAX_SECONDS: f64 = 31_536_000.0;

/// A duration of so many seconds; values that [`DhtConfig::validate`] refuses are brought into range.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.clamp(0.0, MAX_SECONDS)).unwrap_or_default()
}
