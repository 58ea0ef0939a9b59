//! The layout that `QUANTILE_8BIT` and `UNIFORM_8BIT` share: `i64 length | f32 codebook | u8 indices`.

use bytes::Bytes;

use super::{CodecError, values};
use crate::DType;

/// Entries of the codebooks that skep writes.
pub(super) const LEVELS: usize = 256;

/// Encodes with the mean of its members as every level's codebook entry, 0 where it has none.
pub(super) fn encode(values: &[f32], level: impl Fn(f32) -> u8) -> Bytes {
    let mut sums = [(0f64, 0u32); LEVELS];
    let mut indices = Vec::with_capacity(values.len());
    for &value in values {
        let index = level(value);
        let (sum, count) = &mut sums[usize::from(index)];
        *sum += f64::from(value);
        *count += 1;
        indices.push(index);
    }
    let mut out = Vec::with_capacity(8 + 4 * LEVELS + values.len());
    out.extend_from_slice(&(LEVELS as i64).to_le_bytes());
    for (sum, count) in sums {
        out.extend_from_slice(&((sum / f64::from(count.max(1))) as f32).to_le_bytes());
    }
    out.extend_from_slice(&indices);
    out.into()
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, numel: usize) -> Result<Bytes, CodecError> {
    let (length, rest) = read_length(buffer)?;
    let (codebook, indices) = split_codebook(rest, length)?;
    if indices.len() != numel {
        return Err(CodecError::Malformed(format!("expected {numel} indices, got {}", indices.len())));
    }
    check_indices(&codebook, indices)?;
    Ok(values::from_f32(dtype, indices.iter().map(|i| codebook[usize::from(*i)])))
}

/// A length in front of everything else.
pub(super) fn read_length(bytes: &[u8]) -> Result<(usize, &[u8]), CodecError> {
    let short = || CodecError::Malformed("buffer ends before the codebook".to_owned());
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let length = usize::try_from(i64::from_le_bytes(*length)).ok().filter(|&n| n <= rest.len() / 4);
    Ok((length.ok_or_else(short)?, rest))
}

/// A codebook of `length` entries, and what follows.
pub(super) fn split_codebook(bytes: &[u8], length: usize) -> Result<(Vec<f32>, &[u8]), CodecError> {
    let split = length.checked_mul(4).and_then(|n| bytes.split_at_checked(n));
    let (codebook, rest) = split.ok_or_else(|| CodecError::Malformed("buffer ends inside the codebook".to_owned()))?;
    Ok((values::read_f32(codebook).collect(), rest))
}

/// Whether every index has a codebook entry.
pub(super) fn check_indices(codebook: &[f32], indices: &[u8]) -> Result<(), CodecError> {
    match indices.iter().max() {
        Some(&max) if usize::from(max) >= codebook.len() => {
            Err(CodecError::Malformed(format!("index {max} in a codebook of {}", codebook.len())))
        }
        _ => Ok(()),
    }
}
