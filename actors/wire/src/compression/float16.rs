//! `FLOAT16`: half precision, clamped to its range.

use bytes::Bytes;

use super::{CodecError, expect_len, values};
use crate::{DType, HostTensor};

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    values::to_half(values::to_f32(tensor)).into()
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, numel: usize) -> Result<Bytes, CodecError> {
    expect_len(buffer, 2 * numel)?;
    Ok(values::from_f32(dtype, values::read_half(buffer).into_iter()))
}
