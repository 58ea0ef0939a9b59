//! [`SimNetwork`]: calls between peers of one process, under virtual time, with latency and hardship.

mod exchange;
mod transport;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use libp2p_identity::{Keypair, PeerId};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_kernel::{SharedClock, Signal, Spawner};
use skep_rpc::Router;
use skep_wire::Method;

pub use transport::SimTransport;

use crate::{
    Latency,
    link::{Link, Ways},
    trace::{Happening, Trace},
};

/// What calls carry.
///
/// ```
/// use skep_testkit::{Sim, Wire};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(1).experts("m.0").start().await;
///     sim.network().wire(Wire::Hivemind); // from now on nobody sees deadlines, request ids and loads
///     let moe = sim.client(&hive).moe("m.", [1]).build().await;
///     moe.forward(sim.rows(1, 4)).await.expect("the server lives");
/// });
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// Everything: deadline, request id, trace, load, typed errors.
    #[default]
    Native,
    /// What hivemind's carries: bodies and error texts. The deadline shows only when the caller leaves.
    Hivemind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Running,
    Frozen,
    Refusing,
    Killed,
}

struct Node {
    number: u32,
    router: Router,
    condition: Signal<Condition>,
    is_client: bool,
    /// Runs what it serves.
    spawner: Spawner,
}

struct State {
    random: ChaCha8Rng,
    ways: Ways,
    wire: Wire,
    max_message: usize,
    nodes: BTreeMap<PeerId, Node>,
    delivered: BTreeMap<(PeerId, Method), u64>,
    calls: BTreeMap<u64, CallUnderWay>,
    next_call: u64,
    serving: usize,
}

/// A call that has not ended.
///
/// ```
/// use std::time::Duration;
/// use skep_kernel::Deadline;
/// use skep_moe::RemoteExpert;
/// use skep_testkit::Sim;
/// use skep_wire::Method;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(1).experts("m.0").costing(Duration::from_secs(2)).start().await;
///     let client = sim.client(&hive).start().await;
///     let expert = RemoteExpert::at(&client, "m.0".parse().unwrap(), hive.servers()[0].peer(), soon(&sim)).await.unwrap();
///     let asking = expert.forward(vec![sim.rows(1, 4)], soon(&sim));
///     let looking = async {
///         sim.advance(Duration::from_secs(1)).await;
///         let calls = sim.network().calls_under_way();
///         let call = calls.iter().find(|call| call.method == Method::Forward).expect("it is being served");
///         assert_eq!((call.from, call.to), (client.node().peer(), hive.servers()[0].peer()));
///     };
///     futures::join!(asking, looking).0.expect("it has time");
/// });
///
/// fn soon(sim: &Sim) -> Deadline {
///     Deadline::after(sim.now(), Duration::from_secs(5))
/// }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CallUnderWay {
    /// Who waits.
    pub from: PeerId,
    /// For whom.
    pub to: PeerId,
    /// For what.
    pub method: Method,
    /// Since when.
    pub since: skep_kernel::Moment,
}

/// A network of one process, shared by reference. Every peer reaches every other one until hardship is ordered; latency
/// is zero until set. Deterministic on one thread: peers, latencies and losses follow from the seed. Every knob may be
/// turned while calls are under way.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{Latency, Sim};
///
/// Sim::with_seed(7).run(|sim| async move {
///     let millis = Duration::from_millis;
///     sim.network().latency(Latency::uniform(millis(20)..millis(80))).loss(0.01);
///     let (a, b) = (sim.dht_node(&[]), sim.dht_node(&[]));
///     sim.network().partition(&[a.peer()], &[b.peer()]);
///     sim.network().heal();
/// });
/// ```
#[derive(Clone)]
pub struct SimNetwork {
    clock: SharedClock,
    trace: Trace,
    state: Arc<Mutex<State>>,
    /// Told when a way is cut, mended, held or released.
    turned: Signal<()>,
}

impl SimNetwork {
    /// An empty network.
    pub fn new(clock: SharedClock, seed: u64) -> Self {
        Self::traced(clock, seed, Trace::default())
    }

