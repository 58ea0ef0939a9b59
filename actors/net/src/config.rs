//! What one may set about the network.

use std::time::Duration;

use libp2p_identity::PeerId;
use multiaddr::{Multiaddr, Protocol};
use serde::{Deserialize, Serialize};

use crate::{NetError, budget, muxer};

/// Beyond this a network that is hardly used costs a core.
const MAX_BUSY_POLL: Duration = Duration::from_millis(10);

/// Configuration of [`Net`](crate::Net). Unknown keys are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// Addresses to listen on; port 0 picks a free one. Ignored in client mode. Default: loopback, so that nobody else
    /// can reach the experts until asked for.
    pub listen: Vec<Multiaddr>,
    /// Addresses to tell others instead of those listened on, for a node behind a forwarded port.
    pub announce: Vec<Multiaddr>,
    /// Only asks: does not listen, serves nothing, and others do not route through it.
    pub client_mode: bool,
    /// If given, only these peers may connect and be called.
    #[serde(with = "peer_ids")]
    pub allow_peers: Option<Vec<PeerId>>,
    /// Whether expert calls travel on skep's own wire where the other side offers it, true. Off, everything travels on
    /// hivemind's, which carries neither request ids nor typed errors.
    pub native: bool,
    /// Whether TLS is offered beside noise, and preferred where the other side offers both, true. On a processor with AES
    /// instructions it costs less than noise.
    pub tls: bool,
    /// Threads that carry connections, 1, which is fastest up to some 100 000 small calls or 1 GB a second.
    pub threads: usize,
    /// How long such a thread looks for more after it had something to do, before it sleeps, 100 µs; zero: not at all. Lets
    /// others run meanwhile. Makes a small call several times as fast: to wake a sleeping core takes about 30 µs.
    #[serde(with = "seconds_or_zero")]
    pub busy_poll: Duration,
    /// How much the network may take.
    pub limits: NetLimits,
    /// How long its steps may take.
    pub timeouts: NetTimeouts,
}

/// Limits of the network; each protects this node from its peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetLimits {
    /// Connections in all, 512. Over it a new connection is refused.
    pub max_connections: usize,
    /// Connections kept for peers that speak our protocols, 256. When others hold all the rest, one of theirs is closed for
    /// a new one: of a peer that said by identify that it speaks none of our protocols, else the oldest.
    pub reserved_connections: usize,
    /// Expert calls served at once, 1024, and as many DHT calls. Over it a call is refused at once.
    pub max_inbound_calls: usize,
    /// Streams that a peer may have open on one connection, 2048. Over it a stream is reset.
    pub max_inbound_streams: usize,
    /// Bytes of requests held at once, 1 GiB. Over it a call is refused at once.
    pub max_inbound_bytes: usize,
    /// Bytes of answers to our own calls that arrive or wait for their callers at once, 1 GiB. Over it a call fails with
    /// [`RpcError::NoRoom`](skep_rpc::RpcError::NoRoom).
    pub max_answer_bytes: usize,
    /// Bytes of one request or answer that travels as a stream or on skep's own wire, 256 MiB; at most as many as may be
    /// held at once, and below 4 GiB.
    pub max_body_bytes: usize,
    /// Peers whose addresses are remembered, 4096. Over it those unheard of for longest are forgotten.
    pub max_known_peers: usize,
}

/// Timeouts of the network, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetTimeouts {
    /// From a socket to an authenticated connection, 15 s.
    #[serde(with = "seconds")]
    pub handshake: Duration,
    /// Agreeing on the protocol of a stream, 10 s.
    #[serde(with = "seconds")]
    pub negotiation: Duration,
    /// Looking for the addresses of a peer, 10 s.
    #[serde(with = "seconds")]
    pub resolve: Duration,
    /// Without streams for so long a connection is closed, 600 s.
    #[serde(with = "seconds")]
    pub idle: Duration,
    /// A caller must have sent its request after so long, 60 s.
    #[serde(with = "seconds")]
    pub read_request: Duration,
    /// A caller must have taken its answer after so long, 60 s.
    #[serde(with = "seconds")]
    pub write_answer: Duration,
    /// How long callers on hivemind's wire, which tell no deadline, are served, 300 s.
    #[serde(with = "seconds")]
    pub legacy_deadline: Duration,
}

