//! What the network rests on, bare: for benchmarks that ask how much of it is left.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
};

use libp2p_identity::Keypair;
use rustls::{ClientConnection, ServerConnection, StreamOwned, pki_types::ServerName};

use crate::security::Tls;

/// Both ends of a TCP connection over loopback, without delay.
pub fn tcp_pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Both ends of a TLS connection over loopback, with the library, ciphers and certificates of the network, but blocking and
/// with nothing above. They shake hands when they are first used, each by a thread of its own.
pub fn tls_pair() -> io::Result<(impl Read + Write + Send, impl Read + Write + Send)> {
    let (near, far) = tcp_pair()?;
    let tls = Tls::new(&Keypair::generate_ed25519())?;
    let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
    let client = ClientConnection::new(tls.client, name).map_err(io::Error::other)?;
    let server = ServerConnection::new(tls.server).map_err(io::Error::other)?;
    Ok((StreamOwned::new(client, near), StreamOwned::new(server, far)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        let (mut near, mut far) = tls_pair().unwrap();
        let echo = std::thread::Builder::new().spawn(move || {
            let mut word = [0; 4];
            far.read_exact(&mut word).unwrap();
            far.write_all(&word).unwrap();
            far.flush().unwrap();
        });
        near.write_all(b"word").unwrap();
        let mut back = [0; 4];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"word");
        echo.unwrap().join().unwrap();
    }
}
