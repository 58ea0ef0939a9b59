//! The thread `skep-system`: an actix system with the supervision tree on it.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, atomic::AtomicBool},
    thread,
    time::Duration,
};

use crossbeam_channel::RecvTimeoutError;
use libp2p_identity::PeerId;
use skep_dht::{DhtConfig, DhtParts, Validators};
use skep_expert::{ServerConfig, SharedStore};
use skep_kernel::{Deadline, Seed, SharedClock, Signal, Spawner, ask::mark_runtime_thread};
use skep_moe::Client;
use skep_net::Net;
use skep_rpc::Router;
use skep_wire::ExpertUid;
use tokio::sync::oneshot;
use tracing::warn;

use super::{
    Experts, Handles, Runtime,
    hosting::{Hosting, host},
    tree::{self, Tree},
};
use crate::error::Error;

/// What a runtime is made of.
pub(crate) struct Parts {
    pub net: Net,
    pub router: Router,
    pub clock: SharedClock,
    pub seed: Seed,
    pub dht: DhtConfig,
    pub validators: Validators,
    pub initial_peers: Vec<PeerId>,
    pub server: ServerConfig,
    pub groups: Vec<Experts>,
    pub checkpoints: Option<SharedStore>,
    /// The experts that have a checkpoint there.
    pub kept: Vec<ExpertUid>,
}

/// Growing the tree takes no call to anybody, so this is only reached when the machine is stuck.
const GROW: Duration = Duration::from_secs(30);

/// Starts the system thread and the tree on it.
pub(crate) fn start(parts: Parts) -> Result<Runtime, Error> {
    let (report, grown) = crossbeam_channel::bounded(1);
    let (runs, running) = crossbeam_channel::bounded(0);
    let thread = thread::Builder::new()
        .name("skep-system".to_owned())
        .spawn(move || {
            let _dropped_at_the_end = runs;
            run(parts, &report);
        })
        .map_err(|source| Error::System { what: "cannot start the system thread".to_owned(), source })?;
    match grown.recv_timeout(GROW) {
        Ok(Ok(shared)) => Ok(Runtime::new(shared, SystemThread { thread, running })),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::Stopped),
    }
}

/// The thread, for whoever ends it.
pub(crate) struct SystemThread {
    thread: thread::JoinHandle<()>,
    /// Never used; disconnected when the thread ends.
    running: crossbeam_channel::Receiver<Infallible>,
}

impl SystemThread {
    /// Waits for its end. One that is stuck is left behind.
    pub fn join(self, within: Duration) {
        match self.running.recv_timeout(within) {
            Err(RecvTimeoutError::Timeout) => warn!("the system thread is stuck and left behind"),
            Err(RecvTimeoutError::Disconnected) => {
                if self.thread.join().is_err() {
                    warn!("the system thread panicked");
                }
            }
            Ok(never) => match never {},
        }
    }
}

type Report = crossbeam_channel::Sender<Result<Arc<Handles>, Error>>;

fn run(parts: Parts, report: &Report) {
    mark_runtime_thread();
    let system = actix_rt::System::new();
    system.block_on(async {
        let (stop, stopped) = oneshot::channel();
        match grow(parts, stop).await {
            Ok(shared) => {
                // Whoever started the runtime may have given up waiting; then dropping `shared` ends `stopped`.
                let _starter_left = report.send(Ok(shared));
                let _stop_or_dropped = stopped.await;
            }
            Err(error) => {
                let _starter_left = report.send(Err(error));
            }
        }
    });
}

async fn grow(parts: Parts, stop: oneshot::Sender<()>) -> Result<Arc<Handles>, Error> {
    let spawner = Spawner::arbiter(actix_rt::System::current().arbiter().clone());
    let Parts {
        net,
        router,
        clock,
        seed,
        dht: dht_config,
        validators,
        initial_peers,
        server,
        groups,
        checkpoints,
        kept,
    } = parts;
    let net = Arc::new(net);
    let client_mode = dht_config.client_mode;
    let dht_parts = DhtParts {
        bans: net.bans().clone(),
        transport: net.clone(),
        router: router.clone(),
        clock: clock.clone(),
        seed: seed.derive("dht").number(),
        config: dht_config,
        initial_peers,
    };
    let Tree { dht, guardian } = tree::grow(&clock, &seed, dht_parts, validators).await?;
    let client = Client {
        dht: dht.clone(),
        transport: net.clone(),
        clock: clock.clone(),
        spawner: spawner.clone(),
        // Never repeatable: servers take a repeated request id for a retry.
        seed: Seed::random().number(),
    };
    let hosting = Signal::new(if groups.is_empty() { Hosting::Nothing } else { Hosting::Choosing(None) });
    let shared = Arc::new(Handles {
        net,
        client,
        guardian,
        hosting,
        stop: Mutex::new(Some(stop)),
        stopping: AtomicBool::new(false),
        saves: checkpoints.is_some(),
    });
    if !groups.is_empty() && !client_mode {
        let parts = skep_expert::ServerParts {
            clock,
            spawner: spawner.clone(),
            dht: Some(dht),
            router,
            seed: seed.derive("server").number(),
            checkpoints,
            config: server,
        };
        let hosting = shared.hosting.clone();
        spawner.spawn(host(parts, groups, kept, hosting));
    }
    Ok(shared)
}

/// A deadline that is always some time away, so that the last steps of a stop get a moment each.
pub(crate) fn at_least(clock: &SharedClock, deadline: Deadline, wait: Duration) -> Deadline {
    deadline.max(Deadline::after(clock.now(), wait))
}
