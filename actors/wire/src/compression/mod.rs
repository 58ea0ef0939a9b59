//! Codecs of tensor payloads (wire document §8.3).

use crate::{HostTensor, proto::runtime::Tensor};

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
    /// The buffer does not fit codec, dtype and shape.
    #[error("malformed tensor: {0}")]
    Malformed(String),
}

/// Encodes a tensor for the wire. `requires_grad` is false in the result and `chunks` 0.
pub fn compress(_tensor: &HostTensor, _compression: Compression) -> Result<Tensor, CodecError> {
    unimplemented!()
}

/// Decodes a whole tensor message, whatever its compression; uncompressed payloads are not copied.
pub fn decompress(_tensor: &Tensor) -> Result<HostTensor, CodecError> {
    unimplemented!()
}
