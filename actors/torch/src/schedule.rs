//! Learning rates over time.

use serde::{Deserialize, Serialize};

/// A factor on the learning rate per optimizer step, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "schedule", deny_unknown_fields)]
pub enum Schedule {
    /// Always 1.
    #[default]
    Constant,
    /// From 0 up to 1 during the warm-up, then down to 0 at the end (hivemind's `linear`, docs/wire.md §9.2).
    Linear {
        /// Steps of the way up; the first has factor 0.
        warmup_steps: u64,
        /// Steps in all; the factor stays 0 afterwards.
        total_steps: u64,
    },
}

impl Schedule {
    /// The factor of step `step`.
    pub fn factor(self, step: u64) -> f64 {
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear { warmup_steps, .. } if step < warmup_steps => step as f64 / warmup_steps as f64,
            Schedule::Linear { warmup_steps, total_steps } => {
                let left = total_steps.saturating_sub(step) as f64;
                left / total_steps.saturating_sub(warmup_steps).max(1) as f64
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_goes_up_then_down_then_stays_at_zero() {
        let schedule = Schedule::Linear { warmup_steps: 2, total_steps: 4 };
        assert_eq!([0, 1, 2, 3, 4, 9].map(|step| schedule.factor(step)), [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]);
        assert_eq!(Schedule::Linear { warmup_steps: 0, total_steps: 0 }.factor(0), 0.0);
    }
}
