//! [`RuntimeBuilder`]: says what a runtime should be, then starts it.

use std::{fmt::Display, path::PathBuf, sync::Arc, time::Duration};

use multiaddr::Multiaddr;
use skep_dht::{DhtConfig, Validators};
use skep_expert::{CheckpointStore, DirectoryCheckpoints, ServerConfig, SharedStore};
use skep_kernel::{Seed, SharedClock, TokioClock};
use skep_net::{
    Net, NetConfig,
    identity::{self, Identity, KeyKind},
};
use skep_rpc::{Router, Transport};

use super::{Experts, Runtime, system};
use crate::error::Error;

/// Where the peer id comes from.
enum Key {
    Fresh,
    File(PathBuf),
    Given(Box<Identity>),
}

/// Describes a [`Runtime`]. Without anything said it listens on loopback, hosts nothing and starts a network of its own.
pub struct RuntimeBuilder {
    net: NetConfig,
    dht: DhtConfig,
    validators: Validators,
    server: ServerConfig,
    key: Key,
    initial_peers: Vec<Multiaddr>,
    groups: Vec<Experts>,
    checkpoint_dir: Option<PathBuf>,
    start_timeout: Duration,
    seed: Option<u64>,
    mistake: Option<Error>,
}

impl Default for RuntimeBuilder {
    fn default() -> Self {
        Self {
            net: NetConfig { listen: Vec::new(), ..NetConfig::default() },
            dht: DhtConfig::default(),
            validators: Validators::default(),
            server: ServerConfig::default(),
            key: Key::Fresh,
            initial_peers: Vec::new(),
            groups: Vec::new(),
            checkpoint_dir: None,
            start_timeout: Duration::from_secs(60),
            seed: None,
            mistake: None,
        }
    }
}

impl RuntimeBuilder {
    /// Listens on this address too, as in `/ip4/127.0.0.1/tcp/0`. A text that is no multiaddr fails at the start.
    pub fn listen<A: TryInto<Multiaddr>>(mut self, address: A) -> Self
    where
        A::Error: Display,
    {
        match address.try_into() {
            Ok(address) => self.net.listen.push(address),
            Err(error) => self.mistake(format!("listen: {error}; an address looks like /ip4/127.0.0.1/tcp/0")),
        }
        self
    }

    /// Joins the network of these peers, each address with its `/p2p/…`.
    pub fn initial_peers(mut self, peers: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.initial_peers.extend(peers);
        self
    }

    /// Only asks: listens nowhere, stores and serves nothing.
    pub fn client_mode(mut self) -> Self {
        self.net.client_mode = true;
        self.dht.client_mode = true;
        self
    }

    /// Hosts a group of experts.
    pub fn host(mut self, experts: Experts) -> Self {
        self.groups.push(experts);
        self
    }

    /// Keeps checkpoints of the hosted experts in this folder, which is made when it does not exist, and lets experts
    /// continue from them at the start. Experts that have one are hosted before others of their group's pattern.
    /// [`server_config`](Self::server_config) says how often they are taken and how many are kept.
    pub fn checkpoint_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.checkpoint_dir = Some(path.into());
        self
    }

    /// Keeps the peer id in a file, which is made when it does not exist.
    pub fn identity_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.key = Key::File(path.into());
        self
    }

    /// Uses this key.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.key = Key::Given(Box::new(identity));
        self
    }

    /// How long [`start`](Self::start) waits until everything is ready; 60 s unless said otherwise.
    pub fn start_timeout(mut self, wait: Duration) -> Self {
        self.start_timeout = wait;
        self
    }

    /// Decides what the DHT node believes and signs, instead of the default: signatures of owned records are checked,
    /// entries of expert grids must be what they claim, nothing is signed.
    pub fn validators(mut self, validators: Validators) -> Self {
        self.validators = validators;
        self
    }

    /// Makes random choices repeatable: DHT node id, placement of experts, jitter. The peer id stays random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Limits and timeouts of the network.
    pub fn net_config(&mut self) -> &mut NetConfig {
        &mut self.net
    }

    /// Parameters of the DHT protocol.
    pub fn dht_config(&mut self) -> &mut DhtConfig {
        &mut self.dht
    }

    /// How experts batch, wait and announce.
    pub fn server_config(&mut self) -> &mut ServerConfig {
        &mut self.server
    }

    fn mistake(&mut self, text: String) {
        self.mistake.get_or_insert(Error::Invalid(text));
    }

    /// Starts the runtime and waits until it is [ready](Runtime::ready). Blocks; not from skep's own threads.
    pub fn start(self) -> Result<Runtime, Error> {
        let wait = self.start_timeout;
        let runtime = self.launch()?;
        runtime.ready(wait)?;
        Ok(runtime)
    }

    /// [`start`](Self::start) without blocking the calling thread.
    pub async fn start_async(self) -> Result<Runtime, Error> {
        let wait = self.start_timeout;
        let runtime = self.launch()?;
        runtime.ready_async(wait).await?;
        Ok(runtime)
    }

    /// Starts the runtime without waiting for its experts or for the network that it joins. Blocks only until the
    /// listening sockets are bound and the folder of checkpoints is listed.
    pub fn launch(mut self) -> Result<Runtime, Error> {
        if let Some(mistake) = self.mistake {
            return Err(mistake);
        }
        if self.net.listen.is_empty() && !self.net.client_mode {
            self.net.listen = NetConfig::default().listen;
        }
        let identity = match self.key {
            Key::Fresh => identity::generate(KeyKind::Ed25519)?,
            Key::File(path) => identity::load_or_create(&path, KeyKind::Rsa)?,
            Key::Given(identity) => *identity,
        };
        let mut initial_peers = Vec::new();
        for address in &self.initial_peers {
            let peer = peer_of(address).ok_or_else(|| {
                Error::Invalid(format!("{address} does not say which peer is there; end it with /p2p/ and the peer id"))
            })?;
            initial_peers.push((peer, address.clone()));
        }
        let (checkpoints, kept) = match self.checkpoint_dir {
            Some(path) if !self.groups.is_empty() => {
                let store = DirectoryCheckpoints::open(path)?;
                let kept = store.experts()?;
                (Some(Arc::new(store) as SharedStore), kept)
            }
            _ => (None, Vec::new()),
        };
        let seed = match self.seed {
            Some(seed) => Seed::new(seed),
            None => Seed::random(),
        };
        let clock: SharedClock = Arc::new(TokioClock::system());
        let router = Router::new();
        let net = Net::start(self.net, identity.keypair().clone(), router.clone(), clock.clone())?;
        for (peer, address) in &initial_peers {
            net.add_addresses(*peer, vec![address.clone()]);
        }
        let parts = system::Parts {
            net,
            router,
            clock,
            seed,
            dht: self.dht,
            validators: self.validators,
            initial_peers: initial_peers.into_iter().map(|(peer, _)| peer).collect(),
            server: self.server,
            groups: self.groups,
            checkpoints,
            kept,
        };
        system::start(parts)
    }
}

/// The peer id at the end of a multiaddr.
pub(crate) fn peer_of(address: &Multiaddr) -> Option<libp2p_identity::PeerId> {
    address.iter().find_map(|part| match part {
        multiaddr::Protocol::P2p(peer) => Some(peer),
        _ => None,
    })
}
