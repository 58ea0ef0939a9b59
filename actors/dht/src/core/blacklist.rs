//! Peers that failed and are left alone for a while: 5 s, doubled at each failure, forgotten at the first success (§6.9).

use std::{collections::BTreeMap, time::Duration};

use libp2p_identity::PeerId;
use skep_kernel::Moment;

#[derive(Clone, Copy, Debug)]
struct Ban {
    failures: u32,
    until: Moment,
}

/// Bans by peer, bounded in number and length.
#[derive(Debug)]
pub(crate) struct Blacklist {
    base: Duration,
    longest: Duration,
    capacity: usize,
    bans: BTreeMap<PeerId, Ban>,
}

impl Blacklist {
    pub fn new(base: Duration, longest: Duration, capacity: usize) -> Self {
        Self { base, longest, capacity: capacity.max(1), bans: BTreeMap::new() }
    }

    /// Bans a peer: longer than the last time, if it has not succeeded since. While a ban lasts, more failures do not
    /// count: they are calls that were under way.
    pub fn failed(&mut self, now: Moment, peer: PeerId) {
        let failures = match self.bans.get(&peer) {
            Some(ban) if now < ban.until => return,
            Some(ban) => ban.failures + 1,
            None => 0,
        };
        if !self.bans.contains_key(&peer) && self.bans.len() >= self.capacity {
            let soonest = self.bans.iter().min_by_key(|(_, ban)| ban.until).map(|(peer, _)| *peer);
            soonest.map(|peer| self.bans.remove(&peer));
        }
        let length = self.base.saturating_mul(2u32.saturating_pow(failures)).min(self.longest);
        self.bans.insert(peer, Ban { failures, until: now + length });
    }

    pub fn succeeded(&mut self, peer: &PeerId) {
        self.bans.remove(peer);
    }

    pub fn is_banned(&self, now: Moment, peer: &PeerId) -> bool {
        self.bans.get(peer).is_some_and(|ban| now < ban.until)
    }

    /// Peers banned now.
    pub fn len(&self, now: Moment) -> usize {
        self.bans.values().filter(|ban| now < ban.until).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bans_double_up_to_a_limit_and_end_with_a_success() {
        let mut list = Blacklist::new(5 * SECOND, 60 * SECOND, 8);
        let peer = PeerId::random();
        let mut now = Moment::START;
        for seconds in [5, 10, 20, 40, 60, 60] {
            list.failed(now, peer);
            now = now + (seconds * SECOND - Duration::from_nanos(1));
            assert!(list.is_banned(now, &peer));
            now = now + Duration::from_nanos(1);
            assert!(!list.is_banned(now, &peer), "after {seconds} s");
        }
        list.succeeded(&peer);
        list.failed(now, peer);
        assert!(!list.is_banned(now + 5 * SECOND, &peer));
    }

    #[test]
    fn failures_during_a_ban_do_not_lengthen_it() {
        let mut list = Blacklist::new(5 * SECOND, 60 * SECOND, 8);
        let peer = PeerId::random();
        list.failed(Moment::START, peer);
        list.failed(Moment::START + SECOND, peer);
        assert!(!list.is_banned(Moment::START + 5 * SECOND, &peer));
    }

    #[test]
    fn the_number_of_bans_is_bounded() {
        let mut list = Blacklist::new(5 * SECOND, 60 * SECOND, 4);
        for _ in 0..100 {
            list.failed(Moment::START, PeerId::random());
        }
        assert_eq!(list.len(Moment::START), 4);
    }
}
