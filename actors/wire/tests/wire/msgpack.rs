use bytes::Bytes;
use proptest::prelude::*;
use skep_wire::msgpack::{MAX_DEPTH, MAX_VALUES, MsgpackError, Value, deserialize, serialize};

use crate::support::{tagged, unhex, vectors};

#[test]
fn every_value_encodes_as_python_encodes_it_and_reads_back() {
    for case in vectors("msgpack.json").as_array().unwrap() {
        let (value, bytes) = (tagged(&case["value"]), unhex(&case["hex"]));
        assert_eq!(serialize(&value), bytes, "{value:?}");
        assert_eq!(deserialize(&bytes), Ok(value));
    }
}

#[test]
fn lists_and_tuples_are_not_equal() {
    let items = vec![Value::Int(1)];
    assert_ne!(serialize(&Value::List(items.clone())), serialize(&Value::Tuple(items)));
}

#[test]
fn extensions_take_the_shortest_header() {
    for (len, header) in
        [(1, 0xd4), (2, 0xd5), (3, 0xc7), (4, 0xd6), (8, 0xd7), (16, 0xd8), (17, 0xc7), (300, 0xc8), (70_000, 0xc9)]
    {
        let value = Value::Ext(0x51, vec![7; len].into());
        let bytes = serialize(&value);
        assert_eq!(bytes[0], header, "payload of {len} bytes");
        assert_eq!(deserialize(&bytes), Ok(value));
    }
}

#[test]
fn integers_are_the_same_value_however_they_were_written() {
    for bytes in [&[5][..], &[0xcc, 5], &[0xcd, 0, 5], &[0xcf, 0, 0, 0, 0, 0, 0, 0, 5], &[0xd3, 0, 0, 0, 0, 0, 0, 0, 5]]
    {
        assert_eq!(deserialize(bytes), Ok(Value::Int(5)));
    }
    assert_eq!(Value::from(5u64), Value::Int(5));
}

#[test]
fn single_precision_is_read_and_widened() {
    assert_eq!(deserialize(&[0xca, 0x3f, 0xc0, 0, 0]), Ok(Value::F64(1.5)));
}

#[test]
fn what_python_refuses_is_refused() {
    assert_eq!(deserialize(&[0xc1]), Err(MsgpackError::Reserved));
    assert_eq!(deserialize(&[0xa1, 0xff]), Err(MsgpackError::Utf8));
    assert_eq!(deserialize(&[0x81, 0x01, 0x02]), Err(MsgpackError::MapKey));
    assert_eq!(deserialize(&[0xc0, 0xc0]), Err(MsgpackError::Trailing(1)));
    assert_eq!(deserialize(&[]), Err(MsgpackError::Truncated));
    assert_eq!(deserialize(&[0xd4, 0x40, 0x05]), Err(MsgpackError::Tuple));
    assert_eq!(deserialize(&[0xd5, 0x40, 0x90, 0xc0]), Err(MsgpackError::Trailing(1)));
}

#[test]
fn an_announced_length_without_bytes_costs_nothing() {
    for header in [0xc6, 0xc9, 0xdb, 0xdd, 0xdf] {
        assert_eq!(deserialize(&[header, 0xff, 0xff, 0xff, 0xff]), Err(MsgpackError::Truncated));
    }
}

#[test]
fn nesting_is_bounded_in_arrays_maps_and_tuples() {
    assert_eq!(deserialize(&[0x91; 1_000_000]), Err(MsgpackError::TooDeep));
    assert_eq!(deserialize(&[0x81, 0xa0].repeat(1_000_000)), Err(MsgpackError::TooDeep));
    let nest = |depth| (0..depth).fold(Value::Nil, |inner, _| Value::List(vec![inner]));
    assert!(deserialize(&serialize(&nest(MAX_DEPTH))).is_ok());
    assert_eq!(deserialize(&serialize(&nest(MAX_DEPTH + 1))), Err(MsgpackError::TooDeep));
    let tuples = (0..MAX_DEPTH).fold(Value::Nil, |inner, _| Value::Tuple(vec![inner]));
    assert_eq!(deserialize(&serialize(&tuples)), Err(MsgpackError::TooDeep));
}

#[test]
fn the_number_of_values_is_bounded() {
    let list = |n| serialize(&Value::List(vec![Value::Nil; n]));
    assert!(deserialize(&list(MAX_VALUES - 1)).is_ok());
    assert_eq!(deserialize(&list(MAX_VALUES)), Err(MsgpackError::TooMany));
}

/// Any value that skep would write.
pub fn any_value() -> impl Strategy<Value = Value> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
    let key = prop_oneof![".{0,40}".prop_map(Value::Str), bytes().prop_map(Value::Bin)];
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<u64>().prop_map(Value::from),
        prop::num::f64::ANY.prop_filter("NaN is not equal to itself", |x| !x.is_nan()).prop_map(Value::F64),
        ".{0,40}".prop_map(Value::Str),
        bytes().prop_map(Value::Bin),
        (any::<i8>().prop_filter("0x40 is a tuple", |code| *code != 0x40), bytes()).prop_map(|(c, b)| Value::Ext(c, b)),
    ];
    leaf.prop_recursive(5, 60, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::List),
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Tuple),
            prop::collection::vec((key.clone(), inner), 0..8).prop_map(Value::Map),
        ]
    })
}

proptest! {
    #[test]
    fn every_value_survives_the_round_trip(value in any_value()) {
        prop_assert_eq!(deserialize(&serialize(&value)), Ok(value));
    }

    #[test]
    fn no_proper_beginning_of_a_value_is_a_value(value in any_value()) {
        let bytes = serialize(&value);
        for end in 0..bytes.len() {
            prop_assert!(deserialize(&bytes[..end]).is_err());
        }
    }
}
