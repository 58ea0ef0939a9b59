//! Protobuf messages of hivemind and libp2p, checked in: no protoc at build time (wire document §4).

pub mod runtime;
