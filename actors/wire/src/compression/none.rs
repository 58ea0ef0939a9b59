//! `NONE`: raw elements. bfloat16 travels widened to float32, as hivemind's default ("legacy") does.

use bytes::Bytes;
use half::bf16;

use super::{CodecError, expect_len, values};
use crate::{DType, HostTensor};

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    if tensor.dtype() != DType::BF16 {
        return tensor.data().clone();
    }
    let (chunks, _) = tensor.data().as_chunks::<2>();
    let widened = chunks.iter().map(|c| bf16::from_le_bytes(*c).to_f32().to_le_bytes());
    widened.collect::<Vec<_>>().into_flattened().into()
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, numel: usize) -> Result<Bytes, CodecError> {
    if dtype == DType::BF16 && buffer.len() == 4 * numel {
        return Ok(values::from_f32(dtype, values::read_f32(buffer)));
    }
    expect_len(buffer, numel * dtype.size())?;
    if dtype == DType::Bool && buffer.iter().any(|b| *b > 1) {
        return Err(CodecError::Malformed("a bool element is neither 0 nor 1".to_owned()));
    }
    Ok(buffer.clone())
}
