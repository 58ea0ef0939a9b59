//! Records held by this node, for the network or as a cache (§6.7), bounded in number, bytes and life.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;
use libp2p_identity::PeerId;
use skep_kernel::WallTime;

use super::timed::{Expiry, is_valid};
use crate::{DhtId, Stored, Timed};

/// What a storage does when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenFull {
    /// Refuse newcomers: records that the network entrusted to us stay.
    Refuse,
    /// Make room by dropping what expires first.
    EvictEarliest,
}

/// What a storage may hold. One peer may fill at most a quarter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Regular values and dictionary items.
    pub records: usize,
    /// Keys, subkeys and values, with an allowance for bookkeeping.
    pub bytes: usize,
    /// Bytes under one key: a dictionary must fit an answer.
    pub bytes_per_key: usize,
    /// Seconds for which a record is held, however late it expires. Its expiration stays as it was told: it decides which
    /// of two records is newer, and signatures cover it.
    pub life: f64,
}

/// Allowance for bookkeeping in the bytes of one record.
const OVERHEAD: usize = 64;

#[derive(Clone, Debug)]
struct Held {
    value: Bytes,
    expiration: WallTime,
    /// When it is dropped: at its expiration, or at the end of its life here.
    until: Expiry,
    /// Who brought it; `None` is this node itself.
    owner: Option<PeerId>,
}

#[derive(Clone, Debug)]
enum Entry {
    Regular(Held),
    /// Items by subkey, never empty, and what they cost together.
    Dictionary {
        items: BTreeMap<Bytes, Held>,
        bytes: usize,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    records: usize,
    bytes: usize,
}

/// A place in a storage: a key, and a subkey for an item of a dictionary.
type Place = (DhtId, Option<Bytes>);

/// Records by key; what has expired is dropped at the next touch.
#[derive(Debug)]
pub(crate) struct Storage {
    when_full: WhenFull,
    limits: Limits,
    entries: BTreeMap<DhtId, Entry>,
    /// What is dropped next comes first.
    by_end: BTreeSet<(Expiry, Place)>,
    total: Usage,
    per_peer: BTreeMap<PeerId, Usage>,
}

impl Storage {
    pub fn new(when_full: WhenFull, limits: Limits) -> Self {
        Self {
            when_full,
            limits,
            entries: BTreeMap::new(),
            by_end: BTreeSet::new(),
            total: Usage::default(),
            per_peer: BTreeMap::new(),
        }
    }

    /// Stores a regular value. Only a strictly later expiration replaces what is there; a rejected store changes
    /// nothing (hivemind's shortens the life of the newer value).
    pub fn store(
        &mut self,
        now: WallTime,
        key: DhtId,
        value: Bytes,
        expiration: WallTime,
        owner: Option<PeerId>,
    ) -> bool {
        self.expire(now);
        let latest = self.expiration(&key);
        if !is_acceptable(expiration, now) || latest.is_some_and(|latest| expiration.0 <= latest.0) {
            return false;
        }
        let held = self.held_from(now, value, expiration, owner);
        let replaced: Vec<Place> = self.places(&key);
        self.insert((key, None), held, &replaced)
    }

    /// Stores one item of a dictionary. A regular value gives way only to an item that expires later.
    pub fn store_item(
        &mut self,
        now: WallTime,
        key: DhtId,
        subkey: Bytes,
        value: Bytes,
        expiration: WallTime,
        owner: Option<PeerId>,
    ) -> bool {
        self.expire(now);
        let place = (key, Some(subkey));
        let rival = match self.entries.get(&key) {
            Some(Entry::Regular(held)) => Some(((key, None), held.expiration)),
            Some(Entry::Dictionary { items, .. }) => {
                place.1.as_ref().and_then(|subkey| items.get(subkey)).map(|held| (place.clone(), held.expiration))
            }
            None => None,
        };
        let is_newer = rival.as_ref().is_none_or(|(_, latest)| expiration.0 > latest.0);
        if !is_acceptable(expiration, now) || !is_newer {
            return false;
        }
        let replaced: Vec<Place> = rival.into_iter().map(|(place, _)| place).collect();
        let held = self.held_from(now, value, expiration, owner);
        self.insert(place, held, &replaced)
    }

