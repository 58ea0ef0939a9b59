//! How long calls took: recorded in each caller, merged, summed up.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest time that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(3600);

/// Times with three significant digits, from a nanosecond to an hour.
pub struct Latencies(Histogram<u64>);

/// Times as one process tells them to another: nanoseconds with how often they came.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Recorded(Vec<(u64, u64)>);

/// The distribution in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Number of times.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Half of them are below.
    pub p50: f64,
    /// 99 % are below.
    pub p99: f64,
    /// 99.9 % are below.
    pub p99_9: f64,
    /// The longest.
    pub max: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, nanoseconds(LONGEST), 3).expect("constants that go together"))
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(nanoseconds(took));
    }

    /// Counts those of another process.
    pub fn add(&mut self, recorded: &Recorded) {
        for &(value, count) in &recorded.0 {
            self.0.saturating_record_n(value, count);
        }
    }

    /// All, for another process.
    pub fn recorded(&self) -> Recorded {
        Recorded(self.0.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect())
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The distribution.
    pub fn summary(&self) -> Summary {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        Summary {
            count: self.0.len(),
            mean: self.0.mean() / 1e3,
            p50: at(0.5),
            p99: at(0.99),
            p99_9: at(0.999),
            max: self.0.max() as f64 / 1e3,
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_processes_recorded_is_summed_up_as_one() {
        let (mut fast, mut slow, mut all) = (Latencies::default(), Latencies::default(), Latencies::default());
        (0..99).for_each(|_| fast.record(Duration::from_micros(100)));
        slow.record(Duration::from_millis(5));
        all.add(&fast.recorded());
        all.add(&slow.recorded());
        let summary = all.summary();
        assert_eq!(summary.count, 100);
        assert!((summary.p50 - 100.0).abs() < 1.0 && (summary.max - 5000.0).abs() < 10.0, "{summary:?}");
        assert!((summary.p99_9 - 5000.0).abs() < 10.0, "{summary:?}");
    }
}
