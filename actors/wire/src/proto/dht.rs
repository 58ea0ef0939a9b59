//! `dht.proto`: the three calls of the hivemind DHT protocol.

use bytes::Bytes;

use super::auth::{RequestAuthInfo, ResponseAuthInfo};

/// Who speaks. Always present in what skep sends; empty inside for a node in client mode.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeInfo {
    /// 20 bytes, big-endian; empty in client mode.
    #[prost(bytes = "bytes", tag = "1")]
    pub node_id: Bytes,
}

/// Asks for a sign of life.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PingRequest {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<RequestAuthInfo>,
    /// The caller.
    #[prost(message, optional, tag = "2")]
    pub peer: Option<NodeInfo>,
    /// Asks the callee to ping back before it answers.
    #[prost(bool, tag = "3")]
    pub validate: bool,
}

/// Answers a ping.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PingResponse {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<ResponseAuthInfo>,
    /// The callee.
    #[prost(message, optional, tag = "2")]
    pub peer: Option<NodeInfo>,
    /// The callee's clock, in Unix seconds.
    #[prost(double, tag = "4")]
    pub dht_time: f64,
    /// Whether the ping back arrived.
    #[prost(bool, tag = "5")]
    pub available: bool,
}

/// Asks to store values; the five lists are parallel.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StoreRequest {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<RequestAuthInfo>,
    /// Key ids, 20 bytes each.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub keys: Vec<Bytes>,
    /// A [`SubkeyTag`](crate::dht_value::SubkeyTag) each.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub subkeys: Vec<Bytes>,
    /// Serialized values.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub values: Vec<Bytes>,
    /// Unix seconds.
    #[prost(double, repeated, tag = "5")]
    pub expiration_time: Vec<f64>,
    /// Whether the entry is for the cache rather than the main storage.
    #[prost(bool, repeated, tag = "6")]
    pub in_cache: Vec<bool>,
    /// The caller.
    #[prost(message, optional, tag = "7")]
    pub peer: Option<NodeInfo>,
}

/// Answers a store.
#[derive(Clone, PartialEq, prost::Message)]
pub struct StoreResponse {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<ResponseAuthInfo>,
    /// Per entry, whether it was stored.
    #[prost(bool, repeated, tag = "2")]
    pub store_ok: Vec<bool>,
    /// The callee.
    #[prost(message, optional, tag = "3")]
    pub peer: Option<NodeInfo>,
}

/// Asks for values and neighbours of keys.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FindRequest {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<RequestAuthInfo>,
    /// Key ids, 20 bytes each.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub keys: Vec<Bytes>,
    /// The caller.
    #[prost(message, optional, tag = "3")]
    pub peer: Option<NodeInfo>,
}

/// What a [`FindResult`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ResultType {
    /// Only neighbours.
    NotFound = 0,
    /// A serialized value.
    FoundRegular = 1,
    /// A serialized [`DictionaryValue`](crate::dht_value::DictionaryValue).
    FoundDictionary = 2,
}

/// What a node knows of one key.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FindResult {
    /// A [`ResultType`] as a number.
    #[prost(enumeration = "ResultType", tag = "1")]
    pub r#type: i32,
    /// Serialized value or dictionary.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// Unix seconds.
    #[prost(double, tag = "3")]
    pub expiration_time: f64,
    /// The nearest nodes known, nearest first.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub nearest_node_ids: Vec<Bytes>,
    /// Their peer ids as raw multihashes, in the same order.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub nearest_peer_ids: Vec<Bytes>,
}

/// Answers a find, one result per key in the order asked.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FindResponse {
    /// Only in moderated networks.
    #[prost(message, optional, tag = "1")]
    pub auth: Option<ResponseAuthInfo>,
    /// One per key.
    #[prost(message, repeated, tag = "2")]
    pub results: Vec<FindResult>,
    /// The callee.
    #[prost(message, optional, tag = "3")]
    pub peer: Option<NodeInfo>,
}
