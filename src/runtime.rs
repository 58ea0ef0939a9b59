//! [`Runtime`]: one node of the network inside this process.

mod builder;
mod compressed;
mod drain;
mod experts;
mod hosting;
mod records;
mod status;
mod system;
mod tree;

use std::{
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use libp2p_identity::PeerId;
use multiaddr::Multiaddr;
use skep_dht::{DhtError, Listed};
use skep_expert::ExpertStatus;
use skep_kernel::{AskError, Deadline, GuardianHandle, Moment, Signal, WallTime};
use skep_moe::Client;
use skep_net::Net;
use skep_rpc::Transport;
use skep_wire::ExpertPrefix;
use tokio::sync::oneshot;

use crate::error::Error;
use hosting::Hosting;
use system::SystemThread;

pub use builder::RuntimeBuilder;
pub(crate) use builder::peer_of;
pub use experts::Experts;
pub use status::Status;
#[cfg(feature = "daemon")]
pub(crate) use status::Watcher;

/// The parts of a runtime, for whoever holds one: the runtime itself, and those who read its status.
pub(crate) struct Handles {
    net: Arc<Net>,
    client: Client,
    guardian: GuardianHandle,
    hosting: Signal<Hosting>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
    stopping: AtomicBool,
    /// Whether last checkpoints are taken at the end.
    saves: bool,
}

/// A node of the network: it carries calls, keeps its part of the DHT, and hosts experts if told so.
///
/// Its threads are its own: one for the network, one for actors, one per executor. Methods may be called from any other
/// thread, inside or outside async runtimes; blocking ones from its own threads fail with
/// [`WouldDeadlock`](skep_rpc::RpcError::WouldDeadlock). Dropping it stops it within a second; [`stop`](Runtime::stop)
/// lets calls finish first.
pub struct Runtime {
    shared: Arc<Handles>,
    thread: Option<SystemThread>,
}

impl AsRef<Client> for Runtime {
    fn as_ref(&self) -> &Client {
        &self.shared.client
    }
}

impl Runtime {
    fn new(shared: Arc<Handles>, thread: SystemThread) -> Self {
        Self { shared, thread: Some(thread) }
    }

    /// Says what a runtime should be.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }

    /// Joins a network as a client, which asks and never serves. Blocks until one of the peers has answered, at most
    /// 30 s. The addresses end in `/p2p/…`.
    pub fn client(peers: impl IntoIterator<Item = Multiaddr>) -> Result<Self, Error> {
        let wait = Duration::from_secs(30);
        Self::builder().client_mode().initial_peers(peers).start_timeout(wait).start()
    }

    /// Our peer id.
    pub fn local_peer(&self) -> PeerId {
        self.shared.net.local_peer()
    }

    /// Where others reach us: loopback first, wildcards expanded, each ending in `/p2p/…`.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.shared.net.addresses()
    }

    /// The runtime's clock, now.
    pub fn now(&self) -> Moment {
        self.shared.client.clock.now()
    }

    /// Wall time as the DHT counts it.
    pub fn wall(&self) -> WallTime {
        self.shared.client.clock.wall()
    }

    /// Hosted experts that are built, in the order of their uids.
    pub fn experts(&self) -> Vec<ExpertStatus> {
        match self.shared.hosting.get() {
            Hosting::Running(server) => server.status().experts,
            _ => Vec::new(),
        }
    }

    /// Why the runtime cannot go on, if so: a supervisor gave up, or hosting failed.
    pub fn failure(&self) -> Option<Error> {
        self.shared.failure()
    }

    /// Waits until the network is joined and every hosted expert is built and announced. Blocks; [`Error::NotReady`]
    /// says what is missing, and the runtime goes on trying. A [`failure`](Self::failure) is told at once.
    pub fn ready(&self, wait: Duration) -> Result<(), Error> {
        let deadline = self.shared.client.deadline(wait);
        // The inner deadline fires first, so that its error, which names the step, is the one that is seen.
        let outer = Deadline::at(deadline.moment() + Duration::from_millis(200));
        let client = &self.shared.client;
        let readiness = client.spawner.wait(&client.clock, outer, ready(self.shared.clone(), wait, deadline));
        readiness.unwrap_or_else(|error| {
            Err(match error {
                // Busy, as a system may be at its start: what it does goes on.
                AskError::Elapsed => {
                    Error::NotReady { waited: wait, waiting_for: "a thread of this process is busy".to_owned() }
                }
                other => unasked(other),
            })
        })
    }

    /// [`ready`](Self::ready) without blocking the calling thread, on any async runtime.
    pub async fn ready_async(&self, wait: Duration) -> Result<(), Error> {
        let deadline = self.shared.client.deadline(wait);
        let (done, result) = oneshot::channel();
        let work = ready(self.shared.clone(), wait, deadline);
        let spawned = self.shared.client.spawner.spawn(async move {
            let _waiter_left = done.send(work.await);
        });
        if !spawned {
            return Err(Error::Stopped);
        }
        result.await.unwrap_or(Err(Error::Stopped))
    }

    /// Experts announced under a prefix, in the order of their uids. Blocks.
    pub fn experts_under(&self, prefix: &ExpertPrefix, wait: Duration) -> Result<Vec<Listed>, Error> {
        let deadline = self.shared.client.deadline(wait);
        let (dht, prefix) = (self.shared.client.dht.clone(), prefix.clone());
        self.block(deadline, async move { Ok(dht.experts_under(&prefix, Default::default(), deadline).await?) })
    }

    pub(crate) fn block<R: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl Future<Output = Result<R, Error>> + Send + 'static,
    ) -> Result<R, Error> {
        let client = &self.shared.client;
        client.spawner.wait(&client.clock, deadline, work).unwrap_or_else(|error| Err(unasked(error)))
    }
}

