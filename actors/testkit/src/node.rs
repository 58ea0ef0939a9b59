//! [`Node`]: a process of a simulation, and what can be done to it.

use std::{
    panic::Location,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_dht::Dht;
use skep_kernel::{Clock, Deadline, Seed, SharedClock, Spawner};
use skep_rpc::{Bans, Router, SharedTransport};

use crate::{
    Sim, SimNetwork, SimTransport,
    clock::NodeClock,
    process::Process,
    trace::{Happening, Trace},
};

/// What starts in a node's process, at first and again at each restart.
type Boot = Box<dyn Fn(Birth) -> Box<dyn Life> + Send + Sync>;

/// What runs in a node's process.
pub(crate) trait Life: Send + Sync {
    /// Ends it as its user would; says what did not end as it should.
    fn stop(&self, deadline: Deadline) -> BoxFuture<'static, Result<(), String>>;

    /// Rows in line at its experts.
    fn waiting_rows(&self) -> u32 {
        0
    }
}

impl Life for Dht {
    fn stop(&self, _deadline: Deadline) -> BoxFuture<'static, Result<(), String>> {
        let dht = self.clone();
        Box::pin(async move {
            dht.stop().await;
            Ok(())
        })
    }
}

/// What a process that starts is given.
pub(crate) struct Birth {
    /// Its end of the network.
    pub transport: SharedTransport,
    /// What the transport notes of peers.
    pub bans: Bans,
    /// What others reach in it.
    pub router: Router,
    /// Its time.
    pub clock: SharedClock,
    /// Starts its tasks.
    pub spawner: Spawner,
    /// Its randomness, another one at each start.
    pub seed: Seed,
    /// How fast it computes.
    pub speed: Speed,
}

/// How many times slower than usual a node is, as bits of an `f64`.
#[derive(Clone)]
pub(crate) struct Speed(Arc<AtomicU64>);

impl Speed {
    fn usual() -> Self {
        Self(Arc::new(AtomicU64::new(1f64.to_bits())))
    }

    /// What something takes on this node that takes `cost` on one of usual speed.
    pub fn cost_here(&self, cost: Duration) -> Duration {
        let slowness = f64::from_bits(self.0.load(Ordering::Relaxed));
        if slowness == 1.0 { cost } else { cost.mul_f64(slowness) }
    }
}

/// How a node is.
///
/// ```
/// use skep_testkit::{Health, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let node = sim.dht_node(&[]);
///     node.node().freeze();
///     assert_eq!(node.node().health(), Health::Frozen);
///     node.node().thaw();
///     assert_eq!(node.node().health(), Health::Running);
/// });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It runs.
    Running,
    /// It stands still.
    Frozen,
    /// It is gone.
    Killed,
    /// It ended as it should.
    Stopped,
}

/// One node of a simulation: a process with an identity, from [`Sim::dht_node`](crate::Sim::dht_node),
/// [`Sim::servers`](crate::Sim::servers) or [`Sim::client`](crate::Sim::client). Cheap to clone.
///
/// ```
/// use skep_testkit::{Health, Sim};
///
/// Sim::with_seed(3).run(|sim| async move {
///     let first = sim.dht_node(&[]);
///     let node = sim.dht_node(&[first.peer()]);
///     node.node().kill();
///     assert_eq!(node.node().health(), Health::Killed);
///     node.node().bounce();
///     assert_eq!(node.node().health(), Health::Running);
/// });
/// ```
#[derive(Clone)]
pub struct Node(Arc<Inner>);

struct Inner {
    name: String,
    number: u32,
    started_at: &'static Location<'static>,
    seed: Seed,
    network: SimNetwork,
    trace: Trace,
    transport: SimTransport,
    clock: Arc<NodeClock>,
    speed: Speed,
    starts: AtomicU32,
    state: Mutex<State>,
    boot: Boot,
}

struct State {
    health: Health,
    /// There once it has started; stays after its end.
    running: Option<Running>,
}

#[derive(Clone)]
struct Running {
    process: Process,
    /// What others reached in it.
    router: Router,
    life: Arc<dyn Life>,
}

