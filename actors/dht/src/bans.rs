//! [`Bans`]: peers that are left alone for a while, shared by all who call peers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libp2p_identity::PeerId;
use skep_kernel::Moment;

use crate::{DhtConfig, config::seconds, core::blacklist::Blacklist};

/// One list of banned peers for DHT, address book and beam search alike. The first ban lasts `blacklist_time`, each
/// further one twice as long; a success ends the series. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bans(Arc<Mutex<Blacklist>>);

impl Bans {
    /// An empty list with the limits of `config`.
    pub fn new(config: &DhtConfig) -> Self {
        let (base, longest) = (seconds(config.blacklist_time), seconds(config.max_blacklist_time));
        Self(Arc::new(Mutex::new(Blacklist::new(base, longest, config.max_banned))))
    }

    /// A dial or call failed through the peer's fault.
    pub fn failed(&self, now: Moment, peer: PeerId) {
        self.list().failed(now, peer);
    }

    /// The peer answered.
    pub fn succeeded(&self, peer: &PeerId) {
        self.list().succeeded(peer);
    }

    /// Whether the peer should be left alone for now.
    pub fn is_banned(&self, now: Moment, peer: &PeerId) -> bool {
        self.list().is_banned(now, peer)
    }

    /// Peers banned now.
    pub fn count(&self, now: Moment) -> usize {
        self.list().len(now)
    }

    fn list(&self) -> MutexGuard<'_, Blacklist> {
        // A panic between two statements of the list leaves a list that is still sound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
