//! `crypto.proto` (proto2): keys as libp2p stores them and derives peer ids from.

use bytes::Bytes;

/// Kind of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum KeyType {
    /// RSA; what hivemind's identity files hold.
    Rsa = 0,
    /// Ed25519; what p2pd makes without an identity file.
    Ed25519 = 1,
    /// secp256k1.
    Secp256k1 = 2,
    /// ECDSA.
    Ecdsa = 3,
}

/// A public key; its serialized form is what a peer id is the hash of.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PublicKey {
    /// A [`KeyType`] as a number.
    #[prost(enumeration = "KeyType", required, tag = "1")]
    pub key_type: i32,
    /// For RSA a SubjectPublicKeyInfo in DER.
    #[prost(bytes = "bytes", required, tag = "2")]
    pub data: Bytes,
}

/// A private key; the content of an identity file.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
pub struct PrivateKey {
    /// A [`KeyType`] as a number.
    #[prost(enumeration = "KeyType", required, tag = "1")]
    pub key_type: i32,
    /// For RSA a PKCS#1 RSAPrivateKey in DER.
    #[prost(bytes = "bytes", required, tag = "2")]
    pub data: Bytes,
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrivateKey {{ key_type: {}, data: (secret) }}", self.key_type)
    }
}