impl Node {
    /// Joins the network and starts. The node belongs to the simulation, which ends it.
    pub(crate) fn start(
        sim: &Sim,
        kind: &str,
        is_client: bool,
        started_at: &'static Location<'static>,
        boot: impl Fn(Birth) -> Box<dyn Life> + Send + Sync + 'static,
    ) -> Self {
        let network = sim.network().clone();
        let transport = network.join(Router::new(), is_client, Spawner::new(|_| false));
        let number = network.number(skep_rpc::Transport::local_peer(&transport));
        let node = Self(Arc::new(Inner {
            name: format!("{kind} {number}"),
            number,
            started_at,
            seed: sim.root_seed().derive("node").derive_nth(u64::from(number)),
            trace: sim.trace().clone(),
            network,
            transport,
            clock: Arc::new(NodeClock::new(sim.clock())),
            speed: Speed::usual(),
            starts: AtomicU32::new(0),
            state: Mutex::new(State { health: Health::Killed, running: None }),
            boot: Box::new(boot),
        }));
        node.boot();
        sim.adopt(node.clone());
        node
    }

    fn boot(&self) {
        let start = self.0.starts.fetch_add(1, Ordering::Relaxed);
        let router = Router::new();
        let (process, life) = Process::start(self.0.number, |process| {
            self.0.network.rejoin(self.peer(), router.clone(), process.spawner());
            let transport = self.0.transport.afresh();
            (self.0.boot)(Birth {
                bans: transport.bans().clone(),
                transport: Arc::new(transport),
                router: router.clone(),
                clock: self.0.clock.clone(),
                spawner: process.spawner(),
                seed: self.0.seed.derive_nth(u64::from(start)),
                speed: self.0.speed.clone(),
            })
        });
        *self.state() =
            State { health: Health::Running, running: Some(Running { process, router, life: life.into() }) };
    }

    /// Its name: what it is and its number, as in `server 3`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its number in traces.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Its identity in the network.
    pub fn peer(&self) -> PeerId {
        skep_rpc::Transport::local_peer(&self.0.transport)
    }

    /// How it is.
    pub fn health(&self) -> Health {
        self.state().health
    }

    /// The machine is gone: nothing of it runs any more, and nobody is told. Callers see their deadline.
    pub fn kill(&self) {
        self.0.network.kill(self.peer());
        self.end();
    }

    /// Ends it without a word to the network.
    pub(crate) fn end(&self) {
        let ended = {
            let mut state = self.state();
            state.health = Health::Killed;
            state.running.clone()
        };
        if let Some(running) = ended {
            running.process.kill();
            // Services hold the network, which holds the router: without this nothing of them would ever leave memory.
            running.router.withdraw(&running.router.methods());
        }
    }

    /// The process ends, its machine stays: connections break, new ones are refused.
    pub fn crash(&self) {
        self.0.network.refuse(self.peer());
        self.end();
    }

    /// The process stands still: it accepts connections and never answers, its timers ring late.
    pub fn freeze(&self) {
        self.pause(Health::Running, Health::Frozen, Process::freeze, SimNetwork::freeze);
    }

    /// Goes on where [`freeze`](Self::freeze) stopped it.
    pub fn thaw(&self) {
        self.pause(Health::Frozen, Health::Running, Process::thaw, SimNetwork::restore);
    }

    fn pause(&self, from: Health, to: Health, process: fn(&Process), network: fn(&SimNetwork, PeerId)) {
        let mut state = self.state();
        if state.health == from {
            state.health = to;
            state.running.iter().for_each(|running| process(&running.process));
            drop(state);
            network(&self.0.network, self.peer());
        }
    }

    /// Its batches take so many times as long as its cost model says, from the next one on.
    ///
    /// # Panics
    /// When `factor` is negative or no number.
    pub fn slow(&self, factor: f64) {
        assert!(factor >= 0.0, "a node is slower by a factor, not by {factor}");
        self.0.speed.0.store(factor.to_bits(), Ordering::Relaxed);
        self.0.trace.add(self.0.clock.now(), self.0.number, Happening::Ordered("be slow"));
    }

    /// The process ends and starts again at once: same identity, same checkpoint store; all else it knew is lost. Old
    /// connections break. A killed node comes back this way.
    pub fn bounce(&self) {
        self.end();
        self.boot();
    }

