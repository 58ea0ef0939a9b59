//! `MEANSTD_16BIT`: rows without mean and deviation in half precision, then all means, then all deviations.

use bytes::Bytes;

use super::{CodecError, expect_len, values};
use crate::{DType, HostTensor};

/// Smallest deviation, so that constant rows can be divided by it: float32's epsilon.
const MIN_STD: f32 = f32::EPSILON;

/// `None` for a scalar, which has no rows.
pub(super) fn encode(tensor: &HostTensor) -> Option<Bytes> {
    let (&width, outer) = tensor.shape().split_last()?;
    let rows = outer.iter().product::<usize>();
    let mut values = values::to_f32(tensor);
    let mut out = Vec::with_capacity(2 * values.len() + 8 * rows);
    let (mut means, mut stds) = (vec![0.0; rows], vec![MIN_STD; rows]);
    let row_values = values.chunks_exact_mut(width.max(1));
    for ((row, mean), std) in row_values.zip(&mut means).zip(&mut stds) {
        *mean = (row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64) as f32;
        row.iter_mut().for_each(|v| *v -= *mean);
        let square = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / width as f64;
        *std = (square.sqrt() as f32).max(MIN_STD);
        row.iter().for_each(|v| out.extend_from_slice(&values::to_half(v / *std)));
    }
    means.iter().chain(&stds).for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    Some(out.into())
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, shape: &[usize]) -> Result<Bytes, CodecError> {
    let Some((&width, outer)) = shape.split_last() else {
        return Err(CodecError::Malformed("a scalar has no rows".to_owned()));
    };
    // With a width of 0 the rows are not bounded by the number of elements, hence checked.
    let rows = outer.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= buffer.len() / 8);
    let rows = rows.ok_or_else(|| CodecError::Malformed("more rows than their statistics".to_owned()))?;
    let halves = 2 * rows * width;
    expect_len(buffer, halves + 8 * rows)?;
    let means = values::read_f32(&buffer[halves..halves + 4 * rows]);
    let stds: Vec<f32> = values::read_f32(&buffer[halves + 4 * rows..]).collect();
    let means: Vec<f32> = means.collect();
    let row_of = |i: usize| i / width.max(1);
    let decoded = values::read_half(&buffer[..halves]).enumerate().map(|(i, v)| v * stds[row_of(i)] + means[row_of(i)]);
    Ok(values::from_f32(dtype, decoded))
}
