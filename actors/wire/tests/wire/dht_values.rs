use bytes::Bytes;
use proptest::prelude::*;
use skep_wire::{
    dht_value::{DictionaryError, DictionaryItem, DictionaryValue, SubkeyTag},
    msgpack::{self, EXT_DICTIONARY, MsgpackError, Value},
};

use crate::{
    msgpack::any_value,
    support::{tagged, unhex, vectors},
};

#[test]
fn dictionaries_are_what_python_packs() {
    for case in vectors("dht_storage.json")["dictionary_values"].as_array().unwrap() {
        let bytes = unhex(&case["ext_encoded_hex"]);
        let dictionary = DictionaryValue::decode(&bytes).unwrap();
        assert_eq!(dictionary.encode(), bytes);
        let expected = case["items"].as_array().unwrap().iter().map(|item| DictionaryItem {
            subkey: tagged(&item["subkey"]),
            value: unhex(&item["value_hex"]),
            expiration: item["expiration"].as_f64().unwrap(),
        });
        assert_eq!(dictionary.items, expected.collect::<Vec<_>>());
        if let Some(latest) = case.get("latest_expiration") {
            assert_eq!(dictionary.latest_expiration, latest.as_f64().unwrap_or(f64::NEG_INFINITY));
            let payload = unhex(&case["packed_payload_hex"]);
            assert_eq!(msgpack::deserialize(&bytes), Ok(Value::Ext(EXT_DICTIONARY, payload)));
        }
    }
}

#[test]
fn a_new_dictionary_expires_with_its_last_item() {
    let item = |n, expiration| DictionaryItem { subkey: Value::Int(n), value: Bytes::from_static(&[0xc0]), expiration };
    assert_eq!(DictionaryValue::new(vec![item(0, 3.0), item(1, 9.0), item(2, 5.0)]).latest_expiration, 9.0);
    assert_eq!(DictionaryValue::new(Vec::new()).latest_expiration, f64::NEG_INFINITY);
}

#[test]
fn the_two_reserved_tags_are_told_from_subkeys() {
    for (bytes, tag) in [
        (&[0xc0][..], SubkeyTag::Regular),
        (&[], SubkeyTag::Dictionary),
        (&[0x03], SubkeyTag::Subkey(Bytes::from_static(&[0x03]))),
        (&[0xc0, 0xc0], SubkeyTag::Subkey(Bytes::from_static(&[0xc0, 0xc0]))),
    ] {
        assert_eq!(SubkeyTag::parse(&Bytes::from_static(bytes)), tag);
        assert_eq!(tag.to_bytes(), bytes);
    }
    assert_eq!(msgpack::serialize(&Value::Nil), SubkeyTag::Regular.to_bytes());
}

#[test]
fn a_limited_dictionary_keeps_its_limit() {
    let limited = DictionaryValue { max_size: Some(5), latest_expiration: f64::NEG_INFINITY, items: Vec::new() };
    assert_eq!(DictionaryValue::decode(&limited.encode()), Ok(limited));
}

#[test]
fn what_is_no_dictionary_is_refused() {
    let dictionary = |payload: Value| msgpack::serialize(&Value::Ext(EXT_DICTIONARY, msgpack::serialize(&payload)));
    let infinity = || Value::F64(f64::INFINITY);
    let item = |parts| Value::List(vec![infinity(), Value::F64(1.0), Value::List(vec![Value::List(parts)])]);
    let bin = || Value::Bin(Bytes::from_static(&[0xc0]));
    assert!(DictionaryValue::decode(&dictionary(item(vec![Value::Nil, bin(), Value::F64(1.0)]))).is_ok());
    for payload in [
        Value::Nil,
        Value::List(vec![infinity(), Value::F64(1.0)]),
        Value::List(vec![Value::F64(f64::NAN), Value::F64(1.0), Value::List(Vec::new())]),
        Value::List(vec![Value::Int(-1), Value::F64(1.0), Value::List(Vec::new())]),
        Value::List(vec![infinity(), Value::F64(f64::NAN), Value::List(Vec::new())]),
        Value::List(vec![infinity(), Value::F64(1.0), Value::Map(Vec::new())]),
        item(vec![Value::Nil, bin()]),
        item(vec![Value::Nil, Value::from("text"), Value::F64(1.0)]),
        item(vec![Value::Nil, bin(), Value::F64(f64::NAN)]),
    ] {
        assert!(DictionaryValue::decode(&dictionary(payload.clone())).is_err(), "{payload:?}");
    }
    assert_eq!(DictionaryValue::decode(&[0xc0]), Err(DictionaryError::Malformed("not a dictionary")));
    assert_eq!(DictionaryValue::decode(&[]), Err(DictionaryError::Msgpack(MsgpackError::Truncated)));
}

proptest! {
    #[test]
    fn every_dictionary_survives_the_round_trip(
        items in prop::collection::vec((any_value(), prop::collection::vec(any::<u8>(), 0..30), 0f64..1e10), 0..6),
        max_size in prop::option::of(0u64..1 << 40),
    ) {
        let item = |(subkey, value, expiration): (Value, Vec<u8>, f64)| DictionaryItem { subkey, value: value.into(), expiration };
        let dictionary = DictionaryValue { max_size, ..DictionaryValue::new(items.into_iter().map(item).collect()) };
        prop_assert_eq!(DictionaryValue::decode(&dictionary.encode()), Ok(dictionary));
    }
}
