//! The orderly end: stop announcing, finish what is in flight, then let go.

use std::{sync::atomic::Ordering, time::Duration};

use skep_expert::{LAST_CHECKPOINT, ServerError};
use skep_kernel::{AskError, Deadline};
use tracing::warn;

use super::{Runtime, hosting::Hosting, system::at_least, unasked};
use crate::error::Error;

/// What each of the last steps gets even when the deadline has passed.
const LAST_STEPS: Duration = Duration::from_millis(200);
/// How long a runtime that is dropped may take.
const DROPPED: Duration = Duration::from_secs(1);

impl Runtime {
    /// Withdraws the experts, refuses new calls, finishes those that were accepted within `wait`, then closes everything.
    /// With a folder of checkpoints the last ones are written, which may take up to 20 s more.
    /// Blocks until all threads have ended; one that foreign code holds is left behind a second after the rest. The error
    /// says what was cut off.
    pub fn stop(mut self, wait: Duration) -> Result<(), Error> {
        self.end(wait)
    }

    fn end(&mut self, wait: Duration) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.shared.stopping.store(true, Ordering::Relaxed);
        let deadline = self.shared.client.deadline(wait);
        let shared = self.shared.clone();
        let clock = shared.client.clock.clone();
        let saving = if shared.saves { LAST_CHECKPOINT } else { Duration::ZERO };
        let outer = Deadline::at(deadline.moment() + saving + LAST_STEPS * 5);
        let client = &self.shared.client;
        let drained = client.spawner.wait(&client.clock, outer, async move {
            let hosting = shared.hosting.get();
            let served = match hosting {
                Hosting::Running(server) => server.stop(deadline).await,
                _ => Ok(()),
            };
            if let Err(late) = shared.guardian.stop(at_least(&clock, deadline, LAST_STEPS)).await {
                warn!(%late, "actors were cut off");
            }
            shared.net.shutdown(at_least(&clock, deadline, LAST_STEPS)).await;
            match served {
                Ok(()) | Err(ServerError::Stopping) => Ok(()),
                Err(error) => Err(Error::Server(error)),
            }
        });
        if let Some(stop) = self.shared.stop.lock().expect("no panic while the stop is held").take() {
            // The system thread that is gone has nothing to stop.
            let _gone = stop.send(());
        }
        thread.join(match &drained {
            // It may be this thread itself.
            Err(AskError::WouldDeadlock) => Duration::ZERO,
            _ => outer.remaining(self.now()).max(LAST_STEPS),
        });
        drained.unwrap_or_else(|error| {
            Err(match error {
                AskError::Elapsed => Error::Stuck,
                other => unasked(other),
            })
        })
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Err(error) = self.end(DROPPED)
        {
            warn!(%error, "a dropped runtime did not end in order");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_ends_though_its_system_thread_does_not() {
        let runtime = Runtime::builder().start().unwrap();
        let (release, held) = crossbeam_channel::bounded::<()>(0);
        let busy = async move {
            let _released = held.recv();
        };
        assert!(runtime.shared.client.spawner.spawn(busy));
        let (ended, end) = crossbeam_channel::bounded(1);
        let stopping = std::thread::Builder::new().spawn(move || ended.send(runtime.stop(Duration::ZERO))).unwrap();
        let outcome = end.recv_timeout(Duration::from_secs(60)).expect("nobody waits for a thread without a deadline");
        assert!(matches!(outcome, Err(Error::Stuck)), "{outcome:?}");
        stopping.join().unwrap().unwrap();
        drop(release);
    }
}