    /// Its wall clock is ahead by so many seconds, behind for a negative number.
    pub fn clock_skew(&self, seconds: f64) {
        self.0.clock.skew(seconds);
        self.0.trace.add(self.0.clock.now(), self.0.number, Happening::Ordered("tell another time"));
    }

    /// Ends it as its user would: withdraws what it announced, finishes what it accepted, tells its callers. A node that
    /// does not run is left alone.
    ///
    /// # Errors
    /// Says what had not ended by the deadline.
    pub async fn stop(&self, deadline: Deadline) -> Result<(), String> {
        let running = {
            let state = self.state();
            state.running.clone().filter(|_| state.health == Health::Running)
        };
        let Some(running) = running else { return Ok(()) };
        let stopped = running.life.stop(deadline).await;
        let still_the_same = self.state().running.as_ref().is_some_and(|now| Arc::ptr_eq(&now.life, &running.life));
        if still_the_same && self.health() == Health::Running {
            self.state().health = Health::Stopped;
            self.0.network.refuse(self.peer());
        }
        stopped
    }

    /// What of it lives although it was stopped or killed, in words.
    pub(crate) fn remains(&self) -> Option<String> {
        let running = self.state().running.clone()?;
        let (tasks, timers) = (running.process.tasks(), self.0.clock.timers());
        // What waited in the memory of a killed node is gone with it.
        let rows = if self.health() == Health::Killed { 0 } else { running.life.waiting_rows() };
        if !running.process.is_busy() && timers == 0 && rows == 0 {
            return None;
        }
        let mut text = format!("{}, started at {}:", self.name(), self.started_at());
        for place in &tasks {
            text += &format!(" a task started at {place};");
        }
        if tasks.is_empty() && running.process.is_busy() {
            text += " an actor;";
        }
        if timers > 0 {
            text += &format!(" {timers} timers;");
        }
        if rows > 0 {
            text += &format!(" {rows} rows in line;");
        }
        Some(text.trim_end_matches(';').to_owned())
    }

    /// Where the test started it.
    pub fn started_at(&self) -> &'static Location<'static> {
        self.0.started_at
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?}, started at {})", self.name(), self.health(), self.started_at())
    }
}

/// Several nodes at once, as from [`Hive::pick`](crate::Hive::pick).
///
/// ```
/// use skep_testkit::{Health, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(6).experts("m.[0:6]").start().await;
///     let three = hive.pick(3);
///     three.slow(10.0).freeze();
///     assert!(three.iter().all(|node| node.health() == Health::Frozen));
///     sim.network().partition(&three.peers(), &hive.well().peers());
/// });
/// ```
#[derive(Clone, Debug)]
pub struct Nodes(pub(crate) Vec<Node>);

impl Nodes {
    /// The nodes.
    pub fn iter(&self) -> std::slice::Iter<'_, Node> {
        self.0.iter()
    }

    /// Their identities, for [`SimNetwork::partition`](crate::SimNetwork::partition).
    pub fn peers(&self) -> Vec<PeerId> {
        self.0.iter().map(Node::peer).collect()
    }

    /// See [`Node::kill`].
    pub fn kill(&self) -> &Self {
        self.each(Node::kill)
    }

    /// See [`Node::crash`].
    pub fn crash(&self) -> &Self {
        self.each(Node::crash)
    }

    /// See [`Node::freeze`].
    pub fn freeze(&self) -> &Self {
        self.each(Node::freeze)
    }

    /// See [`Node::thaw`].
    pub fn thaw(&self) -> &Self {
        self.each(Node::thaw)
    }

    /// See [`Node::bounce`].
    pub fn bounce(&self) -> &Self {
        self.each(Node::bounce)
    }

    /// See [`Node::slow`].
    pub fn slow(&self, factor: f64) -> &Self {
        self.each(|node| node.slow(factor))
    }

    /// See [`Node::clock_skew`].
    pub fn clock_skew(&self, seconds: f64) -> &Self {
        self.each(|node| node.clock_skew(seconds))
    }

    fn each(&self, order: impl Fn(&Node)) -> &Self {
        self.0.iter().for_each(order);
        self
    }
}

impl IntoIterator for Nodes {
    type Item = Node;
    type IntoIter = std::vec::IntoIter<Node>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
