//! Values of the DHT: plain ones, dictionaries of subkeys, and the tags that tell them apart (docs/wire.md §5, §6.5).

use bytes::Bytes;

use crate::msgpack::{self, EXT_DICTIONARY, MsgpackError, Value};

/// The tag of a plain value: a serialized `None`.
pub const IS_REGULAR_VALUE: &[u8] = &[0xc0];
/// The tag of a whole dictionary.
pub const IS_DICTIONARY: &[u8] = &[];

/// What an entry of a store request means by its `subkeys[i]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SubkeyTag {
    /// `values[i]` is a serialized value.
    Regular,
    /// `values[i]` is a serialized [`DictionaryValue`]; each item brings its own expiration.
    Dictionary,
    /// `values[i]` is a serialized value for this subkey, whose serialized form this is.
    Subkey(Bytes),
}

impl SubkeyTag {
    /// Reads a tag; every byte string is one.
    pub fn parse(tag: &Bytes) -> SubkeyTag {
        match tag.as_ref() {
            IS_REGULAR_VALUE => SubkeyTag::Regular,
            IS_DICTIONARY => SubkeyTag::Dictionary,
            _ => SubkeyTag::Subkey(tag.clone()),
        }
    }

    /// The tag as on the wire.
    pub fn to_bytes(&self) -> Bytes {
        match self {
            SubkeyTag::Regular => Bytes::from_static(IS_REGULAR_VALUE),
            SubkeyTag::Dictionary => Bytes::from_static(IS_DICTIONARY),
            SubkeyTag::Subkey(subkey) => subkey.clone(),
        }
    }
}

/// One subkey of a dictionary.
#[derive(Clone, Debug, PartialEq)]
pub struct DictionaryItem {
    /// Any value; inside a dictionary it is not serialized on its own.
    pub subkey: Value,
    /// A serialized value.
    pub value: Bytes,
    /// Unix seconds.
    pub expiration: f64,
}

/// A dictionary as it travels whole: hivemind's `DictionaryDHTValue`.
#[derive(Clone, Debug, PartialEq)]
pub struct DictionaryValue {
    /// How many items it may hold; `None` is no limit.
    pub max_size: Option<u64>,
    /// Expiration of the dictionary, normally its items' latest; negative infinity when it is empty.
    pub latest_expiration: f64,
    /// The items in order of insertion.
    pub items: Vec<DictionaryItem>,
}

/// Why bytes are no dictionary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DictionaryError {
    /// No MessagePack.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// Other content than a dictionary has.
    #[error("malformed dictionary value: {0}")]
    Malformed(&'static str),
}

impl DictionaryValue {
    /// A dictionary without limit whose expiration is the latest of its items'.
    pub fn new(items: Vec<DictionaryItem>) -> Self {
        let latest_expiration = items.iter().fold(f64::NEG_INFINITY, |latest, item| latest.max(item.expiration));
        Self { max_size: None, latest_expiration, items }
    }

    /// The bytes as extension 0x50.
    pub fn encode(&self) -> Bytes {
        let items = self.items.iter().map(|DictionaryItem { subkey, value, expiration }| {
            Value::List(vec![subkey.clone(), Value::Bin(value.clone()), Value::F64(*expiration)])
        });
        let payload = Value::List(vec![
            self.max_size.map_or(Value::F64(f64::INFINITY), Value::from),
            Value::F64(self.latest_expiration),
            Value::List(items.collect()),
        ]);
        msgpack::serialize(&Value::Ext(EXT_DICTIONARY, msgpack::serialize(&payload)))
    }

    /// Reads extension 0x50. Expirations are numbers, not NaN; whether they make sense is not checked, nor whether
    /// subkeys repeat.
    pub fn decode(bytes: &[u8]) -> Result<Self, DictionaryError> {
        let Value::Ext(EXT_DICTIONARY, payload) = msgpack::deserialize(bytes)? else {
            return Err(DictionaryError::Malformed("not a dictionary"));
        };
        let Value::List(parts) = msgpack::deserialize(&payload)? else {
            return Err(DictionaryError::Malformed("not a list of three"));
        };
        let Ok([max_size, latest, Value::List(items)]) = <[Value; 3]>::try_from(parts) else {
            return Err(DictionaryError::Malformed("not a list of three"));
        };
        Ok(Self {
            max_size: read_max_size(&max_size)?,
            latest_expiration: read_expiration(&latest)?,
            items: items.into_iter().map(read_item).collect::<Result<_, _>>()?,
        })
    }
}

fn read_max_size(value: &Value) -> Result<Option<u64>, DictionaryError> {
    match value.as_f64() {
        Some(f64::INFINITY) => Ok(None),
        Some(size) if size >= 0.0 && size.fract() == 0.0 => Ok(Some(size as u64)),
        _ => Err(DictionaryError::Malformed("its limit is no size")),
    }
}

fn read_expiration(value: &Value) -> Result<f64, DictionaryError> {
    value.as_f64().filter(|e| !e.is_nan()).ok_or(DictionaryError::Malformed("an expiration is no number"))
}

fn read_item(item: Value) -> Result<DictionaryItem, DictionaryError> {
    let Value::List(parts) = item else { return Err(DictionaryError::Malformed("an item is no list of three")) };
    match <[Value; 3]>::try_from(parts) {
        Ok([subkey, Value::Bin(value), expiration]) => {
            Ok(DictionaryItem { subkey, value, expiration: read_expiration(&expiration)? })
        }
        _ => Err(DictionaryError::Malformed("an item is no list of subkey, bytes and expiration")),
    }
}
