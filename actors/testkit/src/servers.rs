//! Servers of a simulation: real DHT nodes and real experts over the simulated network.

use std::{
    collections::BTreeMap,
    panic::Location,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_dht::{Dht, DhtConfig};
use skep_expert::{
    Backend, BackendFactory, Executors, HostedExpert, Server, ServerConfig, ServerError, ServerParts, SharedStore,
};
use skep_kernel::Deadline;
use skep_wire::ExpertUid;

use crate::{
    Hive, Node, Recording, ScriptedBackend, Sim, SimDht, SimDisk,
    dht_node::start_dht,
    names::ExpertNames,
    node::{Birth, Life},
};

/// Virtual time within which servers and clients must have started.
pub(crate) const START: Duration = Duration::from_secs(60);

type MakeBackend = Arc<dyn Fn(&ExpertUid) -> ScriptedBackend + Send + Sync>;

/// Servers about to start: which experts, what they compute, what that costs. From [`Sim::servers`].
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{ScriptedBackend, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let backend = ScriptedBackend::scale(2.0).costing(Duration::from_millis(3));
///     let hive = sim.servers(4).experts("ffn.[0:2].[0:4]").backend(backend).start().await;
///     assert_eq!(hive.servers().len(), 4);
/// });
/// ```
pub struct Servers<'a> {
    sim: &'a Sim,
    count: usize,
    uids: Vec<ExpertUid>,
    cost: Option<Duration>,
    recipe: Recipe,
    started_at: &'static Location<'static>,
}

/// What all servers of a hive have in common.
#[derive(Clone)]
struct Recipe {
    backend: MakeBackend,
    config: ServerConfig,
    dht: DhtConfig,
    initial_peers: Vec<PeerId>,
    has_disks: bool,
}

impl Sim {
    /// So many servers, which share the experts out among them. Each has one executor unless its configuration says
    /// otherwise, whatever the machine has.
    #[track_caller]
    pub fn servers(&self, count: usize) -> Servers<'_> {
        let recipe = Recipe {
            backend: Arc::new(|_| ScriptedBackend::scale(2.0).of_width(4)),
            config: ServerConfig { executors: 1, ..ServerConfig::default() },
            dht: DhtConfig::default(),
            initial_peers: Vec::new(),
            has_disks: false,
        };
        Servers { sim: self, count, uids: Vec::new(), cost: None, recipe, started_at: Location::caller() }
    }
}

impl Servers<'_> {
    /// Hosts these experts: a pattern as in `"ffn.[0:5].[0:4]"`, which stands for all its places, or a list of names.
    ///
    /// # Panics
    /// When one is no uid.
    pub fn experts(mut self, names: impl ExpertNames) -> Self {
        self.uids.extend(names.uids());
        self
    }

    /// Hosts an expert on every place of a grid.
    ///
    /// # Panics
    /// When `prefix` is no bare name with a dot.
    pub fn grid(self, prefix: &str, sizes: &[u64]) -> Self {
        let name = prefix.strip_suffix('.').expect("a prefix ends with a dot");
        let ranges: String = sizes.iter().map(|size| format!(".[0:{size}]")).collect();
        self.experts(&*format!("{name}{ranges}"))
    }

    /// What every expert computes, and what that costs.
    pub fn backend(self, backend: ScriptedBackend) -> Self {
        self.backend_by_uid(move |_| backend.recorded_anew())
    }

    /// What each expert computes.
    pub fn backend_by_uid(mut self, backend: impl Fn(&ExpertUid) -> ScriptedBackend + Send + Sync + 'static) -> Self {
        self.recipe.backend = Arc::new(backend);
        self
    }

    /// What each batch costs in virtual time, whatever the backend says.
    pub fn costing(mut self, cost: Duration) -> Self {
        self.cost = Some(cost);
        self
    }

    /// How they batch and wait.
    pub fn config(mut self, config: ServerConfig) -> Self {
        let executors = config.executors.max(1);
        self.recipe.config = ServerConfig { executors, ..config };
        self
    }

    /// How their DHT nodes behave, and how often they announce.
    pub fn dht(mut self, config: DhtConfig) -> Self {
        self.recipe.dht = config;
        self
    }

    /// Gives each a checkpoint store, which survives its process (see [`SimServer::disk`]).
    pub fn with_checkpoints(mut self) -> Self {
        self.recipe.has_disks = true;
        self
    }

    /// Joins the DHT through these peers instead of a node of their own.
    pub fn join(mut self, initial_peers: &[PeerId]) -> Self {
        self.recipe.initial_peers = initial_peers.to_vec();
        self
    }

    /// Starts a DHT node that nobody touches and the servers; returns when all experts are announced.
    ///
    /// # Panics
    /// When a server is not ready within a minute.
    pub async fn start(self) -> Hive {
        let hive = self.launch();
        for server in hive.servers() {
            let ready = server.server().ready(Deadline::after(hive.now(), START)).await;
            ready.unwrap_or_else(|error| panic!("{} does not start: {error}", server.node().name()));
        }
        hive
    }

    /// As [`start`](Self::start), without waiting for anything.
    pub fn launch(mut self) -> Hive {
        let mut bootstrap = None;
        if self.recipe.initial_peers.is_empty() {
            let node = SimDht::start(self.sim, self.recipe.dht.clone(), &[], self.started_at);
            self.recipe.initial_peers = vec![node.peer()];
            bootstrap = Some(node);
        }
        let shares = (0..self.count).map(|number| self.uids.iter().skip(number).step_by(self.count).cloned().collect());
        let servers = shares.map(|uids| self.start_one(uids)).collect();
        Hive::new(self.sim, bootstrap, self.recipe.initial_peers.clone(), self.recipe.dht.announced_for(), servers)
    }

    fn start_one(&self, uids: Vec<ExpertUid>) -> SimServer {
        let mut hosts = BTreeMap::new();
        for uid in uids {
            let mut backend = (self.recipe.backend)(&uid);
            if let Some(cost) = self.cost {
                backend = backend.costing(cost);
            }
            hosts.insert(uid, backend);
        }
        let recordings = hosts.iter().map(|(uid, backend)| (uid.clone(), backend.recording())).collect();
        let parts: Arc<Mutex<Option<Parts>>> = Arc::default();
        let disk = self.recipe.has_disks.then(SimDisk::default);
        let (recipe, shared, store) = (self.recipe.clone(), parts.clone(), disk.clone());
        let boot = move |birth: Birth| {
            let started = Parts::start(&recipe, &hosts, store.clone(), birth);
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(started.clone());
            Box::new(started) as Box<dyn Life>
        };
        let node = Node::start(self.sim, "server", false, self.started_at, boot);
        SimServer { node, parts, disk, recordings }
    }
}

