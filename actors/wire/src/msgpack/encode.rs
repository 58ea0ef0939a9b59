//! Writing: always the smallest encoding, as msgpack-python chooses it.

use rmp::encode::{self as w, ByteBuf};

use super::{EXT_TUPLE, Value};

pub(super) fn encode(value: &Value) -> Vec<u8> {
    let mut out = ByteBuf::new();
    write(&mut out, value);
    out.into_vec()
}

const INFALLIBLE: &str = "a byte buffer takes every write";

fn write(out: &mut ByteBuf, value: &Value) {
    match value {
        Value::Nil => w::write_nil(out).expect(INFALLIBLE),
        Value::Bool(b) => w::write_bool(out, *b).expect(INFALLIBLE),
        Value::Int(n) => drop(w::write_sint(out, *n).expect(INFALLIBLE)),
        Value::UInt(n) => drop(w::write_uint(out, *n).expect(INFALLIBLE)),
        Value::F64(x) => w::write_f64(out, *x).expect(INFALLIBLE),
        Value::Str(text) => w::write_str(out, text).expect(INFALLIBLE),
        Value::Bin(bytes) => w::write_bin(out, bytes).expect(INFALLIBLE),
        Value::List(items) => write_array(out, items),
        Value::Tuple(items) => {
            let mut payload = ByteBuf::new();
            write_array(&mut payload, items);
            write_ext(out, EXT_TUPLE, payload.as_slice());
        }
        Value::Map(entries) => {
            w::write_map_len(out, length(entries.len())).expect(INFALLIBLE);
            for (key, value) in entries {
                write(out, key);
                write(out, value);
            }
        }
        Value::Ext(code, payload) => write_ext(out, *code, payload),
    }
}

fn write_array(out: &mut ByteBuf, items: &[Value]) {
    w::write_array_len(out, length(items.len())).expect(INFALLIBLE);
    items.iter().for_each(|item| write(out, item));
}

fn write_ext(out: &mut ByteBuf, code: i8, payload: &[u8]) {
    w::write_ext_meta(out, length(payload.len()), code).expect(INFALLIBLE);
    out.as_mut_vec().extend_from_slice(payload);
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("values are far below 4 GiB")
}
