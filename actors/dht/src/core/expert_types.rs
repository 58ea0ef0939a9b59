//! Entries of expert grids must be what they claim (docs/wire.md §7.2). A plain record under a uid cannot be told from
//! others, since keys are hashes; whoever reads it checks it.

use skep_wire::{ExpertUid, msgpack};

use super::validate::{DhtRecord, RecordValidator};
use crate::{DhtId, experts};

/// Refuses a tuple of a uid and a text under an integer, unless the uid lies under that key and coordinate and the text is
/// a peer id. Everything else is left to those who read it.
pub(crate) struct ExpertTypes;

impl RecordValidator for ExpertTypes {
    fn validate(&self, record: &DhtRecord) -> bool {
        claim(record).is_none_or(|(uid, coordinate, peer)| {
            let entries = experts::entries(&uid);
            let lies_there = |(prefix, at): &(String, i64)| *at == coordinate && DhtId::of_text(prefix) == record.key;
            entries.iter().any(lies_there) && peer.parse::<libp2p_identity::PeerId>().is_ok()
        })
    }
}

/// The expert, coordinate and peer that an entry of a grid speaks of; `None` for other records.
fn claim(record: &DhtRecord) -> Option<(ExpertUid, i64, String)> {
    // No integer is longer: most records are told apart by this.
    let coordinate = msgpack::deserialize(record.subkey.get(..9.min(record.subkey.len()))?).ok()?.as_i64()?;
    let value = msgpack::deserialize(&record.value).ok()?;
    let [uid, peer] = value.as_tuple()? else { return None };
    Some((uid.as_str()?.parse().ok()?, coordinate, peer.as_str()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use skep_kernel::WallTime;
    use skep_wire::msgpack::Value;

    use super::*;

    fn entry(key: &str, subkey: Value, value: Value) -> bool {
        let (subkey, value) = (msgpack::serialize(&subkey), msgpack::serialize(&value));
        let expiration = WallTime(1.0);
        ExpertTypes.validate(&DhtRecord { key: DhtId::of_text(key), subkey, value, expiration })
    }

    fn claim_of(uid: &str, peer: &str) -> Value {
        Value::Tuple(vec![Value::from(uid), Value::from(peer)])
    }

    #[test]
    fn what_servers_declare_is_valid() {
        let peer = libp2p_identity::PeerId::random();
        for uid in ["flat.3", "e.1.2", "e.1.2.3"] {
            let uid: ExpertUid = uid.parse().unwrap();
            for ((_, _), item) in experts::records(&[uid], peer, WallTime(1.0)) {
                let subkey = item.subkey.unwrap_or_else(|| msgpack::serialize(&Value::Nil));
                let record = DhtRecord { key: item.key, subkey, value: item.value, expiration: item.expiration };
                assert!(ExpertTypes.validate(&record), "{record:?}");
            }
        }
    }

    #[test]
    fn an_entry_in_a_foreign_place_or_without_a_peer_is_refused() {
        let peer = libp2p_identity::PeerId::random().to_base58();
        assert!(entry("e.1.", Value::Int(2), claim_of("e.1.2", &peer)));
        assert!(!entry("e.1.", Value::Int(3), claim_of("e.1.2", &peer)));
        assert!(!entry("e.2.", Value::Int(2), claim_of("e.1.2", &peer)));
        assert!(!entry("e.1.", Value::Int(2), claim_of("e.1.2", "somebody")));
        assert!(!entry("flat.3.", Value::Int(3), claim_of("flat.3", &peer)));
    }

    #[test]
    fn other_records_are_nobodys_business() {
        assert!(entry("e.1.", Value::Int(2), Value::Nil), "a withdrawn expert");
        assert!(entry("e.", Value::Int(-1), Value::Nil), "hivemind's mark for nothing here");
        assert!(entry("scores", Value::Int(2), Value::from("free text")));
        assert!(entry("scores", Value::from("name"), claim_of("e.1.2", "somebody")));
        assert!(entry("scores", Value::Int(2), Value::Tuple(vec![Value::from("a"), Value::from("b")])));
    }
}
