//! Servers of a simulation: real DHT nodes and real experts over the simulated network.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use skep_dht::{Dht, DhtConfig, DhtParts};
use skep_expert::{Backend, BackendFactory, Executors, HostedExpert, Server, ServerConfig, ServerParts};
use skep_kernel::Deadline;
use skep_moe::Client;
use skep_rpc::{Bans, Router, SharedTransport};
use skep_wire::ExpertUid;

use crate::{Recording, ScriptedBackend, Sim};

/// Virtual time within which servers and clients must have started.
const START: Duration = Duration::from_secs(60);

/// Servers about to start: which experts, what they compute, what that costs.
pub struct Servers<'a> {
    sim: &'a Sim,
    count: usize,
    uids: Vec<ExpertUid>,
    backend: Box<dyn Fn(&ExpertUid) -> ScriptedBackend>,
    cost: Duration,
    config: ServerConfig,
}

impl Sim {
    /// So many servers, which share the experts out among them.
    pub fn servers(&self, count: usize) -> Servers<'_> {
        Servers {
            sim: self,
            count,
            uids: Vec::new(),
            backend: Box::new(|_| ScriptedBackend::scale(4, 2.0)),
            cost: Duration::ZERO,
            config: ServerConfig::default(),
        }
    }
}

impl Servers<'_> {
    /// Hosts these experts.
    ///
    /// # Panics
    /// When one is no uid.
    pub fn experts<'u>(mut self, uids: impl IntoIterator<Item = &'u str>) -> Self {
        self.uids.extend(uids.into_iter().map(|uid| uid.parse::<ExpertUid>().expect("a uid")));
        self
    }

    /// Hosts an expert on every place of a grid.
    ///
    /// # Panics
    /// When `prefix` is no bare name with a dot.
    pub fn grid(mut self, prefix: &str, sizes: &[u64]) -> Self {
        let mut names = vec![prefix.strip_suffix('.').expect("a prefix ends with a dot").to_owned()];
        for size in sizes {
            names = names.iter().flat_map(|name| (0..*size).map(move |i| format!("{name}.{i}"))).collect();
        }
        self.uids.extend(names.iter().map(|name| name.parse::<ExpertUid>().expect("a uid")));
        self
    }

    /// What every expert computes.
    pub fn backend(self, backend: ScriptedBackend) -> Self {
        self.backend_by_uid(move |_| backend.recorded_anew())
    }

    /// What each expert computes.
    pub fn backend_by_uid(mut self, backend: impl Fn(&ExpertUid) -> ScriptedBackend + 'static) -> Self {
        self.backend = Box::new(backend);
        self
    }

    /// What each batch costs in virtual time.
    pub fn costing(mut self, cost: Duration) -> Self {
        self.cost = cost;
        self
    }

    /// How they batch, wait and announce.
    pub fn config(mut self, config: ServerConfig) -> Self {
        self.config = config;
        self
    }

    /// Starts a DHT node that nobody touches and the servers; returns when all experts are announced.
    ///
    /// # Panics
    /// When a server is not ready within a minute.
    pub async fn start(self) -> Hive {
        let bootstrap = self.sim.dht_node(0, Router::new(), &[]).1;
        let initial_peers = [bootstrap.local_peer()];
        let mut servers = Vec::new();
        for number in 0..self.count {
            let uids = self.uids.iter().skip(number).step_by(self.count);
            servers.push(self.start_one(number as u64 + 1, uids, &initial_peers));
        }
        for server in &servers {
            server.server.ready(Deadline::after(self.sim.now(), START)).await.expect("a server starts");
        }
        Hive { bootstrap, servers }
    }

    fn start_one<'u>(
        &self,
        number: u64,
        uids: impl Iterator<Item = &'u ExpertUid>,
        initial_peers: &[PeerId],
    ) -> SimServer {
        let router = Router::new();
        let (transport, dht) = self.sim.dht_node(number, router.clone(), initial_peers);
        let mut recordings = BTreeMap::new();
        let hosted = uids.map(|uid| {
            let backend = (self.backend)(uid);
            recordings.insert(uid.clone(), backend.recording());
            let factory: BackendFactory = Box::new(move || Ok(Box::new(backend.clone()) as Box<dyn Backend>));
            HostedExpert { uid: uid.clone(), factory }
        });
        let hosted = hosted.collect();
        let parts = ServerParts {
            clock: self.sim.clock(),
            spawner: self.sim.spawner(),
            dht: Some(dht.clone()),
            router,
            seed: self.sim.seed() + number,
            config: self.config.clone(),
        };
        let cost = self.cost;
        let executors = Executors::Inline { cost: Arc::new(move |_, _| cost) };
        let server = Server::with_executors(parts, hosted, executors).expect("the servers' configuration works");
        SimServer { peer: transport.local_peer(), dht, server, recordings }
    }
}

