//! `auth.proto`: signatures around requests in moderated networks; ignored without an authorizer.

use bytes::Bytes;

/// A user's right to take part, signed by an authority.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AccessToken {
    /// The user.
    #[prost(string, tag = "1")]
    pub username: String,
    /// The user's public key.
    #[prost(bytes = "bytes", tag = "2")]
    pub public_key: Bytes,
    /// When the token ends, as text.
    #[prost(string, tag = "3")]
    pub expiration_time: String,
    /// The authority's signature.
    #[prost(bytes = "bytes", tag = "4")]
    pub signature: Bytes,
}

/// Accompanies a request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RequestAuthInfo {
    /// The caller's token.
    #[prost(message, optional, tag = "1")]
    pub client_access_token: Option<AccessToken>,
    /// Key of the service that the request is meant for; empty for any.
    #[prost(bytes = "bytes", tag = "2")]
    pub service_public_key: Bytes,
    /// The caller's clock, in Unix seconds.
    #[prost(double, tag = "3")]
    pub time: f64,
    /// 8 random bytes.
    #[prost(bytes = "bytes", tag = "4")]
    pub nonce: Bytes,
    /// Over the serialized request with this field empty.
    #[prost(bytes = "bytes", tag = "5")]
    pub signature: Bytes,
}

/// Accompanies an answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResponseAuthInfo {
    /// The callee's token.
    #[prost(message, optional, tag = "1")]
    pub service_access_token: Option<AccessToken>,
    /// The request's nonce.
    #[prost(bytes = "bytes", tag = "2")]
    pub nonce: Bytes,
    /// Over the serialized answer with this field empty.
    #[prost(bytes = "bytes", tag = "3")]
    pub signature: Bytes,
}
