//! [`SimNetwork`]: calls between peers of one process, under virtual time, with latency and hardship.

use std::{
    collections::BTreeMap,
    ops::Range,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use libp2p_identity::{Keypair, PeerId};
use multiaddr::{Multiaddr, Protocol};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_kernel::{Deadline, SharedClock, time::before};
use skep_rpc::{Answer, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, Service, Step, Transport};
use skep_wire::{Method, error_text};
use tokio::sync::watch;

/// What a server on hivemind's wire assumes of a caller whose deadline it cannot see.
const LEGACY_DEADLINE: Duration = Duration::from_secs(300);

/// Time that a message takes one way.
#[derive(Clone, Debug)]
pub enum Latency {
    /// Always the same.
    Constant(Duration),
    /// Equally distributed.
    Uniform(Range<Duration>),
}

impl Latency {
    /// Always `one_way`.
    pub fn constant(one_way: Duration) -> Self {
        Self::Constant(one_way)
    }

    /// Equally distributed over `range`.
    pub fn uniform(range: Range<Duration>) -> Self {
        Self::Uniform(range)
    }

    fn draw(&self, random: &mut ChaCha8Rng) -> Duration {
        match self {
            Latency::Constant(latency) => *latency,
            Latency::Uniform(range) if range.is_empty() => range.start,
            Latency::Uniform(range) => random.random_range(range.clone()),
        }
    }
}

/// What calls carry.
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
    router: Router,
    condition: watch::Sender<Condition>,
    is_client: bool,
}

struct State {
    random: ChaCha8Rng,
    latency: Latency,
    loss: f64,
    wire: Wire,
    nodes: BTreeMap<PeerId, Node>,
    delivered: BTreeMap<(PeerId, Method), u64>,
    in_flight: usize,
}

/// A network of one process, shared by reference. Every peer reaches every other one until hardship is ordered; latency
/// is zero until set. Deterministic on one thread: peers, latencies and losses follow from the seed.
#[derive(Clone)]
pub struct SimNetwork {
    clock: SharedClock,
    state: Arc<Mutex<State>>,
}

impl SimNetwork {
    /// An empty network.
    pub fn new(clock: SharedClock, seed: u64) -> Self {
        let state = State {
            random: ChaCha8Rng::seed_from_u64(seed),
            latency: Latency::Constant(Duration::ZERO),
            loss: 0.0,
            wire: Wire::Native,
            nodes: BTreeMap::new(),
            delivered: BTreeMap::new(),
            in_flight: 0,
        };
        Self { clock, state: Arc::new(Mutex::new(state)) }
    }

    /// A peer that serves what `router` routes.
    pub fn node(&self, router: Router) -> SimTransport {
        self.join(router, false)
    }

    /// A peer that only asks: it has no address and nobody can call it.
    pub fn client(&self) -> SimTransport {
        self.join(Router::new(), true)
    }

    fn join(&self, router: Router, is_client: bool) -> SimTransport {
        let mut state = self.state();
        let secret: [u8; 32] = state.random.random();
        let peer = Keypair::ed25519_from_bytes(secret).expect("32 bytes are a key").public().to_peer_id();
        let condition = watch::Sender::new(Condition::Running);
        state.nodes.insert(peer, Node { router, condition, is_client });
        SimTransport { network: self.clone(), peer }
    }

    /// Sets the latency of messages sent from now on.
    pub fn latency(&self, latency: Latency) -> &Self {
        self.state().latency = latency;
        self
    }

    /// Sets the share of messages that get lost, requests and answers alike.
    pub fn loss(&self, probability: f64) -> &Self {
        self.state().loss = probability;
        self
    }

    /// Sets what calls carry from now on.
    pub fn wire(&self, wire: Wire) -> &Self {
        self.state().wire = wire;
        self
    }

    /// The machine is gone: what it was serving ends, and nobody hears of it again.
    pub fn kill(&self, peer: PeerId) {
        self.set(peer, Condition::Killed);
    }

    /// The process stands still: requests and answers wait until [`restore`](Self::restore).
    pub fn freeze(&self, peer: PeerId) {
        self.set(peer, Condition::Frozen);
    }

    /// The process is gone, its machine is not: calls in flight break, new ones are refused at once.
    pub fn refuse(&self, peer: PeerId) {
        self.set(peer, Condition::Refusing);
    }

    /// Ends any hardship of a peer.
    pub fn restore(&self, peer: PeerId) {
        self.set(peer, Condition::Running);
    }

    fn set(&self, peer: PeerId, condition: Condition) {
        if let Some(node) = self.state().nodes.get(&peer) {
            node.condition.send_replace(condition);
        }
    }

    /// Peers that ever joined.
    pub fn peers(&self) -> usize {
        self.state().nodes.len()
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
        self.state().in_flight
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the network")
    }

