//! The server's section of the configuration.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use skep_kernel::{Capacity, Rows};

/// How a server batches and waits. Unknown keys are refused. How often its experts are announced is the DHT's to say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Rows below which a batch waits for more, at most `max_wait`.
    pub min_batch_size: u32,
    /// Rows of a batch at the most; a request of more is refused.
    pub max_batch_size: u32,
    /// How long a batch below `min_batch_size` waits for more rows, in seconds.
    #[serde(with = "seconds")]
    pub max_wait: Duration,
    /// Rows that may wait in each mailbox of an expert (one for forward, one for backward); 0 stands for
    /// 4 × `max_batch_size`.
    pub mailbox_rows: u32,
    /// Tensor bytes that may wait in each mailbox of an expert.
    pub mailbox_bytes: usize,
    /// Threads that run experts; 0 stands for one per core.
    pub executors: usize,
    /// How much nicer executors are than the process's other threads, in steps of nice(1), 0 to 19: so a machine whose
    /// cores all compute still answers its peers in time. Linux only.
    pub executor_niceness: u8,
    /// How long a call may take at the most, in seconds. Callers on hivemind's wire name no deadline and wait so long
    /// for room and answer.
    #[serde(with = "seconds")]
    pub legacy_deadline: Duration,
    /// Whether tensors with a NaN or an infinity in them are refused at the door.
    pub check_finite: bool,
    /// Request ids of backward calls that are remembered at the most, so that a repeated one is applied once.
    pub remembered_requests: usize,
    /// Bytes of answers that are remembered with them.
    pub remembered_bytes: usize,
    /// Time between checkpoints of an expert that trains, in seconds. Without a place to keep them there are none.
    #[serde(with = "seconds")]
    pub checkpoint_period: Duration,
    /// Checkpoints of an expert that are kept, the newest ones.
    pub keep_checkpoints: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            min_batch_size: 1,
            max_batch_size: 4096,
            max_wait: Duration::from_millis(50),
            mailbox_rows: 0,
            mailbox_bytes: 256 << 20,
            executors: 0,
            executor_niceness: 5,
            legacy_deadline: Duration::from_secs(300),
            check_finite: false,
            remembered_requests: 65_536,
            remembered_bytes: 64 << 20,
            checkpoint_period: Duration::from_secs(300),
            keep_checkpoints: 3,
        }
    }
}

/// A value that a server cannot work with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value} is not allowed: {reason}")]
pub struct ConfigError {
    /// The key in `[server]`.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What must hold.
    pub reason: &'static str,
}

impl ServerConfig {
    /// Checks that the values go together.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |key, value: String, reason| Err(ConfigError { key, value, reason });
        if self.max_batch_size == 0 {
            return fail("max_batch_size", "0".into(), "a batch has at least one row");
        }
        if self.min_batch_size > self.max_batch_size {
            return fail("min_batch_size", self.min_batch_size.to_string(), "it may not exceed max_batch_size");
        }
        if self.capacity().rows.0 < self.max_batch_size {
            return fail(
                "mailbox_rows",
                self.mailbox_rows.to_string(),
                "a whole batch must fit: at least max_batch_size",
            );
        }
        if self.executor_niceness > 19 {
            return fail("executor_niceness", self.executor_niceness.to_string(), "nice(1) knows 0 to 19");
        }
        if self.legacy_deadline.is_zero() {
            return fail("legacy_deadline", "0".into(), "no call could be answered");
        }
        if self.checkpoint_period.is_zero() {
            return fail("checkpoint_period", "0".into(), "nothing but checkpoints would be made");
        }
        if self.keep_checkpoints == 0 {
            return fail("keep_checkpoints", "0".into(), "each checkpoint would be removed at once");
        }
        Ok(())
    }

    /// What each mailbox of an expert may hold.
    pub fn capacity(&self) -> Capacity {
        let rows = if self.mailbox_rows == 0 { self.max_batch_size.saturating_mul(4) } else { self.mailbox_rows };
        Capacity { rows: Rows(rows), bytes: self.mailbox_bytes }
    }

    /// Number of executor threads.
    pub fn executor_threads(&self) -> usize {
        match self.executors {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// Durations as seconds, whole or not.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(value.as_secs_f64())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(from)?;
        Duration::try_from_secs_f64(seconds)
            .map_err(|_| D::Error::custom(format!("{seconds} is no number of seconds; expected 0 or more")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_a_mailbox_holds_four_batches() {
        let config = ServerConfig::default();
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.capacity().rows, Rows(4 * 4096));
    }

    #[test]
    fn values_that_cannot_work_are_refused_by_name() {
        let zero = ServerConfig { max_batch_size: 0, ..Default::default() };
        assert_eq!(zero.validate().unwrap_err().key, "max_batch_size");
        let above = ServerConfig { min_batch_size: 9, max_batch_size: 8, ..Default::default() };
        assert_eq!(above.validate().unwrap_err().key, "min_batch_size");
        let narrow = ServerConfig { mailbox_rows: 7, max_batch_size: 8, ..Default::default() };
        assert_eq!(narrow.validate().unwrap_err().key, "mailbox_rows");
        let nice = ServerConfig { executor_niceness: 20, ..Default::default() };
        assert_eq!(nice.validate().unwrap_err().key, "executor_niceness");
    }
}
