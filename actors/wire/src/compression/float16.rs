//! `FLOAT16`: half precision, clamped to its range.

use bytes::Bytes;

use super::{CodecError, expect_len, values};
use crate::{DType, HostTensor};

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    let mut out = Vec::with_capacity(2 * tensor.numel());
    values::to_f32(tensor).into_iter().for_each(|v| out.extend_from_slice(&values::to_half(v)));
    out.into()
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, numel: usize) -> Result<Bytes, CodecError> {
    expect_len(buffer, 2 * numel)?;
    Ok(values::from_f32(dtype, values::read_half(buffer)))
}
