//! [`Sim`]: a test's own world: an actix system under virtual time, a clock, a network, a seed.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand_chacha::ChaCha8Rng;
use skep_kernel::{Moment, Seed, SharedClock, Spawner, TokioClock, WallTime};

use crate::{
    Node, SimNetwork,
    process::{Process, World},
    trace::{Happening, Trace},
};

/// Wall time at which every simulation begins, in seconds since the epoch.
const EPOCH: WallTime = WallTime(1_700_000_000.0);

/// What a simulated test works with. Cheap to clone.
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
    /// Draws what the test asks for: rows, scores, picks.
    random: Mutex<ChaCha8Rng>,
}

impl Sim {
    /// A simulation to be [run](Setup::run) with this seed.
    pub fn with_seed(seed: u64) -> Setup {
        Setup { seed }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.0.seed
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

    /// Lets virtual time pass; everything that is due by then happens.
    pub async fn advance(&self, by: Duration) {
        self.0.clock.sleep_until(self.now() + by).await;
    }
}

/// A simulation about to start.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    seed: u64,
}

impl Setup {
    /// Runs `test` on a fresh actix system whose time stands still while anything can run, and jumps to the next timer
    /// when nothing can.
    ///
    /// # Panics
    /// When the machine gives no runtime, and when `test` panics.
    pub fn run<R, F: Future<Output = R>>(self, test: impl FnOnce(Sim) -> F) -> R {
        let system = actix_rt::System::with_tokio_rt(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().start_paused(true).build().expect("a runtime needs no more than a few descriptors")
        });
        system.block_on(async move {
            let seed = Seed::new(self.seed);
            let clock: SharedClock = Arc::new(TokioClock::starting_at(EPOCH));
            let trace = Trace::default();
            let network = SimNetwork::traced(clock.clone(), seed.derive("network").number(), trace.clone());
            let mut world = World::new();
            let sim = Sim(Arc::new(Inner {
                seed: self.seed,
                clock,
                network,
                trace,
                test: world.test().clone(),
                nodes: Mutex::default(),
                random: Mutex::new(seed.derive("test").rng()),
            }));
            world.run(|| test(sim)).await
        })
    }
}
