//! `runtime.proto`: expert calls.

use bytes::Bytes;

/// Names an expert.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExpertUid {
    /// The uid, as in `ffn.0.12`.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// Answer of `rpc_info`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExpertInfo {
    /// MessagePack, see [`crate::ExpertInfo`].
    #[prost(bytes = "bytes", tag = "1")]
    pub serialized_info: Bytes,
}

/// Request of forward and backward.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExpertRequest {
    /// The expert asked.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Flat inputs, then (backward) flat output gradients.
    #[prost(message, repeated, tag = "2")]
    pub tensors: Vec<Tensor>,
    /// Unused by hivemind.
    #[prost(bytes = "bytes", tag = "3")]
    pub metadata: Bytes,
}

/// Answer of forward and backward.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ExpertResponse {
    /// Flat outputs, or one gradient per flat input.
    #[prost(message, repeated, tag = "2")]
    pub tensors: Vec<Tensor>,
    /// Unused by hivemind.
    #[prost(bytes = "bytes", tag = "3")]
    pub metadata: Bytes,
}

/// A tensor, or one piece of one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Tensor {
    /// Payload, encoded as `compression` says.
    #[prost(bytes = "bytes", tag = "1")]
    pub buffer: Bytes,
    /// Full shape.
    #[prost(uint32, repeated, tag = "2")]
    pub size: Vec<u32>,
    /// Copied to the decoded tensor by Python.
    #[prost(bool, tag = "3")]
    pub requires_grad: bool,
    /// Name without the `torch.` prefix; empty in continuation pieces.
    #[prost(string, tag = "4")]
    pub dtype: String,
    /// A [`crate::Compression`] as a number.
    #[prost(int32, tag = "5")]
    pub compression: i32,
    /// Number of pieces that the buffer was cut into; 0 in unary messages.
    #[prost(int32, tag = "6")]
    pub chunks: i32,
}
