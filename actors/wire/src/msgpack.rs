//! hivemind's MessagePack dialect: msgpack-python's encodings plus a tuple type (docs/wire.md §5).

mod decode;
mod encode;

use bytes::Bytes;

pub use decode::{MAX_DEPTH, MAX_VALUES, MsgpackError};

/// Extension code of a tuple.
pub const EXT_TUPLE: i8 = 0x40;
/// Extension code of a [`DictionaryValue`](crate::dht_value::DictionaryValue).
pub const EXT_DICTIONARY: i8 = 0x50;
/// Extension code of a [`TensorDescriptor`](crate::TensorDescriptor).
pub const EXT_DESCRIPTOR: i8 = 0x51;

/// One MessagePack value. Lists and tuples differ, on the wire and in comparisons.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    Nil,
    /// A truth value.
    Bool(bool),
    /// An integer that fits 64 signed bits.
    Int(i64),
    /// An integer above [`i64::MAX`]; smaller ones are [`Value::Int`], `From<u64>` chooses.
    UInt(u64),
    /// A float; 32-bit floats are widened when read, written are always 64 bits.
    F64(f64),
    /// Text.
    Str(String),
    /// Bytes.
    Bin(Bytes),
    /// A Python list.
    List(Vec<Value>),
    /// A Python tuple, extension 0x40.
    Tuple(Vec<Value>),
    /// A Python dict in its insertion order. Python reads only maps whose keys are text or bytes, and so does skep.
    Map(Vec<(Value, Value)>),
    /// Any other extension: its code and payload.
    Ext(i8, Bytes),
}

/// The bytes of a value, as `MSGPackSerializer.dumps` writes them.
pub fn serialize(value: &Value) -> Bytes {
    encode::encode(value).into()
}

/// Reads exactly one value. Depth and number of values are bounded, so that hostile bytes cost no more than a small
/// multiple of their length.
pub fn deserialize(bytes: &[u8]) -> Result<Value, MsgpackError> {
    decode::decode(bytes)
}

impl Value {
    /// The value as an error message shows it: not more than 80 characters, however large it is.
    pub(crate) fn excerpt(&self) -> String {
        format!("{self:?}").chars().take(80).collect()
    }

    /// The text, if it is text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The integer, if it is one that fits.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Value::Int(n) => Some(*n),
            _ => None,
        }
    }

    /// The number as a float, if it is a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F64(x) => Some(*x),
            Value::Int(n) => Some(*n as f64),
            Value::UInt(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The bytes, if it is bytes.
    pub fn as_bin(&self) -> Option<&Bytes> {
        match self {
            Value::Bin(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The elements, if it is a tuple.
    pub fn as_tuple(&self) -> Option<&[Value]> {
        match self {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The elements, if it is a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// The entries, if it is a map.
    pub fn as_map(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Str(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Value::Str(text)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Value::Bool(b)
    }
}

impl From<i64> for Value {
    fn from(n: i64) -> Self {
        Value::Int(n)
    }
}

impl From<u64> for Value {
    fn from(n: u64) -> Self {
        i64::try_from(n).map_or(Value::UInt(n), Value::Int)
    }
}

impl From<f64> for Value {
    fn from(x: f64) -> Self {
        Value::F64(x)
    }
}

impl From<Bytes> for Value {
    fn from(bytes: Bytes) -> Self {
        Value::Bin(bytes)
    }
}
