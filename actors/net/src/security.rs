//! How a connection is secured: TLS 1.3 or noise, each proving the peer's id.
//!
//! A dialler of ours proposes TLS first. Peers of hivemind propose noise first and get it. TLS is libp2p's
//! (<https://github.com/libp2p/specs/blob/master/tls/tls.md>) with an order of ciphers of our own: `libp2p-tls` puts
//! ChaCha20 first, which costs about three times as much as AES where the processor has instructions for that. Session
//! keys are never logged.

use std::{io, net::Ipv4Addr, sync::Arc};

use futures::{
    AsyncRead, AsyncWrite, FutureExt as _,
    future::{BoxFuture, Either},
    io::{BufReader, BufWriter},
};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    noise,
};
use libp2p_identity::Keypair;
use libp2p_tls::certificate;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme, SupportedCipherSuite,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs::{self, cipher_suite},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

const TLS: &str = "/tls/1.0.0";
const NOISE: &str = "/noise";
/// What libp2p says in ALPN.
const ALPN: &[u8] = b"libp2p";

/// TLS, if offered, then noise.
#[derive(Clone)]
pub(crate) struct Security {
    tls: Option<Tls>,
    noise: noise::Config,
}

/// How both sides of TLS are configured.
#[derive(Clone)]
pub(crate) struct Tls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

impl Security {
    pub(crate) fn new(identity: &Keypair, with_tls: bool) -> io::Result<Self> {
        let tls = with_tls.then(|| Tls::new(identity)).transpose()?;
        Ok(Self { tls, noise: noise::Config::new(identity).map_err(io::Error::other)? })
    }

    fn tls(self) -> io::Result<Tls> {
        self.tls.ok_or_else(|| io::Error::other("TLS was agreed on without being offered"))
    }
}

