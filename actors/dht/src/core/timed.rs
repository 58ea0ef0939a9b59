//! Expirations: their order, and how two values of one key merge (§6.7, §6.9).

use std::{cmp::Ordering, collections::btree_map::Entry as MapEntry};

use skep_kernel::WallTime;

use crate::{Stored, Timed};

/// An expiration with a total order; never NaN once it is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Expiry(pub f64);

impl Eq for Expiry {}

impl PartialOrd for Expiry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Expiry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Whether a value may still be seen.
pub(crate) fn is_valid(expiration: WallTime, now: WallTime) -> bool {
    expiration.0 >= now.0
}

impl Timed<Stored> {
    /// Takes in what another node knows of the same key: dictionaries subkey by subkey, the later expiration wins.
    /// Tells whether anything changed.
    pub(crate) fn merge(&mut self, other: Timed<Stored>) -> bool {
        let later = other.expiration.0 > self.expiration.0;
        match (&mut self.value, other.value) {
            (Stored::Dictionary(ours), Stored::Dictionary(theirs)) => {
                let mut changed = false;
                for (subkey, item) in theirs {
                    match ours.entry(subkey) {
                        MapEntry::Vacant(place) => {
                            place.insert(item);
                            changed = true;
                        }
                        MapEntry::Occupied(mut place) if item.expiration.0 > place.get().expiration.0 => {
                            place.insert(item);
                            changed = true;
                        }
                        MapEntry::Occupied(_) => {}
                    }
                }
                if later {
                    self.expiration = other.expiration;
                }
                changed
            }
            (value, theirs) if later => {
                *value = theirs;
                self.expiration = other.expiration;
                true
            }
            _ => false,
        }
    }

    /// Leaves out what expires after `latest`; `None` when nothing remains.
    pub(crate) fn ending_by(mut self, latest: WallTime) -> Option<Timed<Stored>> {
        if let Stored::Dictionary(items) = &mut self.value {
            items.retain(|_, item| item.expiration.0 <= latest.0);
            let last = items.values().map(|item| Expiry(item.expiration.0)).max()?;
            self.expiration = WallTime(last.0);
        }
        (self.expiration.0 <= latest.0).then_some(self)
    }

    /// Leaves out what has expired; `None` when nothing remains.
    pub(crate) fn valid_at(mut self, now: WallTime) -> Option<Timed<Stored>> {
        if let Stored::Dictionary(items) = &mut self.value {
            items.retain(|_, item| is_valid(item.expiration, now));
            if items.is_empty() {
                return None;
            }
        }
        is_valid(self.expiration, now).then_some(self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    /// A value that its place and expiration decide, as one writer would make it.
    fn timed(subkey: u8, expiration: u8) -> Timed<Bytes> {
        Timed { value: Bytes::from(vec![subkey, expiration]), expiration: WallTime(expiration.into()) }
    }

    prop_compose! {
        fn stored()(items in prop::collection::btree_map(0..4u8, 1..9u8, 0..4), regular in 1..9u8) -> Timed<Stored> {
            match items.values().max() {
                None => {
                    let Timed { value, expiration } = timed(0, regular);
                    Timed { value: Stored::Regular(value), expiration }
                }
                Some(latest) => {
                    let items: BTreeMap<Bytes, Timed<Bytes>> =
                        items.iter().map(|(key, at)| (Bytes::from(vec![*key]), timed(*key, *at))).collect();
                    Timed { value: Stored::Dictionary(items), expiration: WallTime((*latest).into()) }
                }
            }
        }
    }

    fn merged(mut a: Timed<Stored>, b: Timed<Stored>) -> Timed<Stored> {
        a.merge(b);
        a
    }

    proptest! {
        #[test]
        fn merging_again_changes_nothing(a in stored(), b in stored()) {
            let mut both = merged(a, b.clone());
            prop_assert!(!both.merge(b));
        }

        #[test]
        fn dictionaries_merge_in_any_order(a in stored(), b in stored()) {
            let dictionaries = matches!((&a.value, &b.value), (Stored::Dictionary(_), Stored::Dictionary(_)));
            prop_assume!(dictionaries);
            prop_assert_eq!(merged(a.clone(), b.clone()), merged(b, a));
        }

        #[test]
        fn what_is_left_is_valid(a in stored(), now in 0..10u8) {
            let now = WallTime(now.into());
            if let Some(Timed { value, expiration }) = a.valid_at(now) {
                prop_assert!(is_valid(expiration, now));
                if let Stored::Dictionary(items) = value {
                    prop_assert!(!items.is_empty() && items.values().all(|item| is_valid(item.expiration, now)));
                }
            }
        }
    }
}
