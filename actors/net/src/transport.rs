//! How bytes reach another peer: TCP (no delay) with DNS names, TLS or noise, yamux, slash-less names.

use std::{io, time::Duration};

use libp2p::{
    Transport as _,
    core::{muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    dns, tcp,
};
use libp2p_identity::{Keypair, PeerId};
use tracing::warn;

use crate::{muxer::Yamux, security::Security, slashless::Slashless};

/// Builds the transport. Must be called inside a tokio runtime.
pub(crate) fn build(
    identity: &Keypair,
    with_tls: bool,
    handshake_timeout: Duration,
) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    // Without `nodelay` large bodies travel eight times slower.
    let tcp = || tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let named = dns::tokio::Transport::system(tcp()).unwrap_or_else(|error| {
        warn!(%error, "no DNS configuration on this machine: only numeric addresses can be dialled");
        dns::tokio::Transport::custom(tcp(), dns::ResolverConfig::default(), dns::ResolverOpts::default())
    });
    Ok(named
        .upgrade(Version::V1)
        .authenticate(Security::new(identity, with_tls)?)
        .multiplex(Yamux::new())
        .timeout(handshake_timeout)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(Slashless(muxer))))
        .boxed())
}
