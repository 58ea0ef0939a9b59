//! Tensors in pieces, as streaming calls carry them (docs/wire.md §3).

use bytes::{Bytes, BytesMut};

use crate::{limits::STREAM_CHUNK, proto::runtime::Tensor};

/// Cuts a tensor message into pieces of [`STREAM_CHUNK`] bytes. The first has all metadata and the number of pieces, the
/// others only their part of the buffer, which is shared with the original.
pub fn split_for_streaming(tensor: Tensor) -> Vec<Tensor> {
    split(tensor, STREAM_CHUNK)
}

/// [`split_for_streaming`] with another size of pieces, in bytes.
///
/// # Panics
/// When `chunk_size` is 0.
pub fn split(tensor: Tensor, chunk_size: usize) -> Vec<Tensor> {
    let buffer = tensor.buffer.clone();
    let count = buffer.len().div_ceil(chunk_size);
    let part = |i: usize| buffer.slice(i * chunk_size..buffer.len().min((i + 1) * chunk_size));
    let mut pieces = Vec::with_capacity(count.max(1));
    pieces.push(Tensor {
        buffer: if count == 0 { Bytes::new() } else { part(0) },
        chunks: i32::try_from(count).unwrap_or(i32::MAX),
        ..tensor
    });
    pieces.extend((1..count).map(|i| Tensor { buffer: part(i), ..Tensor::default() }));
    pieces
}

/// Why pieces make no tensors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// The first piece has no dtype, hence no tensor to belong to.
    #[error("the first piece of a tensor has no dtype")]
    NoTensor,
    /// More bytes than the receiver takes.
    #[error("tensors of more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
}

/// Memory that a tensor costs beside the frame it came in, in bytes: itself, and the vectors in it as they grow.
const TENSOR_OVERHEAD: usize = 256;

/// Memory of decoded tensors beside the bytes of their buffers, in bytes, at the most. A message of a few bytes a tensor
/// becomes so much more.
pub fn overhead(tensors: &[Tensor]) -> usize {
    tensors.iter().fold(0, |sum: usize, tensor| sum.saturating_add(tensor_overhead(&tensor.dtype, &tensor.size)))
}

/// The same of one tensor.
pub(crate) fn tensor_overhead(dtype: &str, size: &[u32]) -> usize {
    TENSOR_OVERHEAD + dtype.len() + 2 * size_of_val(size)
}

/// Joins the pieces of a call to tensors. A piece with a dtype begins a new one; the announced number of pieces is
/// ignored, as hivemind does.
#[derive(Debug)]
pub struct Assembler {
    limit: usize,
    used: usize,
    tensors: Vec<(Tensor, Vec<Bytes>)>,
}

impl Assembler {
    /// An assembler that takes frames of at most `limit_bytes` in all.
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit: limit_bytes, used: 0, tensors: Vec::new() }
    }

    /// Takes the next piece. `frame_len` is the length of the frame that carried it and is what counts towards the
    /// limit, since the piece keeps the whole frame in memory.
    pub fn push(&mut self, mut piece: Tensor, frame_len: usize) -> Result<(), AssembleError> {
        let cost = frame_len.max(piece.buffer.len()).saturating_add(TENSOR_OVERHEAD);
        self.used = self.used.saturating_add(cost);
        if self.used > self.limit {
            return Err(AssembleError::TooLarge { limit: self.limit });
        }
        if !piece.dtype.is_empty() {
            let part = std::mem::take(&mut piece.buffer);
            piece.chunks = 0;
            self.tensors.push((piece, vec![part]));
            return Ok(());
        }
        let (_, parts) = self.tensors.last_mut().ok_or(AssembleError::NoTensor)?;
        parts.push(piece.buffer);
        Ok(())
    }

    /// The tensors. One that came in one piece shares the frame's bytes; others are joined, each copied once.
    pub fn finish(self) -> Vec<Tensor> {
        let whole = |(tensor, parts): (Tensor, Vec<Bytes>)| Tensor { buffer: join(parts), ..tensor };
        self.tensors.into_iter().map(whole).collect()
    }
}

fn join(mut parts: Vec<Bytes>) -> Bytes {
    if let [only] = parts.as_mut_slice() {
        return std::mem::take(only);
    }
    let mut joined = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| joined.extend_from_slice(part));
    joined.freeze()
}
