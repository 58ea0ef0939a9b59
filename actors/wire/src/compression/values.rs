//! Elements as `f32` and back, which is how hivemind computes in every lossy codec.

use bytes::Bytes;
use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::{DType, HostTensor};

/// All elements, rounded or converted to single precision as torch's `.float()` does.
pub(super) fn to_f32(tensor: &HostTensor) -> Vec<f32> {
    fn each<const N: usize>(data: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (chunks, _) = data.as_chunks::<N>();
        chunks.iter().map(|c| read(*c)).collect()
    }
    let data = tensor.data();
    match tensor.dtype() {
        DType::F32 => each(data, f32::from_le_bytes),
        DType::F64 => each(data, |c| f64::from_le_bytes(c) as f32),
        DType::F16 => each(data, |c| f16::from_le_bytes(c).to_f32()),
        DType::BF16 => each(data, |c| bf16::from_le_bytes(c).to_f32()),
        DType::I64 => each(data, |c| i64::from_le_bytes(c) as f32),
        DType::I32 => each(data, |c| i32::from_le_bytes(c) as f32),
        DType::I16 => each(data, |c| i16::from_le_bytes(c).into()),
        DType::I8 => each(data, |c| i8::from_le_bytes(c).into()),
        DType::U8 | DType::Bool => each(data, |[c]| c.into()),
    }
}

/// Converts to elements of `dtype`; integers are truncated and saturate, booleans tell what is not zero.
pub(super) fn from_f32(dtype: DType, values: impl Iterator<Item = f32>) -> Bytes {
    fn each<const N: usize>(values: impl Iterator<Item = f32>, write: impl Fn(f32) -> [u8; N]) -> Bytes {
        values.map(write).collect::<Vec<_>>().into_flattened().into()
    }
    match dtype {
        DType::F32 => each(values, f32::to_le_bytes),
        DType::F64 => each(values, |v| f64::from(v).to_le_bytes()),
        DType::F16 => each(values, |v| f16::from_f32(v).to_le_bytes()),
        DType::BF16 => each(values, |v| bf16::from_f32(v).to_le_bytes()),
        DType::I64 => each(values, |v| (v as i64).to_le_bytes()),
        DType::I32 => each(values, |v| (v as i32).to_le_bytes()),
        DType::I16 => each(values, |v| (v as i16).to_le_bytes()),
        DType::I8 => each(values, |v| (v as i8).to_le_bytes()),
        DType::U8 => each(values, |v| [v as u8]),
        DType::Bool => each(values, |v| [u8::from(v != 0.0)]),
    }
}

/// Reads little-endian single precision numbers.
pub(super) fn read_f32(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> + '_ {
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks.iter().map(|c| f32::from_le_bytes(*c))
}

/// Half precision, clamped to its range as hivemind does: infinities become the largest number, NaN stays.
pub(super) fn to_half(mut values: Vec<f32>) -> Vec<u8> {
    let range = f16::MIN.to_f32()..=f16::MAX.to_f32();
    values.iter_mut().for_each(|v| *v = v.clamp(*range.start(), *range.end()));
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(&values);
    halves.into_iter().map(f16::to_le_bytes).collect::<Vec<_>>().into_flattened()
}

/// Reads little-endian half precision numbers.
pub(super) fn read_half(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<2>();
    let halves: Vec<f16> = chunks.iter().map(|c| f16::from_le_bytes(*c)).collect();
    let mut values = vec![0.0; halves.len()];
    halves.convert_to_f32_slice(&mut values);
    values
}
