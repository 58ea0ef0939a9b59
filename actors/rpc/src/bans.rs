//! Peers that failed lately, for everybody who chooses peers: DHT, address book, beam search (docs/wire.md §6.9).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use libp2p_identity::PeerId;
use skep_kernel::{Moment, SharedClock};

const FIRST_BAN: Duration = Duration::from_secs(5);
/// Bans double up to this many times: at most about 43 minutes.
const MAX_DOUBLINGS: u32 = 9;
const MAX_PEERS: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Ban {
    until: Moment,
    failures: u32,
}

/// Peers that failed lately. A failure bans for 5 s × 2ⁿ, n being the bans before it; a success clears them all.
/// Failures during a ban count as the one that began it. Remembers 4096 peers, those with the latest end of ban.
///
/// Clones share one table.
#[derive(Clone)]
pub struct Bans {
    clock: SharedClock,
    by_peer: Arc<Mutex<BTreeMap<PeerId, Ban>>>,
}

impl Bans {
    /// A table without bans.
    pub fn new(clock: SharedClock) -> Self {
        Self { clock, by_peer: Arc::default() }
    }

    /// Whether the peer should be left alone now.
    pub fn is_banned(&self, peer: PeerId) -> bool {
        let now = self.clock.now();
        self.lock().get(&peer).is_some_and(|ban| now < ban.until)
    }

    /// The peer did not answer.
    pub fn failed(&self, peer: PeerId) {
        let now = self.clock.now();
        let mut by_peer = self.lock();
        let failures = match by_peer.get(&peer) {
            Some(ban) if now < ban.until => return,
            Some(ban) => ban.failures + 1,
            None => 0,
        };
        if by_peer.len() >= MAX_PEERS && !by_peer.contains_key(&peer) {
            let earliest = by_peer.iter().min_by_key(|(_, ban)| ban.until).map(|(peer, _)| *peer);
            earliest.and_then(|peer| by_peer.remove(&peer));
        }
        let until = now + FIRST_BAN * 2u32.pow(failures.min(MAX_DOUBLINGS));
        by_peer.insert(peer, Ban { until, failures });
    }

    /// The peer answered.
    pub fn succeeded(&self, peer: PeerId) {
        self.lock().remove(&peer);
    }

    /// Peers that are banned now.
    pub fn banned(&self) -> Vec<PeerId> {
        let now = self.clock.now();
        self.lock().iter().filter(|(_, ban)| now < ban.until).map(|(peer, _)| *peer).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerId, Ban>> {
        self.by_peer.lock().expect("no panic while bans are held")
    }
}

#[cfg(test)]
mod tests {
    use skep_kernel::{TokioClock, WallTime};

    use super::*;

    fn bans() -> Bans {
        Bans::new(Arc::new(TokioClock::starting_at(WallTime(0.0))))
    }

    async fn advance(seconds: f64) {
        tokio::time::advance(Duration::from_secs_f64(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn each_failure_after_a_ban_doubles_the_next() {
        let (bans, peer) = (bans(), PeerId::random());
        for seconds in [5.0, 10.0, 20.0] {
            bans.failed(peer);
            advance(seconds - 0.1).await;
            assert!(bans.is_banned(peer));
            advance(0.1).await;
            assert!(!bans.is_banned(peer));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failures_at_the_same_time_count_once_and_success_clears() {
        let (bans, peer) = (bans(), PeerId::random());
        bans.failed(peer);
        bans.failed(peer);
        advance(5.0).await;
        assert!(!bans.is_banned(peer));
        bans.failed(peer);
        bans.succeeded(peer);
        assert!(!bans.is_banned(peer));
        bans.failed(peer);
        advance(5.0).await;
        assert!(!bans.is_banned(peer));
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded() {
        let bans = bans();
        for _ in 0..MAX_PEERS + 10 {
            bans.failed(PeerId::random());
        }
        assert_eq!(bans.banned().len(), MAX_PEERS);
    }
}
