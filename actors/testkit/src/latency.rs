//! [`Latency`]: how long a message travels.

use std::{ops::Range, time::Duration};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Longest way of a single message: draws from distributions with long tails end here.
const LONGEST: Duration = Duration::from_secs(3600);

/// Time that a message takes one way.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{Latency, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     sim.network().latency(Latency::exponential(Duration::from_millis(50)));
/// });
/// ```
#[derive(Clone, Debug, PartialEq)]
pub enum Latency {
    /// Always the same.
    Constant(Duration),
    /// Equally distributed.
    Uniform(Range<Duration>),
    /// Exponentially distributed: mostly short, sometimes many times the mean.
    Exponential {
        /// The mean.
        mean: Duration,
    },
    /// Weibull distributed; a shape below 1 has a longer tail than the exponential distribution, above 1 a shorter one.
    Weibull {
        /// The scale λ: 63 % of all messages take at most so long.
        scale: Duration,
        /// The shape k, above 0.
        shape: f64,
    },
}

impl Latency {
    /// Always `one_way`.
    pub fn constant(one_way: Duration) -> Self {
        Self::Constant(one_way)
    }

    /// Equally distributed over `range`.
    pub fn uniform(range: Range<Duration>) -> Self {
        Self::Uniform(range)
    }

    /// Exponentially distributed with this mean.
    pub fn exponential(mean: Duration) -> Self {
        Self::Exponential { mean }
    }

    /// Weibull distributed.
    ///
    /// # Panics
    /// When `shape` is not above 0.
    pub fn weibull(scale: Duration, shape: f64) -> Self {
        assert!(shape > 0.0 && shape.is_finite(), "the shape of a Weibull distribution is above 0, not {shape}");
        Self::Weibull { scale, shape }
    }

    /// One message's time; at most an hour.
    pub(crate) fn draw(&self, random: &mut ChaCha8Rng) -> Duration {
        match self {
            Latency::Constant(latency) => *latency,
            Latency::Uniform(range) if range.is_empty() => range.start,
            Latency::Uniform(range) => random.random_range(range.clone()),
            Latency::Exponential { mean } => scaled(*mean, surprise(random)),
            Latency::Weibull { scale, shape } => scaled(*scale, surprise(random).powf(shape.recip())),
        }
    }
}

/// −ln of a number that is equally distributed over (0, 1]: exponentially distributed with mean 1.
fn surprise(random: &mut ChaCha8Rng) -> f64 {
    -(1.0 - random.random::<f64>()).ln()
}

fn scaled(unit: Duration, factor: f64) -> Duration {
    let seconds = (unit.as_secs_f64() * factor).min(LONGEST.as_secs_f64());
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn mean(latency: &Latency) -> f64 {
        let random = &mut ChaCha8Rng::seed_from_u64(7);
        (0..20_000).map(|_| latency.draw(random).as_secs_f64()).sum::<f64>() / 20_000.0
    }

    #[test]
    fn distributions_have_the_means_that_their_names_promise() {
        let second = Duration::from_secs(1);
        assert_eq!(mean(&Latency::constant(second)), 1.0);
        assert!((mean(&Latency::uniform(second..3 * second)) - 2.0).abs() < 0.02);
        assert!((mean(&Latency::exponential(second)) - 1.0).abs() < 0.03);
        // Γ(1 + 1/2) = √π / 2 and Γ(1 + 2) = 2.
        assert!((mean(&Latency::weibull(second, 2.0)) - 0.8862).abs() < 0.02);
        assert!((mean(&Latency::weibull(second, 0.5)) - 2.0).abs() < 0.15);
    }

    #[test]
    fn an_empty_range_is_its_start() {
        let millis = Duration::from_millis;
        let random = &mut ChaCha8Rng::seed_from_u64(1);
        assert_eq!(Latency::uniform(millis(5)..millis(5)).draw(random), millis(5));
    }
}
