//! The methods that peers call on each other (docs/wire.md §2.1).

use std::fmt;

use serde::{Deserialize, Serialize};

/// A remote procedure, whatever framing carries it. On the native wire its number is its place in this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Method {
    /// `DHTProtocol.rpc_ping`
    Ping,
    /// `DHTProtocol.rpc_store`
    Store,
    /// `DHTProtocol.rpc_find`
    Find,
    /// `ConnectionHandler.rpc_info`
    Info,
    /// `ConnectionHandler.rpc_forward`, and `…_stream` above 2 MiB
    Forward,
    /// `ConnectionHandler.rpc_backward`, and `…_stream` above 2 MiB
    Backward,
}

/// How one call travels on hivemind's wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Framing {
    /// One message each way (docs/wire.md §2).
    Unary,
    /// A stream of messages each way (docs/wire.md §3).
    Stream,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 6] =
        [Method::Ping, Method::Store, Method::Find, Method::Info, Method::Forward, Method::Backward];

    /// The handler name of the unary form; it is the libp2p protocol name, without a leading slash.
    pub const fn unary_name(self) -> &'static str {
        match self {
            Method::Ping => "DHTProtocol.rpc_ping",
            Method::Store => "DHTProtocol.rpc_store",
            Method::Find => "DHTProtocol.rpc_find",
            Method::Info => "ConnectionHandler.rpc_info",
            Method::Forward => "ConnectionHandler.rpc_forward",
            Method::Backward => "ConnectionHandler.rpc_backward",
        }
    }

    /// The handler name of the streaming form, where there is one.
    pub const fn stream_name(self) -> Option<&'static str> {
        match self {
            Method::Forward => Some("ConnectionHandler.rpc_forward_stream"),
            Method::Backward => Some("ConnectionHandler.rpc_backward_stream"),
            _ => None,
        }
    }

    /// Finds method and framing of a handler name.
    pub fn from_name(name: &str) -> Option<(Method, Framing)> {
        Method::ALL.into_iter().find_map(|m| match name {
            n if n == m.unary_name() => Some((m, Framing::Unary)),
            n if Some(n) == m.stream_name() => Some((m, Framing::Stream)),
            _ => None,
        })
    }

    /// Whether the native wire carries it. The DHT stays on hivemind's wire, so that all nodes live in one.
    pub const fn is_native(self) -> bool {
        matches!(self, Method::Info | Method::Forward | Method::Backward)
    }

    /// Whether body and answer are tensors rather than one opaque message.
    pub const fn carries_tensors(self) -> bool {
        matches!(self, Method::Forward | Method::Backward)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.unary_name();
        f.write_str(name.rsplit('.').next().unwrap_or(name))
    }
}
