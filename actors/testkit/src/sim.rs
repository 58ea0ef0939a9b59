//! [`Sim`]: a test's own world: an actix system under virtual time, a clock, a network, a seed.

use std::{
    panic::Location,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use actix::{Actor, Addr, Context};
use futures::future::BoxFuture;
use rand_chacha::ChaCha8Rng;
use skep_kernel::{Moment, Seed, SharedClock, Spawner, TokioClock, WallTime};

use crate::{
    Node, Setup, SimNetwork,
    process::Process,
    trace::{Happening, Trace},
};

/// Wall time at which every simulation begins, in seconds since the epoch.
const EPOCH: WallTime = WallTime(1_700_000_000.0);

/// What a simulated test works with. Cheap to clone.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::Sim;
///
/// Sim::with_seed(0xBEE).run(|sim| async move {
///     let start = sim.now();
///     sim.advance(Duration::from_secs(3600)).await; // takes no time
///     assert_eq!(sim.now() - start, Duration::from_secs(3600));
/// });
/// ```
#[derive(Clone)]
pub struct Sim(Arc<Inner>);

struct Inner {
    seed: u64,
    clock: SharedClock,
    network: SimNetwork,
    trace: Trace,
    /// The test's own process.
    test: Process,
    nodes: Mutex<Vec<Node>>,
    /// Actors that the test started beside all nodes.
    actors: Mutex<Vec<Started>>,
    /// What the test wants to be done at the end.
    endings: Mutex<Vec<BoxFuture<'static, ()>>>,
    /// Draws what the test asks for: rows, scores, picks.
    random: Mutex<ChaCha8Rng>,
}

/// An actor that was started through [`Sim::start_actor`].
struct Started {
    kind: &'static str,
    place: &'static Location<'static>,
    lives: Box<dyn Fn() -> bool + Send>,
}

impl Sim {
    /// A simulation to be [run](Setup::run) with this seed, or with the one that the environment names.
    pub fn with_seed(seed: u64) -> Setup {
        Setup::new(seed)
    }

    /// Must be called where the simulation's time counts.
    pub(crate) fn new(number: u64, clock: SharedClock, test: Process) -> Self {
        let (seed, trace) = (Seed::new(number), Trace::default());
        let network = SimNetwork::traced(clock.clone(), seed.derive("network").number(), trace.clone());
        let random = Mutex::new(seed.derive("test").rng());
        let (nodes, actors, endings) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { seed: number, clock, network, trace, test, nodes, actors, endings, random }))
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// The clock of a simulation that begins.
    pub(crate) fn fresh_clock() -> SharedClock {
        Arc::new(TokioClock::starting_at(EPOCH))
    }

    /// Where the living tasks were started that came through [`spawner`](Self::spawner).
    pub(crate) fn tasks(&self) -> Vec<&'static Location<'static>> {
        self.0.test.tasks()
    }

    /// What all randomness of this simulation comes from.
    pub(crate) fn root_seed(&self) -> Seed {
        Seed::new(self.0.seed)
    }

    /// The simulation's clock.
    pub fn clock(&self) -> SharedClock {
        self.0.clock.clone()
    }

    /// Virtual now.
    pub fn now(&self) -> Moment {
        self.0.clock.now()
    }

    /// The network between the simulation's peers.
    pub fn network(&self) -> &SimNetwork {
        &self.0.network
    }

    /// What happened so far.
    pub fn trace(&self) -> &Trace {
        &self.0.trace
    }

    /// Adds a line of the test's own to the trace.
    pub fn note(&self, text: impl Into<String>) {
        self.0.trace.add(self.now(), 0, Happening::Note(text.into()));
    }

    /// Starts futures on the simulation's system, beside the test.
    pub fn spawner(&self) -> Spawner {
        self.0.test.spawner()
    }

    /// Starts an actor beside all nodes, as [`Actor::start`] does, and remembers where: should it be left at the end, it
    /// is named with this place.
    ///
    /// # Panics
    /// Outside the thread of the simulation.
    #[track_caller]
    pub fn start_actor<A: Actor<Context = Context<A>>>(&self, actor: A) -> Addr<A> {
        let addr = actor.start();
        let weak = addr.downgrade();
        let lives = Box::new(move || weak.upgrade().is_some_and(|addr| addr.connected()));
        let started = Started { kind: std::any::type_name::<A>(), place: Location::caller(), lives };
        self.0.actors.lock().unwrap_or_else(PoisonError::into_inner).push(started);
        addr
    }

    /// The living ones of those actors, in words.
    pub(crate) fn actors(&self) -> Vec<String> {
        let mut actors = self.0.actors.lock().unwrap_or_else(PoisonError::into_inner);
        actors.retain(|actor| (actor.lives)());
        actors.iter().map(|actor| format!("an actor {}, started at {}", actor.kind, actor.place)).collect()
    }

    /// Every node that the simulation started, in order.
    pub fn nodes(&self) -> Vec<Node> {
        self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn adopt(&self, node: Node) {
        self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner).push(node);
    }

    pub(crate) fn random(&self) -> MutexGuard<'_, ChaCha8Rng> {
        self.0.random.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has something done when everything is stopped, after the test or in [`assert_quiet`](Self::assert_quiet): stopping
    /// what the test started by hand. What was registered last is done first, each within 30 s of virtual time.
    pub fn at_end(&self, ending: impl Future<Output = ()> + Send + 'static) {
        self.0.endings.lock().unwrap_or_else(PoisonError::into_inner).push(Box::pin(ending));
    }

    pub(crate) fn next_ending(&self) -> Option<BoxFuture<'static, ()>> {
        self.0.endings.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Lets virtual time pass; everything that is due by then happens.
    pub async fn advance(&self, by: Duration) {
        self.0.clock.sleep_until(self.now() + by).await;
    }
}
