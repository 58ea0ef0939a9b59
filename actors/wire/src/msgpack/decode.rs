//! Reading, without trusting the bytes: nothing is allocated for a length before the bytes for it are there.

use bytes::Bytes;
use rmp::{
    Marker,
    decode::{self as r, RmpRead},
};

use super::{EXT_TUPLE, Value};

/// How deep values may be nested. hivemind's own values need 6 levels.
pub const MAX_DEPTH: usize = 64;
/// How many values, counting nested ones, one message may hold: bounds memory, as a value takes 40 bytes and may come
/// from one.
pub const MAX_VALUES: usize = 1 << 18;

/// Why bytes are no MessagePack value that skep takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsgpackError {
    /// The bytes end inside a value.
    #[error("msgpack ends inside a value")]
    Truncated,
    /// Bytes follow the value.
    #[error("{0} bytes follow the msgpack value")]
    Trailing(usize),
    /// The byte 0xc1, which MessagePack never uses.
    #[error("msgpack contains the reserved byte 0xc1")]
    Reserved,
    /// Text is no UTF-8.
    #[error("msgpack text is not UTF-8")]
    Utf8,
    /// A map key is neither text nor bytes; Python refuses it too.
    #[error("msgpack map key is neither text nor bytes")]
    MapKey,
    /// A tuple extension holds something other than an array.
    #[error("msgpack tuple does not hold an array")]
    Tuple,
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("msgpack is nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// More values than [`MAX_VALUES`].
    #[error("msgpack holds more than {MAX_VALUES} values")]
    TooMany,
}

pub(super) fn decode(bytes: &[u8]) -> Result<Value, MsgpackError> {
    let mut reader = Reader { values_left: MAX_VALUES };
    reader.whole(bytes, 0)
}

struct Reader {
    values_left: usize,
}

type Input<'a, 'b> = &'b mut &'a [u8];

impl Reader {
    /// One value that takes up all of `bytes`.
    fn whole(&mut self, mut bytes: &[u8], depth: usize) -> Result<Value, MsgpackError> {
        let value = self.value(&mut bytes, depth)?;
        if bytes.is_empty() { Ok(value) } else { Err(MsgpackError::Trailing(bytes.len())) }
    }

    fn value(&mut self, input: Input, depth: usize) -> Result<Value, MsgpackError> {
        if depth > MAX_DEPTH {
            return Err(MsgpackError::TooDeep);
        }
        self.values_left = self.values_left.checked_sub(1).ok_or(MsgpackError::TooMany)?;
        let marker = r::read_marker(input).map_err(|_| MsgpackError::Truncated)?;
        Ok(match marker {
            Marker::Null => Value::Nil,
            Marker::True => Value::Bool(true),
            Marker::False => Value::Bool(false),
            Marker::FixPos(n) => Value::Int(n.into()),
            Marker::FixNeg(n) => Value::Int(n.into()),
            Marker::U8 => Value::Int(fixed(input.read_data_u8())?.into()),
            Marker::U16 => Value::Int(fixed(input.read_data_u16())?.into()),
            Marker::U32 => Value::Int(fixed(input.read_data_u32())?.into()),
            Marker::U64 => Value::from(fixed(input.read_data_u64())?),
            Marker::I8 => Value::Int(fixed(input.read_data_i8())?.into()),
            Marker::I16 => Value::Int(fixed(input.read_data_i16())?.into()),
            Marker::I32 => Value::Int(fixed(input.read_data_i32())?.into()),
            Marker::I64 => Value::Int(fixed(input.read_data_i64())?),
            Marker::F32 => Value::F64(fixed(input.read_data_f32())?.into()),
            Marker::F64 => Value::F64(fixed(input.read_data_f64())?),
            Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                let raw = take(input, marker)?;
                Value::Str(std::str::from_utf8(raw).map_err(|_| MsgpackError::Utf8)?.to_owned())
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => Value::Bin(Bytes::copy_from_slice(take(input, marker)?)),
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => Value::List(self.array(input, marker, depth)?),
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => Value::Map(self.map(input, marker, depth)?),
            Marker::Reserved => return Err(MsgpackError::Reserved),
            Marker::FixExt1
            | Marker::FixExt2
            | Marker::FixExt4
            | Marker::FixExt8
            | Marker::FixExt16
            | Marker::Ext8
            | Marker::Ext16
            | Marker::Ext32 => self.extension(input, marker, depth)?,
        })
    }

    fn array(&mut self, input: Input, marker: Marker, depth: usize) -> Result<Vec<Value>, MsgpackError> {
        // Grows with what is read: the announced length is not trusted.
        let mut items = Vec::new();
        for _ in 0..length(input, marker)? {
            items.push(self.value(input, depth + 1)?);
        }
        Ok(items)
    }

    fn map(&mut self, input: Input, marker: Marker, depth: usize) -> Result<Vec<(Value, Value)>, MsgpackError> {
        let mut entries = Vec::new();
        for _ in 0..length(input, marker)? {
            let key = self.value(input, depth + 1)?;
            if !matches!(key, Value::Str(_) | Value::Bin(_)) {
                return Err(MsgpackError::MapKey);
            }
            entries.push((key, self.value(input, depth + 1)?));
        }
        Ok(entries)
    }

    fn extension(&mut self, input: Input, marker: Marker, depth: usize) -> Result<Value, MsgpackError> {
        let len = length(input, marker)?;
        let code = fixed(input.read_data_i8())?;
        let payload = take_len(input, len)?;
        if code != EXT_TUPLE {
            return Ok(Value::Ext(code, Bytes::copy_from_slice(payload)));
        }
        match self.whole(payload, depth + 1)? {
            Value::List(items) => Ok(Value::Tuple(items)),
            _ => Err(MsgpackError::Tuple),
        }
    }
}

fn fixed<T, E>(read: Result<T, E>) -> Result<T, MsgpackError> {
    read.map_err(|_| MsgpackError::Truncated)
}

fn length(input: Input, marker: Marker) -> Result<u32, MsgpackError> {
    Ok(match marker {
        Marker::FixExt1 => 1,
        Marker::FixExt2 => 2,
        Marker::FixExt4 => 4,
        Marker::FixExt8 => 8,
        Marker::FixExt16 => 16,
        Marker::FixStr(n) | Marker::FixArray(n) | Marker::FixMap(n) => n.into(),
        Marker::Str8 | Marker::Bin8 | Marker::Ext8 => fixed(input.read_data_u8())?.into(),
        Marker::Str16 | Marker::Bin16 | Marker::Ext16 | Marker::Array16 | Marker::Map16 => {
            fixed(input.read_data_u16())?.into()
        }
        _ => fixed(input.read_data_u32())?,
    })
}

fn take<'a>(input: Input<'a, '_>, marker: Marker) -> Result<&'a [u8], MsgpackError> {
    let len = length(input, marker)?;
    take_len(input, len)
}

fn take_len<'a>(input: Input<'a, '_>, len: u32) -> Result<&'a [u8], MsgpackError> {
    let (taken, rest) = input.split_at_checked(len as usize).ok_or(MsgpackError::Truncated)?;
    *input = rest;
    Ok(taken)
}
