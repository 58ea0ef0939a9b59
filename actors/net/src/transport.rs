//! How bytes reach another peer: TCP (no delay) with DNS names, TLS or noise, yamux, slash-less names.

use std::{io, time::Duration};

use libp2p::{
    Transport as _,
    core::{muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    dns, tcp, yamux,
};
use libp2p_identity::{Keypair, PeerId};
use tracing::warn;

use crate::{security::Security, slashless::Slashless};

/// Streams that a connection may carry at once. A Python mixture opens one per sample and expert, and yamux ends a
/// connection at the limit; 4096 is the most that yamux allows.
pub(crate) const MAX_STREAMS: usize = 4096;

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
    let mut yamux = yamux::Config::default();
    yamux.set_max_num_streams(MAX_STREAMS);
    Ok(named
        .upgrade(Version::V1)
        .authenticate(Security::new(identity, with_tls)?)
        .multiplex(yamux)
        .timeout(handshake_timeout)
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(Slashless(muxer))))
        .boxed())
}
