//! [`Draws`]: where modules take random numbers from.

use tch::{TchError, Tensor};

use crate::ffi;

/// Where a module's random numbers come from: they depend on seed and step alone.
///
/// So training goes on bit by bit after a restart from a checkpoint, which keeps both; and backward, which computes forward
/// again, draws what forward drew for a batch of the same shape, unless a step came between. libtorch's own generator
/// belongs to the whole process and can promise neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draws {
    /// Of the expert; kept in its checkpoints.
    pub seed: u64,
    /// Optimizer steps made so far.
    pub step: u64,
}

impl Draws {
    /// The seed for the n-th draw within one call.
    pub fn nth(self, n: u64) -> u64 {
        [self.step, n].into_iter().fold(mix(self.seed), |seed, number| mix(seed ^ number))
    }

    /// Zeros with probability `p` in the place of values, the others scaled by 1 / (1 − p), as torch's dropout.
    pub(super) fn dropout(self, n: u64, values: Tensor, p: f64) -> Result<Tensor, TchError> {
        if p == 0.0 {
            return Ok(values);
        }
        let mut kept = values.f_detach()?.f_empty_like()?;
        ffi::bernoulli_(&mut kept, 1.0 - p, self.nth(n))?;
        values.f_mul(&kept.f_div_scalar_(1.0 - p)?)
    }
}

/// One step of SplitMix64: every bit of the result depends on every bit of the number.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn dropout_depends_on_seed_step_and_place_alone_and_keeps_the_mean() {
        let ones = || Tensor::ones([400, 50], (Kind::Float, Device::Cpu));
        let drop = |seed, step, n| Draws { seed, step }.dropout(n, ones(), 0.25).unwrap();
        let first = drop(1, 2, 3);
        assert!(first.equal(&drop(1, 2, 3)));
        for other in [drop(2, 2, 3), drop(1, 3, 3), drop(1, 2, 0), drop(2, 1, 3)] {
            assert!(!first.equal(&other));
        }
        assert_eq!(first.max().double_value(&[]) as f32, 1.0 / 0.75);
        assert!((first.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.03);
        assert!(Draws::default().dropout(0, ones(), 0.0).unwrap().equal(&ones()));
    }
}
