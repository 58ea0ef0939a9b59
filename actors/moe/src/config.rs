//! [`MoeConfig`]: how a mixture searches, waits and fails.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use skep_wire::ExpertPrefix;

use crate::MoeError;

/// How a mixture searches, waits and fails. Names are hivemind's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Beginning of the experts' uids, as in `expert.`.
    pub uid_prefix: String,
    /// Sizes of the grid's dimensions.
    pub grid_size: Vec<usize>,
    /// Experts asked per row.
    pub k_best: usize,
    /// Answers that each row needs in forward.
    pub k_min: usize,
    /// Answers that the batch needs in backward, per row that had any.
    pub backward_k_min: usize,
    /// Longest wait for forward, search included.
    pub forward_timeout: Duration,
    /// Longest wait for backward.
    pub backward_timeout: Duration,
    /// Longest wait once every row has `k_min` answers; `None` waits for the timeout.
    pub timeout_after_k_min: Option<Duration>,
    /// Rows short of `k_min` become zero rows instead of an error.
    pub allow_zero_outputs: bool,
    /// Refuse inputs and gradients that are not finite, and count answers that are not as failures.
    pub detect_anomalies: bool,
}

impl MoeConfig {
    /// The grid `prefix` × `grid_size` with the defaults: k_best 4, k_min 1, 30 s.
    pub fn grid(prefix: &str, grid_size: impl Into<Vec<usize>>) -> Self {
        Self {
            uid_prefix: prefix.to_owned(),
            grid_size: grid_size.into(),
            k_best: 4,
            k_min: 1,
            backward_k_min: 1,
            forward_timeout: Duration::from_secs(30),
            backward_timeout: Duration::from_secs(30),
            timeout_after_k_min: None,
            allow_zero_outputs: false,
            detect_anomalies: false,
        }
    }

    /// Sets [`k_best`](Self::k_best).
    pub fn k_best(mut self, k: usize) -> Self {
        self.k_best = k;
        self
    }

    /// Sets [`k_min`](Self::k_min).
    pub fn k_min(mut self, k: usize) -> Self {
        self.k_min = k;
        self
    }

    /// Sets [`backward_k_min`](Self::backward_k_min).
    pub fn backward_k_min(mut self, k: usize) -> Self {
        self.backward_k_min = k;
        self
    }

    /// Sets [`forward_timeout`](Self::forward_timeout).
    pub fn forward_timeout(mut self, wait: Duration) -> Self {
        self.forward_timeout = wait;
        self
    }

    /// Sets [`backward_timeout`](Self::backward_timeout).
    pub fn backward_timeout(mut self, wait: Duration) -> Self {
        self.backward_timeout = wait;
        self
    }

    /// Sets [`timeout_after_k_min`](Self::timeout_after_k_min).
    pub fn timeout_after_k_min(mut self, wait: Duration) -> Self {
        self.timeout_after_k_min = Some(wait);
        self
    }

    /// Sets [`allow_zero_outputs`](Self::allow_zero_outputs).
    pub fn allow_zero_outputs(mut self, allow: bool) -> Self {
        self.allow_zero_outputs = allow;
        self
    }
    /// Sets [`detect_anomalies`](Self::detect_anomalies).
    pub fn detect_anomalies(mut self, detect: bool) -> Self {
        self.detect_anomalies = detect;
        self
    }

    /// Checks that the values make sense together, and reads the prefix.
    pub(crate) fn check(&self) -> Result<ExpertPrefix, MoeError> {
        let prefix: ExpertPrefix = self.uid_prefix.parse()?;
        let bad = |text: String| Err(MoeError::Config(text));
        if prefix.dimensions() > 0 {
            return bad(format!(
                "uid_prefix {prefix} has coordinates; it must be a bare name and a dot, as in \"ffn.\""
            ));
        }
        if self.grid_size.is_empty() || self.grid_size.contains(&0) {
            return bad(format!("grid_size {:?} needs one or more sizes of at least 1", self.grid_size));
        }
        if self.k_best == 0 {
            return bad("k_best must be at least 1".to_owned());
        }
        for (name, k) in [("k_min", self.k_min), ("backward_k_min", self.backward_k_min)] {
            if k > self.k_best {
                return bad(format!("{name} {k} is over k_best {}", self.k_best));
            }
        }
        for (name, wait) in [("forward_timeout", self.forward_timeout), ("backward_timeout", self.backward_timeout)] {
            if wait.is_zero() {
                return bad(format!("{name} must be longer than 0"));
            }
        }
        Ok(prefix)
    }
}