    pub(crate) fn traced(clock: SharedClock, seed: u64, trace: Trace) -> Self {
        let state = State {
            random: ChaCha8Rng::seed_from_u64(seed),
            ways: Ways::default(),
            wire: Wire::Native,
            max_message: usize::MAX,
            nodes: BTreeMap::new(),
            delivered: BTreeMap::new(),
            calls: BTreeMap::new(),
            next_call: 0,
            serving: 0,
        };
        Self { clock, trace, state: Arc::new(Mutex::new(state)), turned: Signal::new(()) }
    }

    /// A peer that serves what `router` routes, on the runtime of whoever calls it. For whole nodes see
    /// [`Sim::dht_node`](crate::Sim::dht_node) and [`Sim::servers`](crate::Sim::servers).
    pub fn node(&self, router: Router) -> SimTransport {
        self.join(router, false, on_this_runtime())
    }

    /// A peer that only asks: it has no address and nobody can call it.
    pub fn client(&self) -> SimTransport {
        self.join(Router::new(), true, on_this_runtime())
    }

    pub(crate) fn join(&self, router: Router, is_client: bool, spawner: Spawner) -> SimTransport {
        let mut state = self.state();
        let secret: [u8; 32] = state.random.random();
        let peer = Keypair::ed25519_from_bytes(secret).expect("32 bytes are a key").public().to_peer_id();
        let condition = Signal::new(Condition::Running);
        let number = u32::try_from(state.nodes.len()).unwrap_or(u32::MAX).saturating_add(1);
        state.nodes.insert(peer, Node { number, router, condition, is_client, spawner });
        drop(state);
        self.trace.add(self.clock.now(), number, Happening::Joined);
        SimTransport::new(self.clone(), peer)
    }

    /// The node has a new process.
    pub(crate) fn rejoin(&self, peer: PeerId, router: Router, spawner: Spawner) {
        if let Some(node) = self.state().nodes.get_mut(&peer) {
            (node.router, node.spawner) = (router, spawner);
        }
        self.set(peer, Condition::Running, "start again");
    }

    /// Sets the latency of messages sent from now on.
    pub fn latency(&self, latency: Latency) -> &Self {
        self.on_ways(|ways| ways.all.latency = Some(latency))
    }

    /// Adds up to so much to every message's latency, equally distributed.
    pub fn jitter(&self, jitter: Duration) -> &Self {
        self.on_ways(|ways| ways.all.jitter = Some(jitter))
    }

    /// Sets the share of messages that get lost, requests and answers alike.
    pub fn loss(&self, probability: f64) -> &Self {
        self.on_ways(|ways| ways.all.loss = Some(probability))
    }

    /// Sets the share of calls that arrive twice, with the same request id, as by a retry.
    pub fn duplication(&self, probability: f64) -> &Self {
        self.on_ways(|ways| ways.all.duplication = Some(probability))
    }

    /// Holds this share of messages up by up to `by`, so that later ones overtake them.
    pub fn reordering(&self, probability: f64, by: Duration) -> &Self {
        self.on_ways(|ways| ways.all.reordering = Some((probability, by)))
    }

    /// Sets the bytes a second that each way between two peers carries.
    pub fn bandwidth(&self, bytes_per_second: u64) -> &Self {
        self.on_ways(|ways| ways.all.bandwidth = Some(bytes_per_second))
    }

    /// Sets the share of calls that are refused before they begin.
    pub fn refusal(&self, probability: f64) -> &Self {
        self.on_ways(|ways| ways.all.refusal = Some(probability))
    }

    /// Sets the share of calls whose connection breaks in the middle of the answer: they were served.
    pub fn reset(&self, probability: f64) -> &Self {
        self.on_ways(|ways| ways.all.reset = Some(probability))
    }

    /// Sets the share of calls that are served and never answered.
    pub fn silence(&self, probability: f64) -> &Self {
        self.on_ways(|ways| ways.all.silence = Some(probability))
    }

    /// Sets what calls carry from now on.
    pub fn wire(&self, wire: Wire) -> &Self {
        self.state().wire = wire;
        self
    }

