//! [`SimDht`]: a DHT node that hosts nothing.

use std::{
    panic::Location,
    sync::{Arc, Mutex, PoisonError},
};

use libp2p_identity::PeerId;
use skep_dht::{Dht, DhtConfig, DhtParts};

use crate::{
    Node, Sim,
    node::{Birth, Life},
};

/// The real DHT actor in a process that is born.
pub(crate) fn start_dht(birth: &Birth, config: DhtConfig, initial_peers: &[PeerId]) -> Dht {
    Dht::start_unsupervised(DhtParts {
        transport: birth.transport.clone(),
        router: birth.router.clone(),
        bans: birth.bans.clone(),
        clock: birth.clock.clone(),
        seed: birth.seed.derive("dht").number(),
        config,
        initial_peers: initial_peers.to_vec(),
    })
}

/// A DHT node of a simulation: the real actor, in a process of its own.
///
/// ```
/// use std::time::Duration;
/// use skep_kernel::Deadline;
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let first = sim.dht_node(&[]);
///     let second = sim.dht_node(&[first.peer()]);
///     second.dht().joined(Deadline::after(sim.now(), Duration::from_secs(3))).await.expect("it joins");
/// });
/// ```
#[derive(Clone)]
pub struct SimDht {
    node: Node,
    /// Set by each start of the process.
    dht: Arc<Mutex<Option<Dht>>>,
}

impl Sim {
    /// A DHT node that joins through these peers; without any it is the first of a network.
    #[track_caller]
    pub fn dht_node(&self, initial_peers: &[PeerId]) -> SimDht {
        SimDht::start(self, DhtConfig::default(), initial_peers, Location::caller())
    }

    /// A DHT node of another behaviour than the default.
    #[track_caller]
    pub fn dht_node_with(&self, config: DhtConfig, initial_peers: &[PeerId]) -> SimDht {
        SimDht::start(self, config, initial_peers, Location::caller())
    }
}

impl SimDht {
    pub(crate) fn start(
        sim: &Sim,
        config: DhtConfig,
        initial_peers: &[PeerId],
        started_at: &'static Location<'static>,
    ) -> Self {
        let dht: Arc<Mutex<Option<Dht>>> = Arc::default();
        let (shared, is_client, initial_peers) = (dht.clone(), config.client_mode, initial_peers.to_vec());
        let boot = move |birth: Birth| {
            let started = start_dht(&birth, config.clone(), &initial_peers);
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(started.clone());
            Box::new(started) as Box<dyn Life>
        };
        Self { node: Node::start(sim, "dht", is_client, started_at, boot), dht }
    }

    /// Its process and identity, to which hardship is done.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its peer id.
    pub fn peer(&self) -> PeerId {
        self.node.peer()
    }

    /// The handle of its actor, since the last start.
    pub fn dht(&self) -> Dht {
        let dht = self.dht.lock().unwrap_or_else(PoisonError::into_inner);
        dht.clone().expect("a node has started")
    }
}
