//! Which records of others a node believes, and what it stores under a key of its own.

use super::*;
use crate::{RecordKey, Validators, core::validate::MAX_COSTLY_STORES};

fn vectors_key() -> RecordKey {
    let vectors: serde_json::Value =
        serde_json::from_str(include_str!("../../../../tests/vectors/identity_crypto.json")).unwrap();
    let der = hex::decode(vectors["rsa_private_key_pkcs1_der_hex"].as_str().unwrap()).unwrap();
    RecordKey::from_pkcs1_der(&der).unwrap()
}

/// An entry of a dictionary that belongs to the key.
fn owned(key: &RecordKey, name: &str, value: &str, expiration: f64) -> StoreItem {
    let subkey = [name.as_bytes(), &key.owner_marker()].concat();
    let subkey = skep_wire::msgpack::serialize(&skep_wire::msgpack::Value::Bin(subkey.into()));
    StoreItem { subkey: Some(subkey), ..item("shared", value, expiration) }
}

/// A node with a key that signs what it stores, among others without.
fn with_owner(world: &mut World, n: u8, key: &RecordKey) -> PeerId {
    let owner = world.add(n, &[peer(1)], config());
    let node = world.nodes.remove(&owner).unwrap().with_validators(Validators::signing(key.clone()));
    world.nodes.insert(owner, node);
    owner
}

fn values(found: Option<Timed<Stored>>) -> Vec<Bytes> {
    match found.map(|found| found.value) {
        Some(Stored::Dictionary(items)) => items.into_values().map(|item| item.value).collect(),
        Some(Stored::Regular(value)) => vec![value],
        None => Vec::new(),
    }
}

#[test]
fn an_owner_changes_its_entry_and_readers_get_it_without_the_signature() {
    let (key, mut world) = (vectors_key(), World::of(3));
    let owner = with_owner(&mut world, 4, &key);
    for (value, expiration) in [("first", 2000.0), ("second", 3000.0)] {
        assert!(world.store(owner, vec![owned(&key, "a", value, expiration)])[0].elsewhere);
        for reader in [peer(1), owner] {
            assert_eq!(values(world.get(reader, "shared", Freshness::Latest)), [value]);
        }
    }
}

#[test]
fn what_its_owner_did_not_sign_is_neither_sent_nor_taken() {
    let (key, mut world) = (vectors_key(), World::of(3));
    let owner = with_owner(&mut world, 4, &key);
    world.store(owner, vec![owned(&key, "a", "genuine", 2000.0)]);
    world.log.clear();
    let forged = owned(&key, "a", "forged", 3000.0);
    assert_eq!(world.store(peer(2), vec![forged.clone()]), [Outcome::default()]);
    assert_eq!(world.calls(|ask| matches!(ask, Ask::Store(_))), 0, "nobody would take it");

    // A node that does not care sends it all the same.
    let careless = world.add(5, &[peer(1)], config());
    let node = world.nodes.remove(&careless).unwrap().with_validators(Validators::none());
    world.nodes.insert(careless, node);
    let outcome = world.store(careless, vec![forged])[0];
    assert!(!outcome.elsewhere);
    assert_eq!(values(world.get(peer(3), "shared", Freshness::Latest)), ["genuine"]);
}

#[test]
fn a_forged_entry_spoils_neither_the_dictionary_it_comes_in_nor_a_search() {
    let (key, mut world) = (vectors_key(), World::of(2));
    let plain = StoreItem { subkey: Some(Bytes::from_static(b"\x01")), ..item("shared", "plain", 2000.0) };
    let entry = |item: &StoreItem| {
        let timed = Timed { value: item.value.clone(), expiration: item.expiration };
        (item.subkey.clone().unwrap(), timed)
    };
    let items = BTreeMap::from([entry(&plain), entry(&owned(&key, "a", "forged", 2000.0))]);
    let record = Record { key: plain.key, content: Content::Dictionary(items), in_cache: false };
    let request = Request { sender: None, ask: Ask::Store(vec![record]) };
    let node = world.nodes.get_mut(&peer(1)).unwrap();
    node.handle(Moment::START, WallTime(1000.0), Input::Inbound { ticket: 7, peer: peer(9), request });
    let replies: Vec<Output> = std::iter::from_fn(|| node.poll()).collect();
    let stored = |ok: bool| Response { sender: Some(node.id()), tell: Tell::Store(vec![ok]) };
    assert!(replies.contains(&Output::Reply { ticket: 7, response: stored(false) }), "{replies:?}");
    assert_eq!(values(world.get(peer(2), "shared", Freshness::Latest)), ["plain"]);
}

#[test]
fn of_one_call_only_so_many_signatures_are_checked() {
    let (key, mut world) = (vectors_key(), World::of(1));
    let signing = Validators::signing(key.clone());
    let forged = Record::of_item(&owned(&key, "b", "forged", 2000.0));
    let node = world.node(peer(1));
    for (before, taken) in [(MAX_COSTLY_STORES - 1, true), (MAX_COSTLY_STORES, false)] {
        let genuine = signing.sign_own(owned(&key, &format!("after {before}"), "value", 2000.0)).unwrap();
        let records = [vec![forged.clone(); before], vec![Record::of_item(&genuine)]].concat();
        let request = Request { sender: None, ask: Ask::Store(records) };
        node.handle(Moment::START, WallTime(1000.0), Input::Inbound { ticket: 7, peer: peer(9), request });
        let tell = Tell::Store([vec![false; before], vec![taken]].concat());
        let reply = Output::Reply { ticket: 7, response: Response { sender: Some(node.id()), tell } };
        assert_eq!(std::iter::from_fn(|| node.poll()).collect::<Vec<_>>(), [reply]);
    }
}