    /// Stores every item of a dictionary that is newer than ours; tells whether there were any and all of them were.
    /// hivemind stops at the first that is not.
    pub fn store_dictionary(
        &mut self,
        now: WallTime,
        key: DhtId,
        items: &BTreeMap<Bytes, Timed<Bytes>>,
        owner: Option<PeerId>,
    ) -> bool {
        let outcomes: Vec<bool> = items
            .iter()
            .map(|(subkey, item)| self.store_item(now, key, subkey.clone(), item.value.clone(), item.expiration, owner))
            .collect();
        !outcomes.is_empty() && outcomes.iter().all(|stored| *stored)
    }

    /// Stores a value of either kind.
    pub fn store_any(&mut self, now: WallTime, key: DhtId, value: &Timed<Stored>, owner: Option<PeerId>) -> bool {
        match &value.value {
            Stored::Regular(bytes) => self.store(now, key, bytes.clone(), value.expiration, owner),
            Stored::Dictionary(items) => self.store_dictionary(now, key, items, owner),
        }
    }

    pub fn get(&mut self, now: WallTime, key: &DhtId) -> Option<Timed<Stored>> {
        self.expire(now);
        let entry = self.entries.get(key)?;
        let expiration = entry.expiration();
        let value = match entry {
            Entry::Regular(held) => Stored::Regular(held.value.clone()),
            Entry::Dictionary { items, .. } => {
                Stored::Dictionary(items.iter().map(|(subkey, held)| (subkey.clone(), held.timed())).collect())
            }
        };
        Some(Timed { value, expiration })
    }

    /// Keys after `cursor`, in order.
    pub fn keys_after(&self, cursor: Option<DhtId>) -> impl Iterator<Item = DhtId> {
        let start = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((start, Bound::Unbounded)).map(|(key, _)| *key)
    }

    pub fn contains(&self, key: &DhtId) -> bool {
        self.entries.contains_key(key)
    }

    /// When what is stored under a key expires, a dictionary with its last item.
    pub fn expiration(&self, key: &DhtId) -> Option<WallTime> {
        self.entries.get(key).map(Entry::expiration)
    }

    /// When what is stored under a key is dropped, a dictionary with its last item: not later than it expires.
    pub fn until(&self, key: &DhtId) -> Option<WallTime> {
        self.entries.get(key).map(Entry::until)
    }

    /// Records held.
    pub fn records(&self) -> usize {
        self.total.records
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.total.bytes
    }

    /// Drops what has expired, and what has been held for long enough.
    pub fn expire(&mut self, now: WallTime) {
        while let Some((end, place)) = self.by_end.first() {
            if is_valid(WallTime(end.0), now) {
                break;
            }
            let place = place.clone();
            self.remove(&place);
        }
    }

    fn held_from(&self, now: WallTime, value: Bytes, expiration: WallTime, owner: Option<PeerId>) -> Held {
        let until = Expiry(expiration.0.min(now.0 + self.limits.life));
        Held { value, expiration, until, owner }
    }

    /// Puts a record at its place if there is room without `replaced`, which then goes.
    fn insert(&mut self, place: Place, held: Held, replaced: &[Place]) -> bool {
        let cost = cost(&place, &held.value);
        let freed: usize = replaced.iter().map(|old| self.cost_at(old)).sum();
        let under_key = match self.entries.get(&place.0) {
            Some(Entry::Dictionary { bytes, .. }) => *bytes,
            _ => freed,
        };
        if under_key - freed + cost > self.limits.bytes_per_key || !self.peer_has_room(&held, cost, replaced) {
            return false;
        }
        if !self.make_room(cost, freed, replaced, &held) {
            return false;
        }
        replaced.iter().for_each(|old| self.remove(old));
        self.add(place, held, cost);
        true
    }

    fn peer_has_room(&self, held: &Held, cost: usize, replaced: &[Place]) -> bool {
        let Some(peer) = held.owner else { return true };
        let used = self.per_peer.get(&peer).copied().unwrap_or_default();
        let own: Vec<usize> = replaced
            .iter()
            .filter(|old| self.held(old).is_some_and(|held| held.owner == Some(peer)))
            .map(|old| self.cost_at(old))
            .collect();
        used.records - own.len() < (self.limits.records / 4).max(1)
            && used.bytes - own.iter().sum::<usize>() + cost <= self.limits.bytes / 4
    }