impl Tls {
    pub(crate) fn new(identity: &Keypair) -> io::Result<Self> {
        let (certificate, key) = certificate::generate(identity).map_err(io::Error::other)?;
        let mut provider = aws_lc_rs::default_provider();
        provider.cipher_suites = cipher_suites();
        let key = provider.key_provider.load_private_key(key).map_err(io::Error::other)?;
        let ours = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
        let provider = Arc::new(provider);
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier))
            .with_client_cert_resolver(ours.clone());
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.enable_sni = false;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .with_client_cert_verifier(Arc::new(Verifier))
            .with_cert_resolver(ours);
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// The dialler's order decides. AES is the faster one only with instructions for it.
fn cipher_suites() -> Vec<SupportedCipherSuite> {
    let aes = [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
    let chacha = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
    match has_aes() {
        true => vec![aes[0], aes[1], chacha],
        false => vec![chacha, aes[0], aes[1]],
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

impl UpgradeInfo for Security {
    type Info = &'static str;
    type InfoIter = std::iter::Chain<std::option::IntoIter<&'static str>, std::iter::Once<&'static str>>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.tls.as_ref().map(|_| TLS).into_iter().chain(std::iter::once(NOISE))
    }
}

/// Bytes of a muxer's frame at most: four full records of TLS.
pub(crate) const FRAME: usize = 4 << 14;
/// Above TLS: header and body of a frame are encrypted together and sent with one system call.
const WRITE_BUFFER: usize = FRAME;
/// Below TLS, which reads 4 KiB at a time.
const READ_BUFFER: usize = 32 << 10;

type Tls13<C> = BufWriter<TlsStream<BufReader<C>>>;
type Secured<C> = Either<Tls13<C>, noise::Output<C>>;

fn write_buffered<C: AsyncRead + AsyncWrite + Unpin>(stream: TlsStream<BufReader<C>>) -> Tls13<C> {
    BufWriter::with_capacity(WRITE_BUFFER, stream)
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: C, name: &'static str) -> Self::Future {
        async move {
            if name == TLS {
                let stream =
                    TlsAcceptor::from(self.tls()?.server).accept(BufReader::with_capacity(READ_BUFFER, socket)).await?;
                let peer = peer_of(stream.get_ref().1.peer_certificates())?;
                return Ok((peer, Either::Left(write_buffered(stream.into()))));
            }
            let (peer, stream) = self.noise.upgrade_inbound(socket, name).await.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
        }
        .boxed()
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: C, name: &'static str) -> Self::Future {
        async move {
            if name == TLS {
                // Names mean nothing here: the certificate proves a peer id.
                let nobody = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
                let stream = TlsConnector::from(self.tls()?.client)
                    .connect(nobody, BufReader::with_capacity(READ_BUFFER, socket))
                    .await?;
                let peer = peer_of(stream.get_ref().1.peer_certificates())?;
                return Ok((peer, Either::Left(write_buffered(stream.into()))));
            }
            let (peer, stream) = self.noise.upgrade_outbound(socket, name).await.map_err(io::Error::other)?;
            Ok((peer, Either::Right(stream)))
        }
        .boxed()
    }
}

fn peer_of(certificates: Option<&[CertificateDer<'_>]>) -> io::Result<PeerId> {
    let [certificate] = certificates.unwrap_or_default() else {
        return Err(io::Error::other("the peer showed no certificate"));
    };
    Ok(certificate::parse(certificate).map_err(io::Error::other)?.peer_id())
}

/// Certificates are the peers' own; what counts is the identity's signature inside and that of the handshake.
#[derive(Debug)]
struct Verifier;

fn invalid(error: impl std::fmt::Display) -> Error {
    Error::General(error.to_string())
}

fn check(certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
    if !others.is_empty() {
        return Err(invalid("a chain of certificates instead of one"));
    }
    certificate::parse(certificate).map(drop).map_err(invalid)
}

fn check_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let certificate = certificate::parse(certificate).map_err(invalid)?;
    certificate.verify_signature(signed.scheme, message, signed.signature()).map_err(invalid)?;
    Ok(HandshakeSignatureValid::assertion())
}

/// Those of libp2p's TLS specification.
fn schemes() -> Vec<SignatureScheme> {
    vec![
        SignatureScheme::ECDSA_NISTP256_SHA256,
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ED25519,
        SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::RSA_PSS_SHA384,
        SignatureScheme::RSA_PSS_SHA512,
        SignatureScheme::RSA_PKCS1_SHA256,
        SignatureScheme::RSA_PKCS1_SHA384,
        SignatureScheme::RSA_PKCS1_SHA512,
    ]
}

fn too_old() -> Error {
    invalid("TLS 1.3 only")
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        check(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::{KeyKind, generate},
        pipe::Pipe,
    };

    fn keypair(kind: KeyKind) -> Keypair {
        generate(kind).unwrap().keypair().clone()
    }

    /// Both ends of a connection, and what the two agreed on.
    async fn handshake(dialler: &Keypair, listener: &Keypair, name: &'static str) -> (PeerId, PeerId, Option<String>) {
        let (one, other) = Pipe::pair(1 << 16);
        let dial = Security::new(dialler, true).unwrap().upgrade_outbound(one, name);
        let listen = Security::new(listener, true).unwrap().upgrade_inbound(other, name);
        let ((seen_by_dialler, stream), (seen_by_listener, _listening)) = futures::try_join!(dial, listen).unwrap();
        let suite = match &stream {
            Either::Left(tls) => {
                tls.get_ref().get_ref().1.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()))
            }
            Either::Right(_) => None,
        };
        (seen_by_dialler, seen_by_listener, suite)
    }

    #[tokio::test]
    async fn tls_and_noise_prove_the_ids_of_both_kinds_of_keys() {
        let (ed, rsa) = (keypair(KeyKind::Ed25519), keypair(KeyKind::Rsa));
        let (ed_id, rsa_id) = (ed.public().to_peer_id(), rsa.public().to_peer_id());
        for name in [TLS, NOISE] {
            let (seen_by_dialler, seen_by_listener, suite) = handshake(&ed, &rsa, name).await;
            assert_eq!((seen_by_dialler, seen_by_listener, suite.is_some()), (rsa_id, ed_id, name == TLS));
        }
    }

    #[tokio::test]
    async fn aes_is_taken_where_the_processor_has_it() {
        let (one, other) = (keypair(KeyKind::Ed25519), keypair(KeyKind::Ed25519));
        let (.., suite) = handshake(&one, &other, TLS).await;
        let expected = if has_aes() { "TLS13_AES_128_GCM_SHA256" } else { "TLS13_CHACHA20_POLY1305_SHA256" };
        assert_eq!(suite.as_deref(), Some(expected));
    }

    #[test]
    fn tls_is_proposed_first_and_only_if_wanted() {
        let names = |tls| Security::new(&keypair(KeyKind::Ed25519), tls).unwrap().protocol_info().collect::<Vec<_>>();
        assert_eq!((names(true), names(false)), (vec![TLS, NOISE], vec![NOISE]));
    }

    #[test]
    fn a_certificate_that_proves_no_peer_id_is_refused() {
        let junk = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert!(check(&junk, &[]).is_err());
        let (certificate, _) = certificate::generate(&keypair(KeyKind::Ed25519)).unwrap();
        check(&certificate, &[]).unwrap();
        assert!(check(&certificate, std::slice::from_ref(&certificate)).is_err());
        let mut torn = certificate.to_vec();
        let end = torn.len() - 1;
        torn[end] ^= 1;
        assert!(check(&CertificateDer::from(torn), &[]).is_err());
    }
}
