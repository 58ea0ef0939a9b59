//! Why an address cannot be listened on.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener},
};

use libp2p::{Multiaddr, TransportError};
use multiaddr::Protocol;

use crate::NetError;

/// Fails when somebody listens at the address already. libp2p's sockets allow others to share their port, which would
/// give each of two nodes some of the other's connections; this one, bound for a moment, does not.
pub(crate) fn refuse_taken(address: &Multiaddr) -> Result<(), NetError> {
    match socket_address(address).map(TcpListener::bind) {
        Some(Err(error)) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(NetError::AddressInUse { address: address.clone() })
        }
        // What else may be wrong is found when the address is listened on.
        _ => Ok(()),
    }
}

fn socket_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) if port != 0 => Some((ip, port).into()),
        _ => None,
    }
}

/// What libp2p says when it cannot listen, with the remedy.
pub(crate) fn refused(address: &Multiaddr, error: TransportError<io::Error>) -> NetError {
    let address = address.clone();
    match error {
        TransportError::MultiaddrNotSupported(_) => NetError::Unsupported { address },
        TransportError::Other(source) => match root(&source).kind() {
            io::ErrorKind::AddrInUse => NetError::AddressInUse { address },
            io::ErrorKind::PermissionDenied => NetError::Permission { address },
            io::ErrorKind::AddrNotAvailable => NetError::NotOurs { address },
            _ => NetError::Listen { address, source },
        },
    }
}

/// The innermost I/O error: transports wrap what the operating system says.
pub(crate) fn root(error: &io::Error) -> &io::Error {
    type Inner<'a> = &'a (dyn std::error::Error + 'static);
    // The source of a wrapping I/O error is that of what it wraps, which would be passed over.
    fn wrapped(error: &io::Error) -> Option<Inner<'_>> {
        error.get_ref().map(|inner| inner as Inner<'_>)
    }
    let (mut root, mut next) = (error, wrapped(error));
    while let Some(inner) = next {
        next = match inner.downcast_ref::<io::Error>() {
            Some(inner) => {
                root = inner;
                wrapped(inner)
            }
            None => inner.source(),
        };
    }
    root
}
