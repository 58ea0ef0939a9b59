//! Encoder of `QUANTILE_8BIT`: as many values in every level.

use bytes::Bytes;

use super::{codebook, values};
use crate::HostTensor;

/// Borders are those of an even sample of at most this many values; hivemind too approximates above 10^5.
const SAMPLE: usize = 100_000;

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    let values = values::to_f32(tensor);
    let borders = borders(&values);
    codebook::encode(&values, |v| borders.partition_point(|border| *border < v) as u8)
}

/// The 255 quantiles i / 256, linearly interpolated.
fn borders(values: &[f32]) -> Vec<f32> {
    let mut sorted: Vec<f32> = values.iter().copied().step_by(values.len().div_ceil(SAMPLE).max(1)).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return Vec::new() };
    let quantile = |i: usize| {
        let position = last as f64 * i as f64 / codebook::LEVELS as f64;
        let (low, part) = (position.floor() as usize, position.fract());
        let (below, above) = (f64::from(sorted[low]), f64::from(sorted[(low + 1).min(last)]));
        (below + (above - below) * part) as f32
    };
    (1..codebook::LEVELS).map(quantile).collect()
}
