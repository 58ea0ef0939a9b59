//! [`Bans`]: peers that failed lately and are left alone for a while (docs/wire.md §6.9).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use libp2p_identity::PeerId;
use skep_kernel::Moment;
use skep_wire::Method;

use crate::RpcError;

const FIRST_BAN: Duration = Duration::from_secs(5);
const LONGEST_BAN: Duration = Duration::from_secs(320);
const MAX_PEERS: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Ban {
    until: Moment,
    failures: u32,
}

/// Peers that failed lately. A failure bans for 5 s × 2ⁿ, at most 320 s, n being the bans before it; a success clears
/// them all. Failures during a ban count as the one that began it: they are calls that were under way. Remembers 4096
/// peers, those with the latest end of ban.
///
/// Clones share one list: a runtime has one, for DHT, address book and beam search alike.
#[derive(Clone, Debug, Default)]
pub struct Bans(Arc<Mutex<BTreeMap<PeerId, Ban>>>);

impl Bans {
    /// A list without bans.
    pub fn new() -> Self {
        Self::default()
    }

    /// A dial or call failed through the peer's fault.
    pub fn failed(&self, now: Moment, peer: PeerId) {
        let mut by_peer = self.lock();
        let failures = match by_peer.get(&peer) {
            Some(ban) if now < ban.until => return,
            Some(ban) => ban.failures.saturating_add(1),
            None => 0,
        };
        if by_peer.len() >= MAX_PEERS && !by_peer.contains_key(&peer) {
            let earliest = by_peer.iter().min_by_key(|(_, ban)| ban.until).map(|(peer, _)| *peer);
            earliest.and_then(|peer| by_peer.remove(&peer));
        }
        let length = FIRST_BAN.saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_BAN);
        by_peer.insert(peer, Ban { until: now + length, failures });
    }

    /// Notes what the end of a call says of the peer, `failure` being `None` when there was an answer. The one place where
    /// that is judged: transports call it, for every call. An error in the peer's own words is an answer. A slow expert
    /// does not make a dead peer, a slow DHT node does. What failed for reasons of this node says nothing.
    pub fn note(&self, now: Moment, peer: PeerId, method: Method, failure: Option<&RpcError>) {
        let is_dht = matches!(method, Method::Ping | Method::Store | Method::Find);
        match failure {
            None | Some(RpcError::Remote { .. }) => self.succeeded(&peer),
            Some(error) if error.is_local() => {}
            Some(RpcError::Unreachable { .. }) => self.failed(now, peer),
            Some(RpcError::Deadline { .. }) if is_dht => self.failed(now, peer),
            Some(_) => {}
        }
    }

    /// The peer answered.
    pub fn succeeded(&self, peer: &PeerId) {
        self.lock().remove(peer);
    }

    /// Whether the peer should be left alone now.
    pub fn is_banned(&self, now: Moment, peer: &PeerId) -> bool {
        self.lock().get(peer).is_some_and(|ban| now < ban.until)
    }

    /// Whether the peer failed and has not answered since; its ban may be over.
    pub fn is_suspect(&self, peer: &PeerId) -> bool {
        self.lock().contains_key(peer)
    }

    /// Peers that are banned now.
    pub fn banned(&self, now: Moment) -> BTreeSet<PeerId> {
        self.lock().iter().filter(|(_, ban)| now < ban.until).map(|(peer, _)| *peer).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerId, Ban>> {
        self.0.lock().expect("nothing panics while it holds the list")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Step;

    fn at(seconds: u64) -> Moment {
        Moment::START + Duration::from_secs(seconds)
    }

    #[test]
    fn bans_double_up_to_a_limit_and_end_with_a_success() {
        let (bans, peer) = (Bans::new(), PeerId::random());
        let mut now = Moment::START;
        for seconds in [5, 10, 20, 40, 80, 160, 320, 320] {
            bans.failed(now, peer);
            let end = now + Duration::from_secs(seconds);
            assert!(bans.is_banned(Moment::from_nanos(end.as_nanos() - 1), &peer));
            assert!(!bans.is_banned(end, &peer), "after {seconds} s");
            now = end;
        }
        bans.failed(now, peer);
        bans.succeeded(&peer);
        assert!(!bans.is_banned(now, &peer) && !bans.is_suspect(&peer));
        bans.failed(now, peer);
        assert!(!bans.is_banned(now + FIRST_BAN, &peer));
        assert!(bans.is_suspect(&peer), "until it answers");
    }

    #[test]
    fn failures_during_a_ban_do_not_lengthen_it() {
        let (bans, peer) = (Bans::new(), PeerId::random());
        bans.failed(at(0), peer);
        bans.failed(at(1), peer);
        assert!(bans.is_banned(at(4), &peer) && !bans.is_banned(at(5), &peer));
        bans.failed(at(5), peer);
        assert!(bans.is_banned(at(14), &peer));
    }

    #[test]
    fn only_failures_that_come_from_the_peer_ban_it() {
        let (now, peer, wait) = (Moment::START, PeerId::random(), Duration::from_secs(1));
        let unreachable = |step| RpcError::Unreachable { peer, step, reason: String::new() };
        let late = |step| RpcError::Deadline { peer, step, waited: wait };
        let remote = RpcError::Remote { text: "KeyError('nope')".to_owned() };
        let overloaded = RpcError::Overloaded { waiting: 1, limit: 1, retry_after: wait };
        let (dht, expert) = (Method::Find, Method::Forward);
        for (method, failure, bans_it) in [
            (dht, unreachable(Step::Resolve), true),
            (expert, unreachable(Step::Dial), true),
            (expert, unreachable(Step::OpenStream), true),
            (expert, unreachable(Step::Exchange), true),
            (expert, unreachable(Step::Prepare), false),
            (dht, late(Step::Exchange), true),
            (dht, late(Step::Dial), true),
            (dht, late(Step::Prepare), false),
            (dht, late(Step::Schedule), false),
            (expert, late(Step::Exchange), false),
            (expert, RpcError::NoRoom { size: 1, limit: 1 }, false),
            (expert, RpcError::TooLarge { size: 1, limit: 1 }, false),
            (dht, RpcError::Cancelled, false),
            (dht, RpcError::WouldDeadlock, false),
            (expert, overloaded, false),
            (dht, remote.clone(), false),
        ] {
            let bans = Bans::new();
            bans.note(now, peer, method, Some(&failure));
            assert_eq!(bans.is_banned(now, &peer), bans_it, "{method}: {failure}");
        }
        for words in [None, Some(&remote)] {
            let bans = Bans::new();
            bans.failed(now, peer);
            bans.note(now, peer, dht, words);
            assert!(!bans.is_suspect(&peer), "it has answered");
        }
    }

    #[test]
    fn clones_share_one_list() {
        let (bans, peer) = (Bans::new(), PeerId::random());
        bans.clone().failed(at(0), peer);
        assert_eq!(bans.banned(at(1)), BTreeSet::from([peer]));
    }

    #[test]
    fn the_list_is_bounded() {
        let bans = Bans::new();
        for _ in 0..MAX_PEERS + 10 {
            bans.failed(at(0), PeerId::random());
        }
        assert_eq!(bans.banned(at(1)).len(), MAX_PEERS);
    }
}
