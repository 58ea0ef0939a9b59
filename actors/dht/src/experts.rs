//! Records of experts: what is written when one is declared, and what is read from it (docs/wire.md §7.2).

use std::collections::BTreeMap;

use bytes::Bytes;
use libp2p_identity::PeerId;
use skep_kernel::WallTime;
use skep_wire::{
    ExpertPrefix, ExpertUid,
    msgpack::{self, Value},
};

use crate::{DhtId, Hosted, StoreItem, Stored, Timed};

/// Subkey of a one-dimensional expert under its own prefix, hivemind's `FLAT_EXPERT`.
pub(crate) const FLAT: i64 = -1;

/// An entry of a prefix's dictionary.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exemplar {
    pub uid: ExpertUid,
    pub peer: PeerId,
    pub expiration: WallTime,
}

/// Where a record of an expert lies: a key, and the coordinate for an entry of a prefix's dictionary.
pub(crate) type Place = (DhtId, Option<i64>);

/// The key of a uid or of a prefix.
pub(crate) fn key(text: &str) -> DhtId {
    DhtId::of_text(text)
}

/// The prefix entries that lead to an expert, each with the coordinate that comes next.
pub(crate) fn entries(uid: &ExpertUid) -> Vec<(String, i64)> {
    if uid.dimensions() == 1 {
        return vec![(format!("{uid}."), FLAT)];
    }
    let mut entries = Vec::new();
    let (prefix, last) = uid.split_last();
    let mut step = Some((prefix, last.to_owned()));
    while let Some((prefix, coordinate)) = step.filter(|(prefix, _)| prefix.dimensions() > 0) {
        // A coordinate that no peer could read as an integer has no entry; the uid's own record remains.
        if let Ok(coordinate) = coordinate.parse() {
            entries.push((prefix.as_str().to_owned(), coordinate));
        }
        step = prefix.parent().map(|(parent, coordinate)| (parent, coordinate.to_owned()));
    }
    entries
}

/// Everything that is stored to declare experts of one peer. Where several share an entry, the last one becomes its
/// exemplar, as hivemind has it.
pub(crate) fn records(uids: &[ExpertUid], peer: PeerId, expiration: WallTime) -> BTreeMap<Place, StoreItem> {
    let peer = peer.to_base58();
    let mut records = BTreeMap::new();
    for uid in uids {
        let own = item((key(uid.as_str()), None), &Value::from(peer.as_str()), expiration);
        records.insert((own.key, None), own);
        let exemplar = Value::Tuple(vec![Value::from(uid.as_str()), Value::from(peer.as_str())]);
        for (prefix, coordinate) in entries(uid) {
            let place = (key(&prefix), Some(coordinate));
            records.insert(place, item(place, &exemplar, expiration));
        }
    }
    records
}

/// A value at its place.
pub(crate) fn item((key, coordinate): Place, value: &Value, expiration: WallTime) -> StoreItem {
    let subkey = coordinate.map(|coordinate| msgpack::serialize(&Value::Int(coordinate)));
    StoreItem { key, subkey, value: msgpack::serialize(value), expiration }
}

/// Who hosts an expert, if the record under its uid says so: base58 text of a peer id. A withdrawn expert has `None`.
pub(crate) fn read_host(stored: &Timed<Stored>) -> Option<Hosted> {
    let Stored::Regular(bytes) = &stored.value else { return None };
    let value = read_peer(&msgpack::deserialize(bytes).ok()?)?;
    Some(Timed { value, expiration: stored.expiration })
}

/// The readable entries under a prefix. An entry whose expert does not lie under its coordinate is ignored, as are
/// withdrawn ones and hivemind's `{-1: None}` for "nothing here".
pub(crate) fn read_entries(prefix: &str, stored: &Timed<Stored>) -> BTreeMap<i64, Exemplar> {
    let Stored::Dictionary(items) = &stored.value else { return BTreeMap::new() };
    let entries = items.iter().filter_map(|(subkey, item)| {
        let coordinate = msgpack::deserialize(subkey).ok()?.as_i64()?;
        Some((coordinate, read_entry(prefix, coordinate, item)?))
    });
    entries.collect()
}

fn read_entry(prefix: &str, coordinate: i64, item: &Timed<Bytes>) -> Option<Exemplar> {
    let value = msgpack::deserialize(&item.value).ok()?;
    let [uid, peer] = value.as_tuple()? else { return None };
    let uid: ExpertUid = uid.as_str()?.parse().ok()?;
    let belongs = match (coordinate, uid.as_str().strip_prefix(prefix)) {
        (FLAT, _) => prefix.strip_suffix('.') == Some(uid.as_str()),
        (_, Some(rest)) => rest.split('.').next() == Some(coordinate.to_string().as_str()),
        (_, None) => false,
    };
    belongs.then_some(Exemplar { peer: read_peer(peer)?, uid, expiration: item.expiration })
}

fn read_peer(value: &Value) -> Option<PeerId> {
    value.as_str()?.parse().ok()
}

/// The prefix that a coordinate leads to.
pub(crate) fn child(prefix: &ExpertPrefix, coordinate: i64) -> Option<ExpertPrefix> {
    u64::try_from(coordinate).ok().map(|coordinate| prefix.child(coordinate))
}
