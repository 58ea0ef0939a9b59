//! What can go wrong outside of calls.

use std::io;

use multiaddr::Multiaddr;

/// Why the network did not start, or an address is none of a peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// A setting has no sensible meaning.
    #[error("network setting {key}: {reason}")]
    Config {
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// Another program listens there.
    #[error(
        "cannot listen on {address}: the port is in use; stop the other program, or choose another port (0 picks a free one)"
    )]
    AddressInUse {
        /// The address asked for.
        address: Multiaddr,
    },
    /// The operating system forbids it.
    #[error("cannot listen on {address}: permission denied; ports below 1024 need privileges, choose a higher one")]
    Permission {
        /// The address asked for.
        address: Multiaddr,
    },
    /// The address belongs to another machine.
    #[error("cannot listen on {address}: this machine has no such address; /ip4/0.0.0.0/… listens on all it has")]
    NotOurs {
        /// The address asked for.
        address: Multiaddr,
    },
    /// No transport of ours can listen there.
    #[error(
        "cannot listen on {address}: only addresses like /ip4/127.0.0.1/tcp/31337 or /ip6/::1/tcp/31337 are supported"
    )]
    Unsupported {
        /// The address asked for.
        address: Multiaddr,
    },
    /// Listening failed for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: Multiaddr,
        /// The operating system's words.
        source: io::Error,
    },
    /// The network's thread or one of its parts did not start.
    #[error("cannot start the network: {0}")]
    Start(#[source] io::Error),
    /// The text is no multiaddr.
    #[error("{address:?} is no multiaddr ({reason}); one looks like /ip4/10.0.0.1/tcp/31337/p2p/12D3Koo…")]
    Parse {
        /// The text.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The multiaddr does not say which peer is meant.
    #[error("{address} names no peer; append /p2p/ and the peer id that the node printed when it started")]
    NoPeerId {
        /// The address.
        address: Multiaddr,
    },
}
