//! Which records are believed: a chain of validators that check what others store and tell, sign what this node stores,
//! and take signatures off what it reads (docs/wire.md §6.11). Pure.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use skep_kernel::WallTime;
use skep_wire::dht_value::IS_REGULAR_VALUE;

use super::{expert_types::ExpertTypes, signature::RsaSignatures};
use crate::{DhtKey, StoreItem, Stored, Timed};

/// One record as validators see it.
#[derive(Clone, Debug, PartialEq)]
pub struct DhtRecord {
    /// Where it lies.
    pub key: DhtKey,
    /// Its serialized subkey; `c0`, a serialized `None`, for a plain value.
    pub subkey: Bytes,
    /// Its serialized value, signatures included.
    pub value: Bytes,
    /// When it expires.
    pub expiration: WallTime,
}

/// Decides about records. Called on the system's thread: it must be quick and must not block.
pub trait RecordValidator: Send + Sync {
    /// Whether the record is believed: one that another node stores here or tells us.
    fn validate(&self, record: &DhtRecord) -> bool;

    /// The value with a signature, for a record that this node stores; unchanged when there is nothing to sign.
    fn sign(&self, record: &DhtRecord) -> Bytes {
        record.value.clone()
    }

    /// The value of a valid record without its signature.
    fn strip(&self, record: &DhtRecord) -> Bytes {
        record.value.clone()
    }

    /// Whether checking it takes more than a few microseconds. Of one message only so many are checked.
    fn is_costly(&self, _record: &DhtRecord) -> bool {
        false
    }

    /// Validators check and strip in falling order, and sign in rising order.
    fn priority(&self) -> i32 {
        0
    }
}

/// Validators in order. Cheap to clone.
#[derive(Clone)]
pub struct Validators(Arc<[Arc<dyn RecordValidator>]>);

/// Costly records that are checked in one store call; the others are refused.
pub(crate) const MAX_COSTLY_STORES: usize = 256;
/// Costly records that are checked of one value that another node tells; the others are ignored.
const MAX_COSTLY_TOLD: usize = 1024;

impl Default for Validators {
    /// Signatures are checked, nothing is signed, and entries of expert grids must be what they claim.
    fn default() -> Self {
        Self::new([Arc::new(RsaSignatures::checking()) as Arc<dyn RecordValidator>, Arc::new(ExpertTypes)])
    }
}

impl fmt::Debug for Validators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Validators({})", self.0.len())
    }
}

impl Validators {
    /// A chain of these, sorted by their priorities.
    pub fn new(validators: impl IntoIterator<Item = Arc<dyn RecordValidator>>) -> Self {
        let mut validators: Vec<_> = validators.into_iter().collect();
        validators.sort_by_key(|validator| validator.priority());
        Self(validators.into())
    }

    /// Believes everything.
    pub fn none() -> Self {
        Self::new([])
    }

    /// The default chain, which also signs our own records: those whose key or subkey has the owner marker of this key.
    pub fn signing(key: crate::RecordKey) -> Self {
        Self::new([Arc::new(RsaSignatures::signing(key)) as Arc<dyn RecordValidator>, Arc::new(ExpertTypes)])
    }

    /// Whether every validator believes the record.
    pub fn validate(&self, record: &DhtRecord) -> bool {
        let mut record = record.clone();
        self.0.iter().rev().all(|validator| {
            let valid = validator.validate(&record);
            record.value = validator.strip(&record);
            valid
        })
    }

    /// The value with all signatures.
    pub fn sign(&self, record: &DhtRecord) -> Bytes {
        let signed = self.0.iter().fold(record.clone(), |record, validator| {
            let value = validator.sign(&record);
            DhtRecord { value, ..record }
        });
        signed.value
    }

    /// The value without signatures.
    pub fn strip(&self, record: &DhtRecord) -> Bytes {
        let stripped = self.0.iter().rev().fold(record.clone(), |record, validator| {
            let value = validator.strip(&record);
            DhtRecord { value, ..record }
        });
        stripped.value
    }

    pub(crate) fn is_costly(&self, record: &DhtRecord) -> bool {
        self.0.iter().any(|validator| validator.is_costly(record))
    }

    /// Our own item, signed; `None` when nobody would believe it, as when its owner is somebody else.
    pub(crate) fn sign_own(&self, item: StoreItem) -> Option<StoreItem> {
        let record = DhtRecord::of_item(&item);
        let value = self.sign(&record);
        self.validate(&DhtRecord { value: value.clone(), ..record }).then_some(StoreItem { value, ..item })
    }

    /// What is believed of a value that another node tells: of a dictionary the valid items.
    pub(crate) fn believed(&self, key: DhtKey, told: Timed<Stored>) -> Option<Timed<Stored>> {
        let mut costly = 0;
        let mut believes = |record: DhtRecord| {
            costly += usize::from(self.is_costly(&record));
            costly <= MAX_COSTLY_TOLD && self.validate(&record)
        };
        let Timed { value, expiration } = told;
        let value = match value {
            Stored::Regular(value) => {
                believes(DhtRecord::plain(key, value.clone(), expiration)).then_some(Stored::Regular(value))?
            }
            Stored::Dictionary(mut items) => {
                items.retain(|subkey, item| believes(DhtRecord::of_entry(key, subkey, item)));
                (!items.is_empty()).then_some(Stored::Dictionary(items))?
            }
        };
        Some(Timed { value, expiration })
    }

    /// A value as whoever asked for it reads it.
    pub(crate) fn stripped(&self, key: DhtKey, found: Timed<Stored>) -> Timed<Stored> {
        let Timed { value, expiration } = found;
        let value = match value {
            Stored::Regular(value) => Stored::Regular(self.strip(&DhtRecord::plain(key, value, expiration))),
            Stored::Dictionary(items) => {
                let strip = |(subkey, item): (Bytes, Timed<Bytes>)| {
                    let value = self.strip(&DhtRecord::of_entry(key, &subkey, &item));
                    (subkey, Timed { value, expiration: item.expiration })
                };
                Stored::Dictionary(items.into_iter().map(strip).collect::<BTreeMap<_, _>>())
            }
        };
        Timed { value, expiration }
    }
}

impl DhtRecord {
    /// A plain value.
    pub(crate) fn plain(key: DhtKey, value: Bytes, expiration: WallTime) -> Self {
        Self { key, subkey: Bytes::from_static(IS_REGULAR_VALUE), value, expiration }
    }

    /// An entry of a dictionary.
    pub(crate) fn of_entry(key: DhtKey, subkey: &Bytes, item: &Timed<Bytes>) -> Self {
        Self { key, subkey: subkey.clone(), value: item.value.clone(), expiration: item.expiration }
    }

    fn of_item(item: &StoreItem) -> Self {
        let plain = Self::plain(item.key, item.value.clone(), item.expiration);
        match &item.subkey {
            Some(subkey) => Self { subkey: subkey.clone(), ..plain },
            None => plain,
        }
    }
}
