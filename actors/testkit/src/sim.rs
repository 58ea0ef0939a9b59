//! [`Sim`]: a test's own world: an actix system under virtual time, a clock, a network, a seed.

use std::{sync::Arc, time::Duration};

use skep_kernel::{Moment, SharedClock, Spawner, TokioClock, WallTime};

use crate::SimNetwork;

/// Wall time at which every simulation begins, in seconds since the epoch.
const EPOCH: WallTime = WallTime(1_700_000_000.0);

/// What a simulated test works with. Cheap to clone.
#[derive(Clone)]
pub struct Sim {
    seed: u64,
    clock: SharedClock,
    network: SimNetwork,
    spawner: Spawner,
}

impl Sim {
    /// A simulation to be [run](Setup::run) with this seed.
    pub fn with_seed(seed: u64) -> Setup {
        Setup { seed }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The simulation's clock.
    pub fn clock(&self) -> SharedClock {
        self.clock.clone()
    }

    /// Virtual now.
    pub fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The network between the simulation's peers.
    pub fn network(&self) -> &SimNetwork {
        &self.network
    }

    /// Starts futures on the simulation's system.
    pub fn spawner(&self) -> Spawner {
        self.spawner.clone()
    }

    /// Lets virtual time pass; everything that is due by then happens.
    pub async fn advance(&self, by: Duration) {
        self.clock.sleep_until(self.now() + by).await;
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
            let clock: SharedClock = Arc::new(TokioClock::starting_at(EPOCH));
            let network = SimNetwork::new(clock.clone(), self.seed);
            let spawner = Spawner::arbiter(actix_rt::Arbiter::current());
            test(Sim { seed: self.seed, clock, network, spawner }).await
        })
    }
}
