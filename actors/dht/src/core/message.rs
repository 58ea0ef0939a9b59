//! The three calls as values: what [`record`](super::record) reads from and writes to protobuf.

use std::collections::BTreeMap;

use bytes::Bytes;
use skep_kernel::WallTime;

use super::bucket::Contact;
use crate::{DhtId, StoreItem, Stored, Timed};

/// A call; `sender` is the caller's node id, `None` in client mode.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    pub sender: Option<DhtId>,
    pub ask: Ask,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ask {
    Ping { validate: bool },
    Store(Vec<Record>),
    Find(Vec<DhtId>),
}

/// An answer; `sender` is the callee's node id.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Response {
    pub sender: Option<DhtId>,
    pub tell: Tell,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tell {
    Ping { available: bool, dht_time: f64 },
    Store(Vec<bool>),
    Find(Vec<Finding>),
}

/// What a node knows of one key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Finding {
    pub value: Option<Timed<Stored>>,
    pub nearest: Vec<Contact>,
}

/// One entry of a store call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub key: DhtId,
    pub content: Content,
    pub in_cache: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Content {
    Regular { value: Bytes, expiration: WallTime },
    Item { subkey: Bytes, value: Bytes, expiration: WallTime },
    Dictionary(BTreeMap<Bytes, Timed<Bytes>>),
}

impl Record {
    /// A record for a node's main storage.
    pub fn of_item(item: &StoreItem) -> Self {
        let (value, expiration) = (item.value.clone(), item.expiration);
        let content = match item.subkey.clone() {
            Some(subkey) => Content::Item { subkey, value, expiration },
            None => Content::Regular { value, expiration },
        };
        Self { key: item.key, content, in_cache: false }
    }

    /// A record of all that is stored under a key.
    pub fn of_stored(key: DhtId, stored: Timed<Stored>, in_cache: bool) -> Self {
        let content = match stored.value {
            Stored::Regular(value) => Content::Regular { value, expiration: stored.expiration },
            Stored::Dictionary(items) => Content::Dictionary(items),
        };
        Self { key, content, in_cache }
    }

    /// About how many bytes it takes in a message.
    pub fn size(&self) -> usize {
        FRAMING
            + match &self.content {
                Content::Regular { value, .. } => value.len(),
                Content::Item { subkey, value, .. } => subkey.len() + value.len(),
                Content::Dictionary(items) => {
                    items.iter().map(|(subkey, item)| subkey.len() + item.value.len() + FRAMING_ITEM).sum()
                }
            }
    }
}

/// Key, expiration, flags and headers of an entry, in bytes; rounded up.
const FRAMING: usize = 64;
/// Headers and expiration of a dictionary's item, in bytes; rounded up.
const FRAMING_ITEM: usize = 24;
