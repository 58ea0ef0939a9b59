//! How often a number of which size came: counts by powers of two, for status pages.

use std::sync::atomic::{AtomicU64, Ordering};

/// 2^31 and more share the last count.
const SIZES: usize = 32;

/// Counts of numbers by size. The count `i` is of those above 2^(i-1) and up to 2^i.
#[derive(Debug, Default)]
pub(crate) struct Distribution {
    counts: [AtomicU64; SIZES],
    sum: AtomicU64,
}

impl Distribution {
    /// Counts one.
    pub fn count(&self, number: u64) {
        let size = number.max(1).next_power_of_two().trailing_zeros() as usize;
        self.counts[size.min(SIZES - 1)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(number, Ordering::Relaxed);
    }

    /// All numbers together.
    pub fn sum(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }

    /// Up to which number, and how often; what never came is left out.
    pub fn read(&self) -> Vec<(u64, u64)> {
        let counts = self.counts.iter().enumerate().map(|(size, count)| (1 << size, count.load(Ordering::Relaxed)));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_up_to_the_next_power_of_two() {
        let sizes = Distribution::default();
        for number in [0, 1, 2, 3, 4, 5, 1 << 40] {
            sizes.count(number);
        }
        assert_eq!(sizes.read(), [(1, 2), (2, 1), (4, 2), (8, 1), (1 << 31, 1)]);
        assert_eq!(sizes.sum(), 15 + (1 << 40));
    }
}
