//! The golden vectors recorded from hivemind 1.1.12.

use std::collections::BTreeMap;

use bytes::Bytes;
use libp2p_identity::PeerId;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use skep_kernel::WallTime;
use skep_wire::{
    ExpertUid, Method,
    msgpack::{self, Value},
};

use super::{
    bucket::Contact,
    message::{Ask, Content, Record, Request, Response, Tell},
    routing::RoutingTable,
    storage::{Limits, Storage, WhenFull},
};
use crate::{DhtId, Stored, experts};

fn load(text: &str) -> Json {
    serde_json::from_str(text).unwrap()
}

fn list(json: &Json) -> &[Json] {
    json.as_array().unwrap()
}

fn text(json: &Json) -> &str {
    json.as_str().unwrap()
}

fn bytes(json: &Json) -> Bytes {
    hex::decode(text(json)).unwrap().into()
}

fn id(json: &Json) -> DhtId {
    DhtId::from_slice(&bytes(json)).unwrap()
}

fn number(json: &Json) -> usize {
    json.as_u64().unwrap() as usize
}

/// A tagged Python value.
fn python(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(b) => Value::Bool(*b),
        Json::String(s) => Value::from(s.as_str()),
        Json::Object(tagged) => {
            let (tag, content) = tagged.iter().find(|(tag, _)| *tag != "bits").unwrap();
            match tag.as_str() {
                "int" => Value::Int(text(content).parse().unwrap()),
                "f64" => Value::F64(text(content).parse().unwrap()),
                "bin" => Value::Bin(bytes(content)),
                "tuple" => Value::Tuple(list(content).iter().map(python).collect()),
                "list" => Value::List(list(content).iter().map(python).collect()),
                other => panic!("unknown tag {other}"),
            }
        }
        other => panic!("untagged {other}"),
    }
}

#[test]
fn ids_and_distances_are_hiveminds() {
    let vectors = load(include_str!("../../tests/vectors/dht_ids.json"));
    for case in list(&vectors["ids"]) {
        assert_eq!(DhtId::of_value(&python(&case["key"])), id(&case["dhtid"]), "{case}");
    }
    for case in list(&vectors["xor"]) {
        let (a, b) = (id(&case["a"]), id(&case["b"]));
        assert_eq!(a.distance(&b), id(&case["xor"]));
        assert_eq!(a.common_prefix_bits(&b) as usize, number(&case["common_prefix_bits"]));
    }
}

#[test]
fn routing_tables_grow_as_hiveminds() {
    let tables = load(include_str!("../../tests/vectors/routing_table.json"));
    for case in list(&tables) {
        let (size, modulo) = (number(&case["bucket_size"]), number(&case["depth_modulo"]) as u32);
        let mut table = RoutingTable::new(id(&case["node_id"]), size, modulo);
        for step in list(&case["inserted"]) {
            let digest = Sha256::digest(step["peer"].to_string());
            let peer = PeerId::from_bytes(&[&[0x12, 0x20], digest.as_slice()].concat()).unwrap();
            let updated = table.update(Contact { id: id(&step["node_id"]), peer });
            let asked = updated.check.map(|node| node.id);
            assert_eq!(asked, step["asked_to_ping"].as_str().map(|_| id(&step["asked_to_ping"])));
        }
        let ids = |nodes: &[Contact]| nodes.iter().map(|node| node.id).collect::<Vec<_>>();
        for (bucket, expected) in table.buckets().iter().zip(list(&case["buckets"])) {
            let lower = format!("{:0>40}", text(&expected["lower"]));
            assert_eq!(bucket.lower().to_string(), lower);
            assert_eq!(bucket.depth() as usize, number(&expected["depth"]));
            assert_eq!(ids(bucket.nodes()), list(&expected["nodes_oldest_first"]).iter().map(id).collect::<Vec<_>>());
            let waiting = &expected["replacements_oldest_first"];
            assert_eq!(ids(bucket.replacements()), list(waiting).iter().map(id).collect::<Vec<_>>());
        }
        assert_eq!(table.buckets().len(), list(&case["buckets"]).len());
        for query in list(&case["queries"]) {
            let exclude = query["exclude"].as_str().map(|_| id(&query["exclude"]));
            let nearest = table.nearest(&id(&query["query"]), number(&query["k"]), exclude);
            assert_eq!(ids(&nearest), list(&query["nearest"]).iter().map(id).collect::<Vec<_>>());
        }
    }
}

fn storage() -> Storage {
    Storage::new(WhenFull::Refuse, Limits { records: 100, bytes: 1 << 20, bytes_per_key: 1 << 20, life: f64::INFINITY })
}

/// hivemind drops the newer value when the rejected older one would have expired; we keep it.
const DEFECT: &str = "quirk: a rejected older store shortens the life of the newer value";

#[test]
fn storage_follows_hiveminds_traces() {
    let vectors = load(include_str!("../../tests/vectors/dht_storage.json"));
    for trace in list(&vectors["storage_traces"]) {
        let (mut storage, mut now) = (storage(), WallTime(1000.0));
        for step in list(&trace["steps"]) {
            let key = || DhtId::of_text(text(&step["key"]));
            match text(&step["op"]) {
                "set_clock" => now = WallTime(step["t"].as_f64().unwrap()),
                "store" => {
                    let value = Bytes::copy_from_slice(text(&step["value"]).as_bytes());
                    let expiration = WallTime(step["expiration"].as_f64().unwrap());
                    let stored = match step["subkey"].as_str() {
                        None => storage.store(now, key(), value, expiration, None),
                        Some(subkey) => {
                            let subkey = msgpack::serialize(&Value::from(subkey));
                            storage.store_item(now, key(), subkey, value, expiration, None)
                        }
                    };
                    assert_eq!(stored, step["accepted"].as_bool().unwrap(), "{step}");
                }
                _ if trace["name"] == DEFECT && now.0 > 1010.0 => {
                    let kept = storage.get(now, &key()).expect("the newer value lives on");
                    assert_eq!(kept.value, Stored::Regular(Bytes::from_static(b"new")));
                }
                _ => check_get(&mut storage, now, key(), &step["result"]),
            }
        }
    }
}

