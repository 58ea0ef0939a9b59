//! What a runtime says of itself: for status pages, exporters and tests.

use std::sync::atomic::Ordering;

use serde::Serialize;
use skep_dht::DhtStatus;
use skep_expert::ExpertStatus;
use skep_net::NetStatus;

use super::{Handles, Runtime, hosting::Hosting};
use crate::error::Error;

/// A snapshot of a [`Runtime`]. Serializes to what the daemon's `/status` shows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// Version of skep.
    pub version: &'static str,
    /// Whether the network is joined and every hosted expert is built and announced.
    pub ready: bool,
    /// Why it is not ready.
    pub problem: Option<String>,
    /// Peer id, addresses, peers, calls.
    pub network: NetStatus,
    /// Routing table and storage.
    pub dht: DhtStatus,
    /// Calls to experts being served.
    pub calls: usize,
    /// Hosted experts that are built, in the order of their uids.
    pub experts: Vec<ExpertStatus>,
}

/// Reads the status of a runtime that somebody else owns. Does not keep it running.
#[cfg(feature = "daemon")]
#[derive(Clone)]
pub(crate) struct Watcher(std::sync::Arc<Handles>);

#[cfg(feature = "daemon")]
impl Watcher {
    pub fn status(&self) -> Status {
        self.0.status()
    }
}

impl Runtime {
    /// What it says of itself now. Does not block.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn watcher(&self) -> Watcher {
        Watcher(self.shared.clone())
    }
}

impl Handles {
    /// Why the runtime cannot go on, if so: a supervisor gave up, or hosting failed.
    pub(super) fn failure(&self) -> Option<Error> {
        let hosting = self.hosting.get();
        let escalation = match hosting {
            Hosting::Failed(reason) => return Some(Error::Invalid(reason)),
            Hosting::Running(server) => server.escalation(),
            _ => None,
        };
        let escalation = escalation.or_else(|| self.guardian.status().escalation)?;
        Some(Error::Escalated { part: escalation.child, reason: format!("{:?}", escalation.exit) })
    }

    fn status(&self) -> Status {
        let dht = self.client.dht.status();
        let hosting = self.hosting.get();
        let server = match &hosting {
            Hosting::Running(server) => Some(server.status()),
            _ => None,
        };
        let trouble = server.as_ref().and_then(|server| server.trouble.clone());
        let problem = self.problem(&dht, &hosting, trouble);
        Status {
            version: env!("CARGO_PKG_VERSION"),
            ready: problem.is_none(),
            problem,
            network: self.net.status(),
            dht,
            calls: server.as_ref().map_or(0, |server| server.calls),
            experts: server.map(|server| server.experts).unwrap_or_default(),
        }
    }

    /// The first thing that keeps the runtime from being ready, in words.
    fn problem(&self, dht: &DhtStatus, hosting: &Hosting, trouble: Option<String>) -> Option<String> {
        if self.stopping.load(Ordering::Relaxed) {
            return Some("the node is stopping".to_owned());
        }
        if let Some(failure) = self.failure() {
            return Some(failure.to_string());
        }
        if !dht.joined {
            let why = dht.problem.as_deref().unwrap_or("no initial peer has answered yet");
            return Some(format!("the network is not joined: {why}"));
        }
        match hosting {
            Hosting::Choosing(why) => {
                Some(format!("choosing uids: {}", why.as_deref().unwrap_or("the DHT has not answered yet")))
            }
            _ => trouble,
        }
    }
}
