//! `p2pd.proto` (proto2): the part of go-libp2p-daemon's messages that crosses the network.
//!
//! The other members of `PersistentConnectionRequest`'s oneof are only spoken between Python and its own daemon; they
//! read as no message at all.

use bytes::Bytes;

/// Both directions of a unary call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PersistentConnectionRequest {
    /// 16 bytes that the answer repeats.
    #[prost(bytes = "bytes", required, tag = "1")]
    pub call_id: Bytes,
    /// The request or the answer.
    #[prost(oneof = "Message", tags = "3, 4")]
    pub message: Option<Message>,
}

/// What a [`PersistentConnectionRequest`] carries.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Message {
    /// A request.
    #[prost(message, tag = "3")]
    CallUnary(CallUnaryRequest),
    /// An answer.
    #[prost(message, tag = "4")]
    UnaryResponse(CallUnaryResponse),
}

/// A unary request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CallUnaryRequest {
    /// A peer id; receivers use the authenticated one instead.
    #[prost(bytes = "bytes", required, tag = "1")]
    pub peer: Bytes,
    /// The handler's name; Python dispatches on it.
    #[prost(string, required, tag = "2")]
    pub proto: String,
    /// The serialized request.
    #[prost(bytes = "bytes", required, tag = "3")]
    pub data: Bytes,
}

/// A unary answer. Python waits for ever when neither member is present, however empty.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CallUnaryResponse {
    /// The answer or the error.
    #[prost(oneof = "Outcome", tags = "1, 2")]
    pub outcome: Option<Outcome>,
}

/// How a unary call ended.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Outcome {
    /// The serialized response.
    #[prost(bytes = "bytes", tag = "1")]
    Response(Bytes),
    /// UTF-8 text of the error.
    #[prost(bytes = "bytes", tag = "2")]
    Error(Bytes),
}

/// Payload of a stream's error frame.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RpcError {
    /// `str(exception)`.
    #[prost(string, optional, tag = "1")]
    pub message: Option<String>,
}
