//! Codecs of tensor payloads (docs/wire.md §8.3). Every tensor message names its own codec, so decoding needs no
//! schema.

mod blockwise8;
mod codebook;
mod float16;
mod meanstd16;
mod none;
mod quantile8;
mod uniform8;
mod values;

use bytes::Bytes;

use crate::{DType, HostTensor, proto::runtime::Tensor};

/// How the `buffer` of a tensor message is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Compression {
    /// Raw elements.
    #[default]
    None = 0,
    /// Half precision after removing mean and deviation of each row.
    MeanStd16 = 1,
    /// Half precision.
    Float16 = 2,
    /// 256 levels at quantiles.
    Quantile8 = 3,
    /// 256 levels at equal distances.
    Uniform8 = 4,
    /// 256 dynamic levels, scaled per block of 4096 values.
    Blockwise8 = 5,
}

impl Compression {
    /// Every codec, by number.
    pub const ALL: [Compression; 6] = [
        Compression::None,
        Compression::MeanStd16,
        Compression::Float16,
        Compression::Quantile8,
        Compression::Uniform8,
        Compression::Blockwise8,
    ];

    /// The name on hivemind's command line and in its `CompressionType`, as in `FLOAT16`.
    pub const fn name(self) -> &'static str {
        match self {
            Compression::None => "NONE",
            Compression::MeanStd16 => "MEANSTD_16BIT",
            Compression::Float16 => "FLOAT16",
            Compression::Quantile8 => "QUANTILE_8BIT",
            Compression::Uniform8 => "UNIFORM_8BIT",
            Compression::Blockwise8 => "BLOCKWISE_8BIT",
        }
    }

    /// Finds a codec by [`Compression::name`].
    pub fn from_name(name: &str) -> Option<Compression> {
        Compression::ALL.into_iter().find(|c| c.name() == name)
    }

    /// Whether the codec encodes tensors of this dtype.
    pub const fn encodes(self, dtype: DType) -> bool {
        match self {
            Compression::None | Compression::Blockwise8 => true,
            Compression::Float16 | Compression::MeanStd16 => dtype.is_float() && !matches!(dtype, DType::BF16),
            Compression::Quantile8 | Compression::Uniform8 => dtype.is_float(),
        }
    }
}

impl TryFrom<i32> for Compression {
    type Error = CodecError;

    fn try_from(code: i32) -> Result<Self, CodecError> {
        Compression::ALL.into_iter().find(|c| *c as i32 == code).ok_or(CodecError::UnknownCompression(code))
    }
}

/// Why a tensor cannot be encoded or decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The compression number is unknown.
    #[error("unknown compression type {0}")]
    UnknownCompression(i32),
    /// The dtype name is unknown.
    #[error("unsupported tensor dtype {0:?}")]
    UnknownDType(String),
    /// The codec does not take this dtype.
    #[error("{compression:?} cannot encode {dtype} tensors")]
    Unsupported {
        /// The codec.
        compression: Compression,
        /// The dtype that it refuses.
        dtype: crate::DType,
    },
    /// The shape has no place in a tensor message or in the codec.
    #[error("{compression:?} cannot encode a tensor of shape {shape:?}")]
    Shape {
        /// The codec.
        compression: Compression,
        /// The shape that it refuses.
        shape: Vec<usize>,
    },
    /// The buffer does not fit codec, dtype and shape.
    #[error("malformed tensor: {0}")]
    Malformed(String),
}

/// Most dimensions of a tensor that is accepted; torch's own limit.
pub const MAX_DIMENSIONS: usize = 64;

/// Encodes a tensor for the wire. `requires_grad` is false in the result and `chunks` 0. Uncompressed, the message
/// shares the tensor's bytes (but for bfloat16, which travels widened).
pub fn compress(tensor: &HostTensor, compression: Compression) -> Result<Tensor, CodecError> {
    if !compression.encodes(tensor.dtype()) {
        return Err(CodecError::Unsupported { compression, dtype: tensor.dtype() });
    }
    let shape_error = || CodecError::Shape { compression, shape: tensor.shape().to_vec() };
    let size = tensor.shape().iter().map(|&d| u32::try_from(d)).collect::<Result<Vec<_>, _>>();
    let buffer = match compression {
        Compression::None => none::encode(tensor),
        Compression::MeanStd16 => meanstd16::encode(tensor).ok_or_else(shape_error)?,
        Compression::Float16 => float16::encode(tensor),
        Compression::Quantile8 => quantile8::encode(tensor),
        Compression::Uniform8 => uniform8::encode(tensor),
        Compression::Blockwise8 => blockwise8::encode(tensor),
    };
    Ok(Tensor {
        buffer,
        size: size.map_err(|_| shape_error())?,
        requires_grad: false,
        dtype: tensor.dtype().name().to_owned(),
        compression: compression as i32,
        chunks: 0,
    })
}

/// Decodes a whole tensor message, whatever its compression; uncompressed payloads are not copied. Memory is at most
/// eight times that of the buffer.
pub fn decompress(tensor: &Tensor) -> Result<HostTensor, CodecError> {
    let unknown = || CodecError::UnknownDType(tensor.dtype.chars().take(32).collect());
    let dtype = DType::from_name(&tensor.dtype).ok_or_else(unknown)?;
    if tensor.size.len() > MAX_DIMENSIONS {
        return Err(CodecError::Malformed(format!("{} dimensions, limit {MAX_DIMENSIONS}", tensor.size.len())));
    }
    let shape: Vec<usize> = tensor.size.iter().map(|&d| d as usize).collect();
    let numel = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    // Every codec spends at least a byte on an element, so this also bounds all arithmetic on the count below.
    let numel = numel.filter(|&n| n <= tensor.buffer.len()).ok_or_else(|| {
        CodecError::Malformed(format!("{} bytes cannot hold the shape {shape:?}", tensor.buffer.len()))
    })?;
    let buffer = &tensor.buffer;
    let data = match Compression::try_from(tensor.compression)? {
        Compression::None => none::decode(buffer, dtype, numel)?,
        Compression::MeanStd16 => meanstd16::decode(buffer, dtype, &shape)?,
        Compression::Float16 => float16::decode(buffer, dtype, numel)?,
        Compression::Quantile8 | Compression::Uniform8 => codebook::decode(buffer, dtype, numel)?,
        Compression::Blockwise8 => blockwise8::decode(buffer, dtype, numel)?,
    };
    HostTensor::new(dtype, shape, data).map_err(|e| CodecError::Malformed(e.to_string()))
}

fn expect_len(buffer: &Bytes, expected: usize) -> Result<(), CodecError> {
    if buffer.len() == expected {
        return Ok(());
    }
    Err(CodecError::Malformed(format!("expected {expected} bytes, got {}", buffer.len())))
}
