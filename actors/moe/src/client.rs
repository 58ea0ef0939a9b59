//! What every client-side object needs: the DHT, a way to call peers, time, and the system thread.

use std::time::Duration;

use skep_dht::Dht;
use skep_kernel::{Deadline, SharedClock, Spawner};
use skep_rpc::{RpcError, SharedTransport};

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
    /// Seed of request ids.
    pub seed: u64,
}

impl Client {
    /// A deadline from now.
    pub fn deadline(&self, wait: Duration) -> Deadline {
        Deadline::after(self.clock.now(), wait)
    }

    /// Runs a future on the system thread and blocks until its result or the deadline (see [`Spawner::wait`]).
    pub fn wait<R: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl Future<Output = Result<R, RpcError>> + Send + 'static,
    ) -> Result<R, RpcError> {
        let started = self.clock.now();
        self.spawner.wait(&self.clock, deadline, work).unwrap_or_else(|error| {
            Err(match error {
                skep_kernel::AskError::WouldDeadlock => RpcError::WouldDeadlock,
                skep_kernel::AskError::Elapsed => {
                    RpcError::Deadline { peer: self.transport.local_peer(), waited: deadline.moment().since(started) }
                }
                skep_kernel::AskError::Gone | skep_kernel::AskError::Full { .. } => RpcError::Cancelled,
            })
        })
    }
}

impl AsRef<Client> for Client {
    fn as_ref(&self) -> &Client {
        self
    }
}