    /// One message's way: completes on arrival, never for a lost one.
    async fn travel(&self) {
        let (latency, lost) = {
            let state = &mut *self.state();
            let lost = state.loss > 0.0 && state.random.random_bool(state.loss.min(1.0));
            (state.latency.draw(&mut state.random), lost)
        };
        if lost {
            std::future::pending::<()>().await;
        }
        if !latency.is_zero() {
            self.clock.sleep_until(self.clock.now() + latency).await;
        }
    }

    async fn exchange(self, from: PeerId, call: Call) -> Result<Answer, RpcError> {
        let peer = call.peer;
        let unreachable = |step, reason: &str| RpcError::Unreachable { peer, step, reason: reason.to_owned() };
        let (mut caller, mut callee, router, wire) = {
            let state = self.state();
            let Some(node) = state.nodes.get(&peer).filter(|node| !node.is_client) else {
                return Err(unreachable(Step::Resolve, "no address is known"));
            };
            let caller = state.nodes[&from].condition.subscribe();
            (caller, node.condition.subscribe(), node.router.clone(), state.wire)
        };
        running(&mut caller).await.map_err(|Gone| unreachable(Step::Dial, "this node is stopped"))?;
        self.travel().await;
        running(&mut callee).await.map_err(|Gone| unreachable(Step::Dial, "connection refused"))?;
        *self.state().delivered.entry((peer, call.method)).or_default() += 1;

        let served = router.serve(self.arrive(from, call, wire));
        let served = AssertUnwindSafe(served).catch_unwind();
        tokio::pin!(served);
        let outcome = loop {
            tokio::select! {
                biased;
                still = running(&mut callee) => still.map_err(|Gone| unreachable(Step::Exchange, "connection reset"))?,
                outcome = &mut served => break outcome,
            }
            // Running: serve until the condition changes.
            tokio::select! {
                biased;
                _changed = callee.changed() => {}
                outcome = &mut served => break outcome,
            }
        };
        running(&mut callee).await.map_err(|Gone| unreachable(Step::Exchange, "connection reset"))?;
        self.travel().await;
        let outcome = outcome.unwrap_or_else(|_panic| Err(ServeError::Internal("the service panicked".to_owned())));
        match (outcome, wire) {
            (Ok(answer), Wire::Native) => Ok(answer),
            (Ok(answer), Wire::Hivemind) => Ok(Answer { body: answer.body, load: None }),
            (Err(error), Wire::Native) => Err(error.into_rpc(peer)),
            (Err(ServeError::Refused(reason)), Wire::Hivemind) => Err(RpcError::Refused { peer, reason }),
            (Err(error), Wire::Hivemind) => {
                let (kind, text) = error.as_python();
                Err(RpcError::Remote { text: error_text::repr(kind, &text) })
            }
        }
    }

    fn arrive(&self, from: PeerId, call: Call, wire: Wire) -> Inbound {
        let meta = match wire {
            Wire::Native => call.meta,
            Wire::Hivemind => Meta {
                deadline: Deadline::after(self.clock.now(), LEGACY_DEADLINE),
                request_id: RequestId(self.state().random.random()),
                trace: None,
            },
        };
        Inbound { peer: from, method: call.method, body: call.body, meta, knows_overload: wire == Wire::Native }
    }
}

struct Gone;

/// Waits until the peer runs; never ends for a killed one.
async fn running(condition: &mut watch::Receiver<Condition>) -> Result<(), Gone> {
    loop {
        let now = *condition.borrow_and_update();
        match now {
            Condition::Running => return Ok(()),
            Condition::Refusing => return Err(Gone),
            Condition::Killed => std::future::pending().await,
            Condition::Frozen => condition.changed().await.map_err(|_network_gone| Gone)?,
        }
    }
}

/// One peer's end of a [`SimNetwork`].
#[derive(Clone)]
pub struct SimTransport {
    network: SimNetwork,
    peer: PeerId,
}

/// Counts a call as long as it lives.
struct InFlight(SimNetwork);

impl InFlight {
    fn new(network: &SimNetwork) -> Self {
        network.state().in_flight += 1;
        Self(network.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.state().in_flight -= 1;
    }
}

impl Transport for SimTransport {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let (network, from) = (self.network.clone(), self.peer);
        Box::pin(async move {
            let _counted = InFlight::new(&network);
            let (clock, peer, deadline) = (network.clock.clone(), call.peer, call.meta.deadline);
            let started = clock.now();
            let exchange = network.clone().exchange(from, call);
            let late = |_| {
                let waited = deadline.moment().since(started);
                RpcError::Deadline { peer, step: Step::Exchange, waited }
            };
            before(&*clock, deadline, exchange).await.map_err(late)?
        })
    }

    fn local_peer(&self) -> PeerId {
        self.peer
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        let state = self.network.state();
        if state.nodes[&self.peer].is_client {
            return Vec::new();
        }
        let port = state.nodes.keys().position(|peer| *peer == self.peer).expect("a transport's node stays") as u64;
        vec![Multiaddr::empty().with(Protocol::Memory(port + 1)).with(Protocol::P2p(self.peer))]
    }

    fn add_addresses(&self, _peer: PeerId, _addresses: Vec<Multiaddr>) {}
}
