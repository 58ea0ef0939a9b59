//! [`SimClient`]: a process that asks a hive's experts.

use std::{
    ops::Deref,
    panic::Location,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{FutureExt, future::LocalBoxFuture};
use libp2p_identity::PeerId;
use skep_dht::DhtConfig;
use skep_kernel::Deadline;
use skep_moe::{Client, MoeConfig};

use crate::{
    Hive, MoeBuilder, Node, Sim,
    dht_node::start_dht,
    node::{Birth, Life},
    servers::START,
};

/// A client about to start; awaiting it gives a [`Client`]. From [`Sim::client`].
///
/// ```
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(1).experts("m.0").start().await;
///     let asking: skep_moe::Client = sim.client(&hive).await; // all that code under test needs
///     let mortal = sim.client(&hive).start().await; // and one to which hardship is done
///     mortal.node().kill();
///     assert_ne!(asking.transport.local_peer(), mortal.transport.local_peer());
/// });
/// ```
pub struct Clients<'a> {
    pub(crate) sim: &'a Sim,
    initial_peers: Vec<PeerId>,
    started_at: &'static Location<'static>,
}

impl Sim {
    /// A client in a process of its own that joins the hive's DHT. Await it for a plain [`Client`], start it for one to
    /// which hardship can be done, or go on to a mixture at once:
    ///
    /// ```
    /// use skep_testkit::Sim;
    ///
    /// Sim::with_seed(1).run(|sim| async move {
    ///     let hive = sim.servers(2).experts("ffn.[0:4]").start().await;
    ///     let client = sim.client(&hive).start().await;
    ///     let moe = client.moe("ffn.", [4]).k_best(2).build().await;
    ///     let out = moe.forward(sim.rows(3, 4)).await.expect("both servers live");
    ///     assert!(out.responders_per_row().all(|n| n == 2));
    /// });
    /// ```
    #[track_caller]
    pub fn client(&self, hive: &Hive) -> Clients<'_> {
        self.client_of(hive.initial_peers())
    }

    /// A client that joins through these peers.
    #[track_caller]
    pub fn client_of(&self, initial_peers: &[PeerId]) -> Clients<'_> {
        Clients { sim: self, initial_peers: initial_peers.to_vec(), started_at: Location::caller() }
    }
}

impl Clients<'_> {
    /// A mixture over the grid `prefix` × `grid`, asked by this client.
    pub fn moe(self, prefix: &str, grid: impl Into<Vec<usize>>) -> MoeBuilder {
        MoeBuilder::new(self.launch(), MoeConfig::grid(prefix, grid))
    }

    /// Starts it and waits until it has joined.
    ///
    /// # Panics
    /// When it has not joined within a minute.
    pub async fn start(self) -> SimClient {
        let client = self.launch();
        client.joined().await;
        client
    }

    /// Starts it without waiting until it has joined.
    pub fn launch(self) -> SimClient {
        let client: Arc<Mutex<Option<Client>>> = Arc::default();
        let (shared, initial_peers) = (client.clone(), self.initial_peers);
        let boot = move |birth: Birth| {
            let dht = start_dht(&birth, DhtConfig::client(), &initial_peers);
            let Birth { transport, clock, spawner, seed, .. } = birth;
            let seed = seed.derive("client").number();
            let started = Client { dht: dht.clone(), transport, clock, spawner, seed };
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
            Box::new(dht) as Box<dyn Life>
        };
        let node = Node::start(self.sim, "client", true, self.started_at, boot);
        let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
        SimClient { sim: self.sim.clone(), node, client: client.expect("a node has started") }
    }
}

impl<'a> IntoFuture for Clients<'a> {
    type Output = Client;
    type IntoFuture = LocalBoxFuture<'a, Client>;

    /// # Panics
    /// When it has not joined within a minute.
    fn into_future(self) -> Self::IntoFuture {
        self.start().map(|client| client.client).boxed_local()
    }
}

/// A client of a hive: everything that [`Client`] is, in a process of a simulation.
///
/// ```
/// use std::time::Duration;
/// use skep_kernel::Deadline;
/// use skep_moe::RemoteExpert;
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(1).experts("m.0").start().await;
///     let client = sim.client(&hive).start().await;
///     let soon = Deadline::after(sim.now(), Duration::from_secs(5));
///     let expert = RemoteExpert::find(&client, &"m.0".parse().unwrap(), soon).await.unwrap().expect("it is announced");
///     sim.network().partition(&[client.node().peer()], &hive.nodes().peers());
///     assert!(expert.forward(vec![sim.rows(1, 4)], soon).await.is_err());
/// });
/// ```
#[derive(Clone)]
pub struct SimClient {
    sim: Sim,
    node: Node,
    client: Client,
}

impl SimClient {
    /// Its process and identity, to which hardship is done. After a [`bounce`](Node::bounce) this handle is of no use:
    /// start another client.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// A mixture over the grid `prefix` × `grid`, asked by this client.
    pub fn moe(&self, prefix: &str, grid: impl Into<Vec<usize>>) -> MoeBuilder {
        MoeBuilder::new(self.clone(), MoeConfig::grid(prefix, grid))
    }

    pub(crate) async fn joined(&self) {
        let joined = self.client.dht.joined(Deadline::after(self.sim.now(), START)).await;
        joined.unwrap_or_else(|error| panic!("{} does not join: {error}", self.node.name()));
    }

    pub(crate) fn sim(&self) -> &Sim {
        &self.sim
    }
}

impl Deref for SimClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}