impl Default for NetConfig {
    fn default() -> Self {
        let loopback = Multiaddr::empty().with(Protocol::Ip4([127, 0, 0, 1].into())).with(Protocol::Tcp(0));
        Self {
            listen: vec![loopback],
            announce: Vec::new(),
            client_mode: false,
            allow_peers: None,
            native: true,
            tls: true,
            threads: 1,
            busy_poll: Duration::from_micros(100),
            limits: NetLimits::default(),
            timeouts: NetTimeouts::default(),
        }
    }
}

impl Default for NetLimits {
    fn default() -> Self {
        Self {
            max_connections: 512,
            reserved_connections: 256,
            max_inbound_calls: 1024,
            max_inbound_streams: 2048,
            max_inbound_bytes: 1 << 30,
            max_answer_bytes: 1 << 30,
            max_body_bytes: 256 << 20,
            max_known_peers: 4096,
        }
    }
}

impl Default for NetTimeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(15),
            negotiation: Duration::from_secs(10),
            resolve: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            read_request: Duration::from_secs(60),
            write_answer: Duration::from_secs(60),
            legacy_deadline: Duration::from_secs(300),
        }
    }
}

impl NetConfig {
    /// A node that only asks.
    pub fn client() -> Self {
        Self { listen: Vec::new(), client_mode: true, ..Self::default() }
    }

    /// Checks what types cannot.
    pub fn validate(&self) -> Result<(), NetError> {
        let limits = &self.limits;
        let zero = [
            ("threads", self.threads),
            ("max_connections", limits.max_connections),
            ("max_inbound_calls", limits.max_inbound_calls),
            ("max_inbound_streams", limits.max_inbound_streams),
            ("max_inbound_bytes", limits.max_inbound_bytes),
            ("max_answer_bytes", limits.max_answer_bytes),
            ("max_body_bytes", limits.max_body_bytes),
            ("max_known_peers", limits.max_known_peers),
        ];
        let invalid = |key, reason: &str| Err(NetError::Config { key, reason: reason.to_owned() });
        if let Some((key, _)) = zero.into_iter().find(|(_, value)| *value == 0) {
            return invalid(key, "must be at least 1");
        }
        if u32::try_from(limits.max_body_bytes).is_err() {
            return invalid("max_body_bytes", "must be below 4 GiB");
        }
        for (key, bytes) in
            [("max_inbound_bytes", limits.max_inbound_bytes), ("max_answer_bytes", limits.max_answer_bytes)]
        {
            if bytes < limits.max_body_bytes {
                return invalid(key, "must be at least max_body_bytes, or bodies of that size would never fit");
            }
            if bytes > budget::MAX_BYTES {
                return invalid(key, "is more than can be counted");
            }
        }
        if self.busy_poll > MAX_BUSY_POLL {
            return invalid("busy_poll", "must be at most 0.01 s");
        }
        if limits.reserved_connections >= limits.max_connections {
            return invalid("reserved_connections", "must be below max_connections");
        }
        if limits.max_inbound_streams > muxer::MAX_STREAMS {
            return invalid("max_inbound_streams", "must be at most 4096, the most that yamux allows");
        }
        if !self.client_mode && self.listen.is_empty() {
            return invalid("listen", "names no address; set client_mode for a node that only asks");
        }
        Ok(())
    }
}

mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(duration.as_secs_f64())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        match Duration::try_from_secs_f64(seconds) {
            Ok(duration) if !duration.is_zero() => Ok(duration),
            _ => Err(D::Error::custom(format!("{seconds} is no number of seconds above 0"))),
        }
    }
}

mod seconds_or_zero {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

    pub use super::seconds::serialize;

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(seconds).map_err(|_| D::Error::custom(format!("{seconds} is no number of seconds")))
    }
}

mod peer_ids {
    use libp2p_identity::PeerId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(peers: &Option<Vec<PeerId>>, serializer: S) -> Result<S::Ok, S::Error> {
        peers.as_ref().map(|peers| peers.iter().map(|peer| peer.to_base58()).collect::<Vec<_>>()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<PeerId>>, D::Error> {
        let texts = Option::<Vec<String>>::deserialize(deserializer)?;
        let parse = |text: String| text.parse().map_err(|e| D::Error::custom(format!("{text} is no peer id: {e}")));
        texts.map(|texts| texts.into_iter().map(parse).collect()).transpose()
    }
}