/// What runs in a server's process.
#[derive(Clone)]
struct Parts {
    dht: Dht,
    server: Server,
}

impl Parts {
    fn start(
        recipe: &Recipe,
        hosts: &BTreeMap<ExpertUid, ScriptedBackend>,
        disk: Option<SimDisk>,
        birth: Birth,
    ) -> Self {
        let dht = start_dht(&birth, recipe.dht.clone(), &recipe.initial_peers);
        let hosted = hosts.iter().map(|(uid, backend)| {
            let backend = backend.clone();
            let factory: BackendFactory = Box::new(move || Ok(Box::new(backend.clone()) as Box<dyn Backend>));
            HostedExpert { uid: uid.clone(), factory }
        });
        let (hosted, costs, speed) = (hosted.collect(), hosts.clone(), birth.speed.clone());
        let cost = Arc::new(move |uid: &ExpertUid, _kind, rows| {
            speed.cost_here(costs.get(uid).map_or(Duration::ZERO, |backend| backend.cost(rows)))
        });
        let parts = ServerParts {
            clock: birth.clock,
            spawner: birth.spawner,
            dht: Some(dht.clone()),
            router: birth.router,
            seed: birth.seed.derive("server").number(),
            checkpoints: disk.map(|disk| Arc::new(disk) as SharedStore),
            config: recipe.config.clone(),
        };
        let server = Server::with_executors(parts, hosted, Executors::Inline { cost });
        Self { dht, server: server.expect("the servers' configuration works") }
    }
}

impl Life for Parts {
    fn stop(&self, deadline: Deadline) -> BoxFuture<'static, Result<(), String>> {
        let Parts { dht, server } = self.clone();
        Box::pin(async move {
            let stopped = match server.stop(deadline).await {
                // The test has stopped it.
                Err(ServerError::Stopping) => Ok(()),
                stopped => stopped.map_err(|error| error.to_string()),
            };
            dht.stop().await;
            stopped
        })
    }

    fn waiting_rows(&self) -> u32 {
        self.server.status().experts.iter().map(|expert| expert.waiting_rows).sum()
    }
}

/// One server of a [`Hive`].
///
/// ```
/// use skep_testkit::{ScriptedBackend, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let backend = ScriptedBackend::affine(1.0, 0.1);
///     let hive = sim.servers(2).experts("m.[0:4]").backend(backend).with_checkpoints().start().await;
///     let server = hive.hosting("m.3");
///     assert!(server.server().status().ready && server.disk().is_some());
///     assert_eq!(server.recordings().len(), 2, "experts are shared out");
/// });
/// ```
#[derive(Clone)]
pub struct SimServer {
    node: Node,
    /// Set by each start of the process.
    parts: Arc<Mutex<Option<Parts>>>,
    disk: Option<SimDisk>,
    recordings: BTreeMap<ExpertUid, Recording>,
}

impl SimServer {
    /// Its process and identity, to which hardship is done.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its peer id.
    pub fn peer(&self) -> PeerId {
        self.node.peer()
    }

    /// Its DHT node, since the last start.
    pub fn dht(&self) -> Dht {
        self.parts().as_ref().expect("a node has started").dht.clone()
    }

    /// The server itself, since the last start.
    pub fn server(&self) -> Server {
        self.parts().as_ref().expect("a node has started").server.clone()
    }

    /// Its checkpoint store, if its hive was started [with checkpoints](Servers::with_checkpoints).
    pub fn disk(&self) -> Option<&SimDisk> {
        self.disk.as_ref()
    }

    /// What its experts were given, over all starts.
    pub fn recordings(&self) -> &BTreeMap<ExpertUid, Recording> {
        &self.recordings
    }

    fn parts(&self) -> MutexGuard<'_, Option<Parts>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
