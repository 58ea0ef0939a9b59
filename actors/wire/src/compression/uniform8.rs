//! Encoder of `UNIFORM_8BIT`: levels at equal distances over six deviations around the mean.
//!
//! hivemind's servers average values from which the mean was already taken, so that it is lost; skep keeps it. Decoders
//! see no difference, as the codebook travels along.

use bytes::Bytes;

use super::{
    codebook::{self, LEVELS},
    values,
};
use crate::HostTensor;

/// Deviations that the levels cover.
const RANGE: f64 = 6.0;

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    let values = values::to_f32(tensor);
    let n = values.len() as f64;
    let mean = (values.iter().map(|v| f64::from(*v)).sum::<f64>() / n) as f32;
    let square: f64 = values.iter().map(|v| f64::from(v - mean).powi(2)).sum();
    // One value has no deviation; it falls into the middle level, as equal values do.
    let scale = (RANGE * (square / (n - 1.0)).sqrt() / LEVELS as f64) as f32;
    let scale = if scale.is_finite() && scale > 0.0 { scale } else { f32::MAX };
    let middle = (LEVELS / 2) as f32;
    codebook::encode(&values, |v| (((v - mean) / scale).round_ties_even() + middle).clamp(0.0, 255.0) as u8)
}