/// Why the system thread did not do what it was asked for.
fn unasked(error: AskError) -> Error {
    match error {
        AskError::Gone => Error::Stopped,
        other => Error::Dht(DhtError::from(other)),
    }
}

/// Completes once everything is ready; on the deadline names the step that is not.
async fn ready(shared: Arc<Handles>, waited: Duration, deadline: Deadline) -> Result<(), Error> {
    if let Some(failure) = shared.failure() {
        return Err(failure);
    }
    let not_ready = |waiting_for: String| Error::NotReady { waited, waiting_for };
    let client = &shared.client;
    client.dht.joined(deadline).await.map_err(|error| not_ready(error.to_string()))?;
    let settled = shared.hosting.until(|state| (!matches!(state, Hosting::Choosing(_))).then(|| state.clone()));
    let state = match skep_kernel::time::before(&*client.clock, deadline, settled).await {
        Ok(state) => state,
        Err(_) => shared.hosting.get(),
    };
    match state {
        Hosting::Nothing => Ok(()),
        Hosting::Choosing(trouble) => {
            Err(not_ready(format!("choosing uids: {}", trouble.as_deref().unwrap_or("the DHT has not answered yet"))))
        }
        Hosting::Failed(reason) => Err(Error::Invalid(reason)),
        Hosting::Running(server) => server.ready(deadline).await.map_err(|error| match error {
            skep_expert::ServerError::NotReady(step) => not_ready(step),
            other => Error::Server(other),
        }),
    }
}

#[cfg(test)]
mod tests {
    use skep_kernel::{ChildSpec, Restart, Started};

    use super::*;

    #[test]
    fn a_system_thread_that_is_busy_makes_a_runtime_not_ready_and_no_more() {
        let runtime = Runtime::builder().start().unwrap();
        let (release, held) = crossbeam_channel::bounded::<()>(0);
        let busy = async move {
            let _released = held.recv();
        };
        assert!(runtime.shared.client.spawner.spawn(busy));
        let Err(Error::NotReady { waiting_for, .. }) = runtime.ready(Duration::from_millis(1)) else {
            panic!("who waits is told to go on waiting")
        };
        assert_eq!(waiting_for, "a thread of this process is busy");
        drop(release);
        runtime.ready(Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_part_that_ends_once_too_often_makes_the_runtime_fail_and_not_ready() {
        let runtime = Runtime::builder().start().unwrap();
        let soon = Duration::from_secs(60);
        assert!(runtime.ready(soon).is_ok() && runtime.failure().is_none());
        let guardian = runtime.shared.guardian.clone();
        let crashing = async move {
            // Each tombstone is dropped by the panic: the part ended.
            let crash = |_tombstone| -> Started { panic!("told to") };
            guardian.supervise(ChildSpec::new("crashing", Restart::Permanent), crash).await.unwrap();
            guardian.escalated().await.unwrap();
            Ok(())
        };
        runtime.block(runtime.shared.client.deadline(soon), crashing).unwrap();
        for failure in [runtime.failure(), runtime.ready(soon).err()] {
            assert!(matches!(&failure, Some(Error::Escalated { part, .. }) if part == "crashing"), "{failure:?}");
        }
    }
}