    /// Sets the largest body of a request or an answer, in bytes; there is no limit at first.
    pub fn max_message(&self, bytes: usize) -> &Self {
        self.state().max_message = bytes;
        self
    }

    /// The ways between two peers, both directions.
    pub fn link(&self, a: PeerId, b: PeerId) -> Link<'_> {
        Link { network: self, from: a, to: b, both: true }
    }

    /// The way from one peer to another.
    pub fn one_way(&self, from: PeerId, to: PeerId) -> Link<'_> {
        Link { network: self, from, to, both: false }
    }

    /// Cuts every way between two groups. Messages vanish, those under way included; callers see their deadline.
    pub fn partition(&self, some: &[PeerId], others: &[PeerId]) -> &Self {
        let pairs = || some.iter().flat_map(|a| others.iter().map(move |b| (*a, *b)));
        self.on_ways(|ways| ways.cut.extend(pairs().flat_map(|(a, b)| [(a, b), (b, a)])))
    }

    /// Ends every partition and every other cut.
    pub fn heal(&self) -> &Self {
        self.on_ways(|ways| ways.cut.clear())
    }

    /// Stops messages between two peers until [`release`](Self::release); none is lost.
    pub fn hold(&self, a: PeerId, b: PeerId) -> &Self {
        self.link(a, b).hold();
        self
    }

    /// Lets the messages between two peers go.
    pub fn release(&self, a: PeerId, b: PeerId) -> &Self {
        self.link(a, b).release();
        self
    }

    pub(crate) fn on_ways(&self, change: impl FnOnce(&mut Ways)) -> &Self {
        change(&mut self.state().ways);
        self.turned.set(());
        self
    }

    /// The machine is gone: what it was serving ends, and nobody hears of it again.
    pub fn kill(&self, peer: PeerId) {
        self.set(peer, Condition::Killed, "be killed");
    }

    /// The process stands still: requests and answers wait until [`restore`](Self::restore).
    pub fn freeze(&self, peer: PeerId) {
        self.set(peer, Condition::Frozen, "freeze");
    }

    /// The process is gone, its machine is not: calls in flight break, new ones are refused at once.
    pub fn refuse(&self, peer: PeerId) {
        self.set(peer, Condition::Refusing, "refuse");
    }

    /// Ends any hardship of a peer.
    pub fn restore(&self, peer: PeerId) {
        self.set(peer, Condition::Running, "be well");
    }

    fn set(&self, peer: PeerId, condition: Condition, order: &'static str) {
        let number = match self.state().nodes.get(&peer) {
            Some(node) => {
                node.condition.set(condition);
                node.number
            }
            None => return,
        };
        self.trace.add(self.clock.now(), number, Happening::Ordered(order));
    }

    /// Peers that ever joined.
    pub fn peers(&self) -> usize {
        self.state().nodes.len()
    }

    /// The number of a peer in traces, in the order of joining; 0 for one that never joined.
    pub fn number(&self, peer: PeerId) -> u32 {
        self.state().nodes.get(&peer).map_or(0, |node| node.number)
    }

    /// Calls of `method` that arrived at any peer's service.
    pub fn delivered(&self, method: Method) -> u64 {
        self.state().delivered.iter().filter(|((_, m), _)| *m == method).map(|(_, n)| n).sum()
    }

    /// Calls of `method` that arrived at the service of `peer`.
    pub fn delivered_to(&self, peer: PeerId, method: Method) -> u64 {
        self.state().delivered.get(&(peer, method)).copied().unwrap_or(0)
    }

    /// Calls that are under way.
    pub fn in_flight(&self) -> usize {
        self.state().calls.len()
    }

    /// Who waits for whom, in the order of the calls.
    pub fn calls_under_way(&self) -> Vec<CallUnderWay> {
        self.state().calls.values().cloned().collect()
    }

    /// Calls that are being served, those whose caller has left included.
    pub fn serving(&self) -> usize {
        self.state().serving
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the network")
    }
}

/// Serves on the runtime that calls.
fn on_this_runtime() -> Spawner {
    Spawner::new(|future| {
        tokio::spawn(future);
        true
    })
}
