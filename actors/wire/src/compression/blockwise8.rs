//! `BLOCKWISE_8BIT`: bitsandbytes' dynamic 8-bit code, scaled to the largest value of each block.
//!
//! Layout: `i64 blocks | i64 code length | f32 absmax per block | f32 code | u8 indices`.

use std::sync::OnceLock;

use bytes::Bytes;

use super::{CodecError, codebook, values};
use crate::{DType, HostTensor};

/// Values that share a scale.
const BLOCK: usize = 4096;

pub(super) fn encode(tensor: &HostTensor) -> Bytes {
    let values = values::to_f32(tensor);
    let code = dynamic_code();
    let blocks = values.len().div_ceil(BLOCK);
    let mut out = Vec::with_capacity(16 + 4 * (blocks + code.len()) + values.len());
    out.extend_from_slice(&(blocks as i64).to_le_bytes());
    out.extend_from_slice(&(code.len() as i64).to_le_bytes());
    let absmax = |block: &[f32]| block.iter().fold(0f32, |max, v| max.max(v.abs()));
    let scales: Vec<f32> = values.chunks(BLOCK).map(absmax).collect();
    scales.iter().chain(code).for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    for (block, scale) in values.chunks(BLOCK).zip(&scales) {
        let scale = if *scale > 0.0 { *scale } else { 1.0 };
        out.extend(block.iter().map(|v| nearest(code, v / scale)));
    }
    out.into()
}

pub(super) fn decode(buffer: &Bytes, dtype: DType, numel: usize) -> Result<Bytes, CodecError> {
    let (blocks, rest) = codebook::read_length(buffer)?;
    let (code_length, rest) = codebook::read_length(rest)?;
    let (absmax, rest) = codebook::split_codebook(rest, blocks)?;
    let (code, indices) = codebook::split_codebook(rest, code_length)?;
    if indices.len() != numel || blocks != numel.div_ceil(BLOCK) {
        let text = format!("{blocks} blocks and {} indices for {numel} elements", indices.len());
        return Err(CodecError::Malformed(text));
    }
    codebook::check_indices(&code, indices)?;
    let scaled = indices.iter().enumerate().map(|(i, index)| code[usize::from(*index)] * absmax[i / BLOCK]);
    Ok(values::from_f32(dtype, scaled))
}

/// Index of the entry nearest to `value`; the code is sorted.
fn nearest(code: &[f32], value: f32) -> u8 {
    let above = code.partition_point(|entry| *entry < value).clamp(1, code.len() - 1);
    let below = above - 1;
    if value - code[below] <= code[above] - value { below as u8 } else { above as u8 }
}

/// bitsandbytes' `create_dynamic_map` for signed 8 bits: seven decades, each with twice as many linear steps as the one
/// below, both signs, 0 and 1. As its quantizer on the CPU does, the lowest entry is replaced by -1.
fn dynamic_code() -> &'static [f32] {
    static CODE: OnceLock<Vec<f32>> = OnceLock::new();
    CODE.get_or_init(|| {
        let mut code = vec![0.0, 1.0];
        for decade in 0..7 {
            let steps = 1 << decade;
            let border = |i: i32| 0.1 + 0.9 * f64::from(i) / f64::from(steps);
            for i in 0..steps {
                let value = ((border(i) + border(i + 1)) / 2.0 * 10f64.powi(decade - 6)) as f32;
                code.extend([value, -value]);
            }
        }
        code.sort_by(f32::total_cmp);
        code[0] = -1.0;
        code
    })
}