fn check_get(storage: &mut Storage, now: WallTime, key: DhtId, expected: &Json) {
    let found = storage.get(now, &key);
    if expected.is_null() {
        return assert_eq!(found, None);
    }
    let found = found.unwrap_or_else(|| panic!("{expected} should be visible"));
    assert_eq!(found.expiration.0, expected["expiration"].as_f64().unwrap());
    match found.value {
        Stored::Regular(value) => assert_eq!(value, text(&expected["value"]).as_bytes()),
        Stored::Dictionary(items) => {
            let expected = list(&expected["items"]).iter().map(|item| {
                (bytes(&item["subkey_hex"]), (bytes(&item["value_hex"]), item["expiration"].as_f64().unwrap()))
            });
            let items = items.into_iter().map(|(subkey, item)| (subkey, (item.value, item.expiration.0)));
            assert_eq!(items.collect::<BTreeMap<_, _>>(), expected.collect());
        }
    }
}

#[test]
fn messages_are_read_and_written_byte_for_byte() {
    let vectors = load(include_str!("../../tests/vectors/dht_messages.json"));
    for case in list(&vectors["messages"]) {
        let wire = bytes(&case["hex"]);
        let (name, kind) = (text(&case["name"]), text(&case["type"]));
        let method = match kind {
            "PingRequest" | "PingResponse" => Method::Ping,
            "StoreRequest" | "StoreResponse" => Method::Store,
            "FindRequest" | "FindResponse" => Method::Find,
            _ => continue,
        };
        if kind.ends_with("Request") {
            let request = Request::decode(method, &wire).unwrap();
            assert_eq!(request.sender.is_none(), name.contains("client_mode"), "{name}");
            // The recorded dictionary has its items in another order than ours: compare what they mean.
            match name.contains("dictionary") {
                true => assert_eq!(Request::decode(method, &request.encode()).unwrap(), request),
                false => assert_eq!(hex::encode(request.encode()), hex::encode(&wire), "{name}"),
            }
        } else {
            let response = Response::decode(method, &wire).unwrap();
            let again = response.encode();
            match &response.tell {
                Tell::Find(_) => assert_eq!(Response::decode(method, &again).unwrap(), response, "{name}"),
                _ => assert_eq!(hex::encode(again), hex::encode(&wire), "{name}"),
            }
        }
    }
}

#[test]
fn a_whole_dictionary_brings_its_own_expirations() {
    let vectors = load(include_str!("../../tests/vectors/dht_messages.json"));
    let cases = list(&vectors["messages"]);
    let case = cases.iter().find(|case| case["name"] == "store_whole_dictionary_in_cache").unwrap();
    let request = Request::decode(Method::Store, &bytes(&case["hex"])).unwrap();
    let Ask::Store(records) = request.ask else { panic!("a store") };
    let [Record { content: Content::Dictionary(items), in_cache: true, .. }] = &records[..] else {
        panic!("one dictionary for the cache, not {records:?}")
    };
    assert!(items.values().all(|item| item.expiration.0 >= 4_102_444_800.0));
}

#[test]
fn declared_experts_make_hiveminds_records() {
    let vectors = load(include_str!("../../tests/vectors/expert_records.json"));
    for case in list(&vectors) {
        let uids: Vec<ExpertUid> = list(&case["declared"]).iter().map(|uid| text(uid).parse().unwrap()).collect();
        let peer: PeerId = text(&case["peer_id"]).parse().unwrap();
        let expiration = WallTime(case["expiration"].as_f64().unwrap());
        let (mut storage, now) = (storage(), WallTime(1000.0));
        for item in experts::records(&uids, peer, expiration).into_values() {
            let (key, value) = (item.key, item.value);
            let stored = match item.subkey {
                Some(subkey) => storage.store_item(now, key, subkey, value, item.expiration, None),
                None => storage.store(now, key, value, item.expiration, None),
            };
            assert!(stored);
        }
        for (name, expected) in case["keys_present"].as_object().unwrap() {
            let key = experts::key(name);
            assert_eq!(key, id(&expected["dhtid"]));
            let found = storage.get(now, &key).unwrap_or_else(|| panic!("{name} is missing"));
            match &found.value {
                Stored::Regular(value) => {
                    assert_eq!(*value, bytes(&expected["value_hex"]));
                    assert_eq!(experts::read_host(&found).unwrap().value, peer);
                }
                Stored::Dictionary(items) => {
                    let expected: BTreeMap<Bytes, Bytes> =
                        list(&expected["items"]).iter().map(|item| (bytes(&item[0]), bytes(&item[1]))).collect();
                    let ours = items.iter().map(|(subkey, item)| (subkey.clone(), item.value.clone())).collect();
                    assert_eq!(expected, ours, "{name}");
                    assert_eq!(experts::read_entries(name, &found).len(), items.len(), "every entry is readable");
                }
            }
        }
        for absent in list(&case["keys_absent"]) {
            assert_eq!(storage.get(now, &experts::key(text(absent))), None, "{absent}");
        }
    }
}