impl Sim {
    fn dht_node(&self, number: u64, router: Router, initial_peers: &[PeerId]) -> (SharedTransport, Dht) {
        let transport: SharedTransport = Arc::new(self.network().node(router.clone()));
        let dht = self.dht(transport.clone(), router, number, DhtConfig::default(), initial_peers);
        (transport, dht)
    }

    fn dht(
        &self,
        transport: SharedTransport,
        router: Router,
        number: u64,
        config: DhtConfig,
        initial_peers: &[PeerId],
    ) -> Dht {
        Dht::start_unsupervised(DhtParts {
            transport,
            router,
            bans: Bans::new(),
            clock: self.clock(),
            seed: self.seed().wrapping_mul(1009).wrapping_add(number),
            config,
            initial_peers: initial_peers.to_vec(),
        })
    }

    /// A DHT node of its own beside the hive's servers, for experts that [`Servers`] does not make. Calls that `router`
    /// routes reach it.
    pub fn dht_beside(&self, hive: &Hive, router: Router) -> Dht {
        self.dht_node(self.network().peers() as u64, router, &[hive.bootstrap.local_peer()]).1
    }

    /// A client in a process of its own that has joined the hive's DHT.
    ///
    /// # Panics
    /// When it has not joined within a minute.
    pub async fn client(&self, hive: &Hive) -> Client {
        let transport: SharedTransport = Arc::new(self.network().client());
        let initial_peers = [hive.bootstrap.local_peer()];
        let number = self.network().peers() as u64;
        let dht = self.dht(transport.clone(), Router::new(), number, DhtConfig::client(), &initial_peers);
        dht.joined(Deadline::after(self.now(), START)).await.expect("a client joins");
        let (clock, spawner, seed) = (self.clock(), self.spawner(), self.seed() + number);
        Client { dht, transport, clock, spawner, seed }
    }
}

/// Running servers and the DHT node that they joined through.
pub struct Hive {
    bootstrap: Dht,
    servers: Vec<SimServer>,
}

impl Hive {
    /// The DHT node that hosts nothing.
    pub fn bootstrap(&self) -> &Dht {
        &self.bootstrap
    }

    /// All servers, in the order in which they started.
    pub fn servers(&self) -> &[SimServer] {
        &self.servers
    }

    /// The server that hosts an expert.
    ///
    /// # Panics
    /// When none does.
    pub fn hosting(&self, uid: &str) -> &SimServer {
        let uid = uid.parse().expect("a uid");
        self.servers.iter().find(|server| server.recordings.contains_key(&uid)).expect("a server hosts it")
    }

    /// The batches that an expert was given.
    ///
    /// # Panics
    /// When no server hosts it.
    pub fn recording(&self, uid: &str) -> &Recording {
        &self.hosting(uid).recordings[&uid.parse().expect("a uid")]
    }

    /// Optimizer steps of an expert.
    ///
    /// # Panics
    /// When no server hosts it.
    pub fn steps(&self, uid: &str) -> u64 {
        let handle = self.hosting(uid).server.expert(&uid.parse().expect("a uid"));
        handle.expect("a hosted expert has a handle").status().steps
    }
}

/// One server.
pub struct SimServer {
    peer: PeerId,
    dht: Dht,
    server: Server,
    recordings: BTreeMap<ExpertUid, Recording>,
}

impl SimServer {
    /// Its peer id; [`SimNetwork`](crate::SimNetwork) orders hardship by it.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// Its DHT node.
    pub fn dht(&self) -> &Dht {
        &self.dht
    }

    /// The server itself.
    pub fn server(&self) -> &Server {
        &self.server
    }
}