    fn make_room(&mut self, cost: usize, freed: usize, replaced: &[Place], held: &Held) -> bool {
        let (limits, replaces) = (self.limits, replaced.len());
        let fits =
            |total: Usage| total.records - replaces < limits.records && total.bytes - freed + cost <= limits.bytes;
        while !fits(self.total) {
            let victim = self.by_end.iter().find(|(_, place)| !replaced.contains(place));
            match (self.when_full, victim) {
                (WhenFull::EvictEarliest, Some((end, place))) if *end < held.until => {
                    let place = place.clone();
                    self.remove(&place);
                }
                _ => return false,
            }
        }
        true
    }

    fn add(&mut self, place: Place, held: Held, cost: usize) {
        self.total.records += 1;
        self.total.bytes += cost;
        if let Some(peer) = held.owner {
            let used = self.per_peer.entry(peer).or_default();
            used.records += 1;
            used.bytes += cost;
        }
        self.by_end.insert((held.until, place.clone()));
        match place {
            (key, None) => drop(self.entries.insert(key, Entry::Regular(held))),
            (key, Some(subkey)) => {
                let empty = || Entry::Dictionary { items: BTreeMap::new(), bytes: 0 };
                match self.entries.entry(key).or_insert_with(empty) {
                    Entry::Dictionary { items, bytes } => {
                        *bytes += cost;
                        items.insert(subkey, held);
                    }
                    Entry::Regular(_) => unreachable!("a regular value was removed before an item takes its place"),
                }
            }
        }
    }

    fn remove(&mut self, place: &Place) {
        let held = match (self.entries.get_mut(&place.0), &place.1) {
            (Some(Entry::Dictionary { items, bytes }), Some(subkey)) => {
                let held = items.remove(subkey);
                *bytes -= held.as_ref().map_or(0, |held| cost(place, &held.value));
                if items.is_empty() {
                    self.entries.remove(&place.0);
                }
                held
            }
            (Some(Entry::Regular(held)), None) => {
                let held = held.clone();
                self.entries.remove(&place.0);
                Some(held)
            }
            _ => None,
        };
        let Some(held) = held else { return };
        let cost = cost(place, &held.value);
        self.by_end.remove(&(held.until, place.clone()));
        self.total.records -= 1;
        self.total.bytes -= cost;
        let Some(peer) = held.owner else { return };
        let used = self.per_peer.get_mut(&peer).expect("whoever holds a record has a usage");
        used.records -= 1;
        used.bytes -= cost;
        if used.records == 0 {
            self.per_peer.remove(&peer);
        }
    }

    fn held(&self, place: &Place) -> Option<&Held> {
        match (self.entries.get(&place.0)?, &place.1) {
            (Entry::Regular(held), None) => Some(held),
            (Entry::Dictionary { items, .. }, Some(subkey)) => items.get(subkey),
            _ => None,
        }
    }

    fn cost_at(&self, place: &Place) -> usize {
        self.held(place).map_or(0, |held| cost(place, &held.value))
    }

    fn places(&self, key: &DhtId) -> Vec<Place> {
        match self.entries.get(key) {
            Some(Entry::Regular(_)) => vec![(*key, None)],
            Some(Entry::Dictionary { items, .. }) => items.keys().map(|subkey| (*key, Some(subkey.clone()))).collect(),
            None => Vec::new(),
        }
    }
}

impl Entry {
    /// The latest expiration: subkeys only ever move to later ones.
    fn expiration(&self) -> WallTime {
        match self {
            Entry::Regular(held) => held.expiration,
            Entry::Dictionary { items, .. } => {
                let latest = items.values().map(|held| Expiry(held.expiration.0)).max();
                WallTime(latest.map_or(f64::NEG_INFINITY, |latest| latest.0))
            }
        }
    }

