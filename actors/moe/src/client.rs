//! What every client-side object needs: the DHT, a way to call peers, time, and the system thread.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use skep_dht::{Dht, DhtError};
use skep_kernel::{AskError, Deadline, SharedClock, Spawner};
use skep_rpc::{RequestId, RpcError, SharedTransport, Step};

/// Handles of one runtime, cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Client {
    /// Finds experts.
    pub dht: Dht,
    /// Calls them.
    pub transport: SharedTransport,
    /// Counts time.
    pub clock: SharedClock,
    /// Runs futures on the system thread.
    pub spawner: Spawner,
    /// Seed of request ids and of the moments of background reads. No two processes may share it within ten minutes: servers take a repeated id for a retry.
    pub seed: u64,
}

impl Client {
    /// A deadline from now.
    pub fn deadline(&self, wait: Duration) -> Deadline {
        Deadline::after(self.clock.now(), wait)
    }

    /// Runs a future, which ends by the deadline, on the system thread and blocks until its result (see
    /// [`Spawner::wait`]).
    pub fn wait<R: Send + 'static, E: From<RpcError> + Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl Future<Output = Result<R, E>> + Send + 'static,
    ) -> Result<R, E> {
        let started = self.clock.now();
        self.spawner.wait(&self.clock, deadline, work).unwrap_or_else(|error| {
            Err(E::from(match error {
                AskError::WouldDeadlock => RpcError::WouldDeadlock,
                AskError::Elapsed => {
                    let (peer, waited) = (self.transport.local_peer(), deadline.moment().since(started));
                    RpcError::Deadline { peer, step: Step::Schedule, waited }
                }
                AskError::Gone | AskError::Full { .. } => RpcError::Cancelled,
            }))
        })
    }

    /// An id that no other request of this process has.
    pub(crate) fn fresh_request_id(&self) -> RequestId {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        RequestId(u128::from(self.seed) << 64 | u128::from(NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// A failed search in the words of a failed call.
    pub(crate) fn search_failed(&self, error: DhtError, waited: Duration) -> RpcError {
        let peer = self.transport.local_peer();
        match error {
            DhtError::Deadline => RpcError::Deadline { peer, step: Step::Search, waited },
            DhtError::Stopped => RpcError::Cancelled,
            DhtError::WouldDeadlock => RpcError::WouldDeadlock,
            other => RpcError::Unreachable { peer, step: Step::Search, reason: other.to_string() },
        }
    }
}

impl AsRef<Client> for Client {
    fn as_ref(&self) -> &Client {
        self
    }
}
