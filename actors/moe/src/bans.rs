//! [`Bans`]: peers that failed lately and are passed over while others can do their work.
//!
//! They are this mixture's own, beside those of the DHT (`skep_dht::Bans`): a peer that was too slow for a fan-out's
//! deadline may still be a good DHT node, and one that nobody can replace is asked all the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use libp2p_identity::PeerId;
use skep_kernel::Moment;

/// First ban; each one that follows before a success is twice as long.
const FIRST: Duration = Duration::from_secs(5);
/// Doublings at most: the longest ban is 320 s.
const MAX_DOUBLINGS: u32 = 6;

#[derive(Clone, Copy, Debug)]
struct Ban {
    until: Moment,
    strikes: u32,
}

/// Banned peers, at most `capacity`; the ban that ends first is forgotten first.
#[derive(Debug)]
pub(crate) struct Bans {
    capacity: usize,
    bans: BTreeMap<PeerId, Ban>,
}

impl Bans {
    /// Nobody is banned.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, bans: BTreeMap::new() }
    }

    /// Bans a peer that failed; several failures during one ban count once.
    pub fn strike(&mut self, now: Moment, peer: PeerId) {
        let strikes = match self.bans.get(&peer) {
            Some(ban) if ban.until > now => return,
            Some(ban) => (ban.strikes + 1).min(MAX_DOUBLINGS),
            None => 0,
        };
        self.bans.insert(peer, Ban { until: now + FIRST * 2u32.pow(strikes), strikes });
        while self.bans.len() > self.capacity {
            let first = self.bans.iter().min_by_key(|(_, ban)| ban.until).map(|(peer, _)| *peer);
            self.bans.remove(&first.expect("a map over its capacity is not empty"));
        }
    }

    /// Forgets what a peer did: it answered.
    pub fn clear(&mut self, peer: &PeerId) {
        self.bans.remove(peer);
    }

    /// Who is banned now.
    pub fn active(&self, now: Moment) -> BTreeSet<PeerId> {
        self.bans.iter().filter(|(_, ban)| ban.until > now).map(|(peer, _)| *peer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_double_until_a_success_clears_them() {
        let (mut bans, peer) = (Bans::new(4), PeerId::random());
        let mut now = Moment::START;
        for seconds in [5, 10, 20] {
            bans.strike(now, peer);
            bans.strike(now, peer);
            let end = now + Duration::from_secs(seconds);
            assert!(bans.active(Moment::from_nanos(end.as_nanos() - 1)).contains(&peer));
            assert!(bans.active(end).is_empty(), "after {seconds} s");
            now = end;
        }
        bans.clear(&peer);
        bans.strike(now, peer);
        assert!(bans.active(now + FIRST).is_empty());
    }

    #[test]
    fn the_list_is_bounded() {
        let mut bans = Bans::new(2);
        for i in 0..5 {
            bans.strike(Moment::from_nanos(i), PeerId::random());
        }
        assert_eq!(bans.active(Moment::from_nanos(5)).len(), 2);
    }
}
