//! `MEANSTD_16BIT`: rows without mean and deviation in half precision, then all means, then all deviations.

use bytes::Bytes;

use super::{CodecError, expect_len, values};
use crate::{DType, HostTensor};

/// Smallest deviation, so that constant rows can be divided by it: float32's epsilon.
const MIN_STD: f32 = f32::EPSILON;

/// `None` for a scalar and for empty rows, which have no mean.
pub(super) fn encode(tensor: &HostTensor) -> Option<Bytes> {
    let (&width, outer) = tensor.shape().split_last().filter(|(width, _)| **width > 0)?;
    let rows = outer.iter().product::<usize>();
    let mut values = values::to_f32(tensor);
    let (mut means, mut stds) = (vec![0.0; rows], vec![MIN_STD; rows]);
    let row_values = values.chunks_exact_mut(width);
    for ((row, mean), std) in row_values.zip(&mut means).zip(&mut stds) {
        *mean = (row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64) as f32;
        row.iter_mut().for_each(|v| *v -= *mean);
        let square = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>() / width as f64;
        *std = (square.sqrt() as f32).max(MIN_STD);
        row.iter_mut().for_each(|v| *v /= *std);
    }
    let mut out = values::to_half(values);
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
    let means: Vec<f32> = values::read_f32(&buffer[halves..halves + 4 * rows]).collect();
    let stds: Vec<f32> = values::read_f32(&buffer[halves + 4 * rows..]).collect();
    let mut decoded = values::read_half(&buffer[..halves]);
    for ((row, mean), std) in decoded.chunks_exact_mut(width.max(1)).zip(means).zip(stds) {
        row.iter_mut().for_each(|v| *v = *v * std + mean);
    }
    Ok(values::from_f32(dtype, decoded.into_iter()))
}
