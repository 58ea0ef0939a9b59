//! [`Hive`]: running servers and what a test does with them as a whole.

use std::time::Duration;

use libp2p_identity::PeerId;
use rand::seq::IteratorRandom;
use skep_dht::Dht;
use skep_kernel::Moment;
use skep_rpc::Router;

use crate::{Health, Node, Nodes, Recording, Sim, SimDht, SimServer};

/// Servers that share out the experts of a test, and the DHT node through which they joined. From
/// [`Servers::start`](crate::Servers::start).
///
/// ```
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(4).experts("ffn.[0:4]").start().await;
///     hive.pick(1).kill();
///     hive.pick(2).slow(10.0);
///     assert_eq!(hive.well().iter().count(), 3);
/// });
/// ```
#[derive(Clone)]
pub struct Hive {
    sim: Sim,
    bootstrap: Option<SimDht>,
    initial_peers: Vec<PeerId>,
    announced_for: f64,
    servers: Vec<SimServer>,
}

impl Hive {
    pub(crate) fn new(
        sim: &Sim,
        bootstrap: Option<SimDht>,
        initial_peers: Vec<PeerId>,
        announced_for: f64,
        servers: Vec<SimServer>,
    ) -> Self {
        Self { sim: sim.clone(), bootstrap, initial_peers, announced_for, servers }
    }

    /// The DHT node that hosts nothing.
    ///
    /// # Panics
    /// When the servers were told to join others.
    pub fn bootstrap(&self) -> Dht {
        self.bootstrap.as_ref().expect("these servers joined nodes of the test's own").dht()
    }

    /// Peers through which others join.
    pub fn initial_peers(&self) -> &[PeerId] {
        &self.initial_peers
    }

    /// All servers, in the order in which they started.
    pub fn servers(&self) -> &[SimServer] {
        &self.servers
    }

    /// So many servers' nodes, drawn by the simulation's seed among those that are [well](Self::well), or all of these
    /// when there are fewer.
    pub fn pick(&self, count: usize) -> Nodes {
        let mut picked = self.well().0.into_iter().choose_multiple(&mut *self.sim.random(), count);
        picked.sort_by_key(Node::number);
        Nodes(picked)
    }

    /// The servers' nodes.
    pub fn nodes(&self) -> Nodes {
        Nodes(self.servers.iter().map(|server| server.node().clone()).collect())
    }

    /// The servers' nodes that are neither killed nor frozen.
    pub fn well(&self) -> Nodes {
        Nodes(self.nodes().into_iter().filter(|node| node.health() == Health::Running).collect())
    }

    /// The server that hosts an expert.
    ///
    /// # Panics
    /// When none does.
    pub fn hosting(&self, uid: &str) -> &SimServer {
        let uid = uid.parse().expect("a uid");
        self.servers.iter().find(|server| server.recordings().contains_key(&uid)).expect("a server hosts it")
    }

    /// The batches that an expert was given.
    ///
    /// # Panics
    /// When no server hosts it.
    pub fn recording(&self, uid: &str) -> &Recording {
        &self.hosting(uid).recordings()[&uid.parse().expect("a uid")]
    }

    /// Optimizer steps of an expert since its server started.
    ///
    /// # Panics
    /// When no server hosts it.
    pub fn steps(&self, uid: &str) -> u64 {
        let handle = self.hosting(uid).server().expert(&uid.parse().expect("a uid"));
        handle.expect("a hosted expert has a handle").status().steps
    }

    /// How long an announcement holds: after so much time nobody finds an expert whose server is gone.
    pub fn announce_expiration(&self) -> Duration {
        Duration::from_secs_f64(self.announced_for)
    }

    pub(crate) fn now(&self) -> Moment {
        self.sim.now()
    }
}

impl Sim {
    /// A DHT node of its own beside the hive's servers, for experts that [`Servers`](crate::Servers) does not make.
    /// Calls that `router` routes reach it.
    pub fn dht_beside(&self, hive: &Hive, router: Router) -> Dht {
        let transport = self.network().node(router.clone());
        Dht::start_unsupervised(skep_dht::DhtParts {
            bans: transport.bans().clone(),
            transport: std::sync::Arc::new(transport),
            router,
            clock: self.clock(),
            seed: self.root_seed().derive("beside").derive_nth(self.network().peers() as u64).number(),
            config: skep_dht::DhtConfig::default(),
            initial_peers: hive.initial_peers.clone(),
        })
    }
}