    fn until(&self) -> WallTime {
        let last = match self {
            Entry::Regular(held) => Some(held.until),
            Entry::Dictionary { items, .. } => items.values().map(|held| held.until).max(),
        };
        WallTime(last.map_or(f64::NEG_INFINITY, |last| last.0))
    }
}

impl Held {
    fn timed(&self) -> Timed<Bytes> {
        Timed { value: self.value.clone(), expiration: self.expiration }
    }
}

/// NaN is never later than now.
fn is_acceptable(expiration: WallTime, now: WallTime) -> bool {
    is_valid(expiration, now)
}

fn cost(place: &Place, value: &Bytes) -> usize {
    OVERHEAD + place.0.0.len() + place.1.as_ref().map_or(0, Bytes::len) + value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: WallTime = WallTime(1000.0);

    fn limits(records: usize) -> Limits {
        Limits { records, bytes: 1 << 20, bytes_per_key: 1 << 19, life: 1e6 }
    }

    fn put(storage: &mut Storage, n: usize, expiration: f64, owner: Option<PeerId>) -> bool {
        let key = DhtId::of_bytes(&n.to_be_bytes());
        storage.store(NOW, key, Bytes::from_static(b"value"), WallTime(expiration), owner)
    }

    #[test]
    fn a_full_storage_refuses_newcomers_and_still_updates() {
        let mut storage = Storage::new(WhenFull::Refuse, limits(4));
        assert!((0..4).all(|n| put(&mut storage, n, 2000.0, None)));
        assert!(!put(&mut storage, 4, 9000.0, None));
        assert!(put(&mut storage, 0, 2001.0, None), "a newer value takes the place of the older one");
        assert_eq!(storage.records(), 4);
    }

    #[test]
    fn one_peer_fills_at_most_a_quarter() {
        let mut storage = Storage::new(WhenFull::Refuse, limits(40));
        let (greedy, other) = (PeerId::random(), PeerId::random());
        assert_eq!((0..40).filter(|n| put(&mut storage, *n, 2000.0, Some(greedy))).count(), 10);
        assert!(put(&mut storage, 100, 2000.0, Some(other)));
        storage.expire(WallTime(3000.0));
        assert!(put(&mut storage, 101, 4000.0, Some(greedy)), "what has expired no longer counts");
    }

    #[test]
    fn a_quarter_counts_bytes_too() {
        let mut storage = Storage::new(WhenFull::Refuse, Limits { bytes: 4000, bytes_per_key: 4000, ..limits(1000) });
        let value = Bytes::from(vec![0; 950]);
        let peer = Some(PeerId::random());
        assert!(!storage.store(NOW, DhtId([1; 20]), value.clone(), WallTime(2000.0), peer));
        assert!(storage.store(NOW, DhtId([1; 20]), value, WallTime(2000.0), None));
    }

    #[test]
    fn a_cache_evicts_what_expires_first() {
        let mut cache = Storage::new(WhenFull::EvictEarliest, limits(3));
        for (n, expiration) in [(0, 1500.0), (1, 1200.0), (2, 1900.0), (3, 1700.0)] {
            assert!(put(&mut cache, n, expiration, None));
        }
        assert!(!cache.contains(&DhtId::of_bytes(&1usize.to_be_bytes())));
        assert!(!put(&mut cache, 4, 1100.0, None), "a newcomer that would be first to go does not enter");
        assert_eq!(cache.records(), 3);
    }

    #[test]
    fn one_key_holds_bounded_bytes() {
        let mut storage = Storage::new(WhenFull::Refuse, Limits { bytes_per_key: 1000, ..limits(1000) });
        let key = DhtId([7; 20]);
        let stored = (0..100u8)
            .filter(|n| {
                let subkey = Bytes::from(vec![*n]);
                storage.store_item(NOW, key, subkey, Bytes::from_static(b"v"), WallTime(2000.0), None)
            })
            .count();
        assert_eq!(stored, 1000 / (OVERHEAD + 20 + 1 + 1));
    }

    #[test]
    fn every_item_of_a_dictionary_is_tried() {
        let mut storage = Storage::new(WhenFull::Refuse, limits(100));
        let key = DhtId([7; 20]);
        let item = |expiration| Timed { value: Bytes::from_static(b"v"), expiration: WallTime(expiration) };
        let subkey = |n: u8| Bytes::from(vec![n]);
        assert!(storage.store_item(NOW, key, subkey(0), Bytes::new(), WallTime(3000.0), None));
        let items = BTreeMap::from([(subkey(0), item(2000.0)), (subkey(1), item(2000.0))]);
        assert!(!storage.store_dictionary(NOW, key, &items, None), "the first item is older than ours");
        let Some(Timed { value: Stored::Dictionary(held), .. }) = storage.get(NOW, &key) else {
            panic!("a dictionary")
        };
        assert_eq!(held.keys().cloned().collect::<Vec<_>>(), [subkey(0), subkey(1)]);
    }

    #[test]
    fn expirations_that_are_no_time_are_refused() {
        let mut storage = Storage::new(WhenFull::Refuse, limits(10));
        assert!(!put(&mut storage, 0, f64::NAN, None));
        assert!(!put(&mut storage, 0, f64::NEG_INFINITY, None));
        assert_eq!(storage.records(), 0);
    }

    #[test]
    fn what_never_expires_is_dropped_at_the_end_of_its_life() {
        let mut storage = Storage::new(WhenFull::Refuse, Limits { life: 500.0, ..limits(2) });
        let (eternal, far) = (f64::INFINITY, 1e300);
        assert!(put(&mut storage, 0, eternal, None) && put(&mut storage, 1, far, None));
        let key = DhtId::of_bytes(&0usize.to_be_bytes());
        let told = storage.get(WallTime(1499.0), &key).map(|found| found.expiration);
        assert_eq!(told, Some(WallTime(eternal)), "readers, and signatures, see what was stored");
        assert!(!put(&mut storage, 2, 2000.0, None), "it is full");
        storage.expire(WallTime(1501.0));
        assert_eq!((storage.records(), storage.bytes()), (0, 0));
        assert!(put(&mut storage, 0, eternal, None), "whoever still wants it stores it again");
    }

    #[test]
    fn a_full_cache_lets_newcomers_in_whatever_the_expirations_of_those_before() {
        let mut cache = Storage::new(WhenFull::EvictEarliest, Limits { life: 500.0, ..limits(2) });
        assert!(put(&mut cache, 0, f64::INFINITY, None) && put(&mut cache, 1, f64::INFINITY, None));
        let later = cache.store(WallTime(1100.0), DhtId([9; 20]), Bytes::new(), WallTime(1550.0), None);
        assert!(later && cache.records() == 2);
    }

    #[test]
    fn accounts_balance_whatever_happens() {
        let mut storage = Storage::new(WhenFull::EvictEarliest, limits(50));
        let peers: Vec<Option<PeerId>> = vec![None, Some(PeerId::random()), Some(PeerId::random())];
        let mut now = 1000.0;
        for step in 0..5000usize {
            let random = step.wrapping_mul(2_654_435_761) >> 7;
            let key = DhtId([(random % 23) as u8; 20]);
            let expiration = WallTime(now + (random % 97) as f64);
            let owner = peers[random % 3];
            let value = Bytes::from(vec![0; random % 50]);
            match random % 5 {
                0 | 1 => drop(storage.store(WallTime(now), key, value, expiration, owner)),
                _ => {
                    let subkey = Bytes::from(vec![(random % 7) as u8]);
                    storage.store_item(WallTime(now), key, subkey, value, expiration, owner);
                }
            }
            now += 0.25;
            let places: Vec<Place> = storage.entries.keys().flat_map(|key| storage.places(key)).collect();
            assert_eq!(storage.total.records, places.len());
            assert_eq!(storage.total.bytes, places.iter().map(|place| storage.cost_at(place)).sum::<usize>());
            assert_eq!(storage.by_end.len(), places.len());
            let per_peer: usize = storage.per_peer.values().map(|used| used.records).sum();
            let owned = places.iter().filter(|place| storage.held(place).unwrap().owner.is_some()).count();
            assert_eq!(per_peer, owned);
        }
        storage.expire(WallTime(1e9));
        assert_eq!((storage.records(), storage.bytes()), (0, 0));
        assert!(storage.per_peer.is_empty() && storage.by_end.is_empty());
    }
}
