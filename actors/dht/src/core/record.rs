//! Calls and answers as protobuf (docs/wire.md §4, §6.4–6.6). What comes in is checked; what is malformed in one entry
//! of many spoils only that entry where the protocol can say so.

use std::collections::BTreeMap;

use bytes::Bytes;
use libp2p_identity::PeerId;
use prost::Message;
use skep_kernel::WallTime;
use skep_wire::{
    Method,
    dht_value::{DictionaryItem, DictionaryValue, SubkeyTag},
    limits::MAX_UNARY_FRAME,
    msgpack,
    proto::{
        self, MessageError,
        dht::{
            FindRequest, FindResponse, FindResult, NodeInfo, PingRequest, PingResponse, ResultType, StoreRequest,
            StoreResponse,
        },
    },
};

use super::{
    bucket::Contact,
    message::{Ask, Content, Finding, Record, Request, Response, Tell},
};
use crate::{DhtId, Stored, Timed};

/// Why bytes are no call or answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {method}: {reason}")]
pub(crate) struct Malformed {
    pub method: Method,
    pub reason: String,
}

/// Entries of one store call.
const MAX_RECORDS: usize = 4096;
/// Keys of one find call, each of which is a search through the table.
const MAX_KEYS: usize = 512;
/// Neighbours that are read from one result.
const MAX_NEIGHBOURS: usize = 64;
/// What an answer may hold: a frame, less what surrounds the answer in it.
const MAX_ANSWER: usize = MAX_UNARY_FRAME - 64 * 1024;

impl Ask {
    pub fn method(&self) -> Method {
        match self {
            Ask::Ping { .. } => Method::Ping,
            Ask::Store(_) => Method::Store,
            Ask::Find(_) => Method::Find,
        }
    }
}

impl Request {
    pub fn encode(&self) -> Bytes {
        let peer = node_info(self.sender);
        match &self.ask {
            Ask::Ping { validate } => PingRequest { auth: None, peer, validate: *validate }.encode_to_vec(),
            Ask::Find(keys) => {
                FindRequest { auth: None, keys: keys.iter().map(id_bytes).collect(), peer }.encode_to_vec()
            }
            Ask::Store(records) => store_request(records, peer).encode_to_vec(),
        }
        .into()
    }

    /// Byte fields are copied: a stored record must not keep the frame that brought it in memory.
    pub fn decode(method: Method, body: &[u8]) -> Result<Self, Malformed> {
        let malformed = |reason: String| Malformed { method, reason };
        let protobuf = |error: MessageError| malformed(error.to_string());
        let (peer, ask) = match method {
            Method::Ping => {
                let ping = proto::decode::<PingRequest>(body).map_err(protobuf)?;
                (ping.peer, Ask::Ping { validate: ping.validate })
            }
            Method::Find => {
                let find = proto::decode::<FindRequest>(body).map_err(protobuf)?;
                check_count(find.keys.len(), MAX_KEYS).map_err(malformed)?;
                let keys = find.keys.iter().map(read_id).collect::<Result<_, _>>().map_err(malformed)?;
                (find.peer, Ask::Find(keys))
            }
            Method::Store => {
                let store = proto::decode::<StoreRequest>(body).map_err(protobuf)?;
                let records = read_records(&store).map_err(malformed)?;
                (store.peer, Ask::Store(records))
            }
            other => return Err(Malformed { method: other, reason: "no method of the DHT".to_owned() }),
        };
        Ok(Self { sender: read_sender(peer).map_err(malformed)?, ask })
    }
}

impl Response {
    pub fn encode(&self) -> Bytes {
        let peer = node_info(self.sender);
        match &self.tell {
            Tell::Ping { available, dht_time } => {
                PingResponse { auth: None, peer, dht_time: *dht_time, available: *available }.encode_to_vec()
            }
            Tell::Store(ok) => StoreResponse { auth: None, store_ok: ok.clone(), peer }.encode_to_vec(),
            Tell::Find(findings) => {
                FindResponse { auth: None, results: write_findings(findings), peer }.encode_to_vec()
            }
        }
        .into()
    }

    /// Byte fields are copied: a stored record must not keep the frame that brought it in memory.
    pub fn decode(method: Method, body: &[u8]) -> Result<Self, Malformed> {
        let malformed = |reason: String| Malformed { method, reason };
        let protobuf = |error: MessageError| malformed(error.to_string());
        let (peer, tell) = match method {
            Method::Ping => {
                let ping = proto::decode::<PingResponse>(body).map_err(protobuf)?;
                (ping.peer, Tell::Ping { available: ping.available, dht_time: ping.dht_time })
            }
            Method::Store => {
                let store = proto::decode::<StoreResponse>(body).map_err(protobuf)?;
                (store.peer, Tell::Store(store.store_ok))
            }
            Method::Find => {
                let find = proto::decode::<FindResponse>(body).map_err(protobuf)?;
                check_count(find.results.len(), MAX_KEYS).map_err(malformed)?;
                (find.peer, Tell::Find(find.results.iter().map(read_finding).collect()))
            }
            other => return Err(Malformed { method: other, reason: "no method of the DHT".to_owned() }),
        };
        Ok(Self { sender: read_sender(peer).map_err(malformed)?, tell })
    }
}

/// The submessage is present in client mode too, only empty (§6.3).
fn node_info(sender: Option<DhtId>) -> Option<NodeInfo> {
    Some(NodeInfo { node_id: sender.as_ref().map(id_bytes).unwrap_or_default() })
}

fn read_sender(peer: Option<NodeInfo>) -> Result<Option<DhtId>, String> {
    match peer {
        Some(info) if !info.node_id.is_empty() => read_id(&info.node_id).map(Some),
        _ => Ok(None),
    }
}

fn id_bytes(id: &DhtId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

fn read_id(bytes: &Bytes) -> Result<DhtId, String> {
    DhtId::from_slice(bytes).ok_or_else(|| format!("an id of {} bytes instead of 20", bytes.len()))
}

fn check_count(count: usize, limit: usize) -> Result<(), String> {
    if count > limit {
        return Err(format!("{count} entries, over the limit of {limit}"));
    }
    Ok(())
}

fn store_request(records: &[Record], peer: Option<NodeInfo>) -> StoreRequest {
    let mut request = StoreRequest { peer, ..StoreRequest::default() };
    for record in records {
        let (tag, value, expiration) = match &record.content {
            Content::Regular { value, expiration } => (SubkeyTag::Regular, value.clone(), expiration.0),
            Content::Item { subkey, value, expiration } => {
                (SubkeyTag::Subkey(subkey.clone()), value.clone(), expiration.0)
            }
            Content::Dictionary(items) => {
                let dictionary = write_dictionary(items);
                (SubkeyTag::Dictionary, dictionary.encode(), dictionary.latest_expiration)
            }
        };
        request.keys.push(id_bytes(&record.key));
        request.subkeys.push(tag.to_bytes());
        request.values.push(value);
        request.expiration_time.push(expiration);
        request.in_cache.push(record.in_cache);
    }
    request
}

fn read_records(store: &StoreRequest) -> Result<Vec<Record>, String> {
    let count = store.keys.len();
    check_count(count, MAX_RECORDS)?;
    let lengths = [store.subkeys.len(), store.values.len(), store.expiration_time.len(), store.in_cache.len()];
    if lengths.iter().any(|len| *len != count) {
        return Err(format!("{count} keys beside lists of {lengths:?} entries"));
    }
    (0..count)
        .map(|i| {
            let value = store.values[i].clone();
            let expiration = WallTime(store.expiration_time[i]);
            let content = match SubkeyTag::parse(&store.subkeys[i]) {
                SubkeyTag::Regular => Content::Regular { value, expiration },
                SubkeyTag::Subkey(subkey) => Content::Item { subkey, value, expiration },
                // An unreadable one counts as empty, which is refused: the other entries are not to blame.
                SubkeyTag::Dictionary => Content::Dictionary(read_dictionary(&value).unwrap_or_default()),
            };
            Ok(Record { key: read_id(&store.keys[i])?, content, in_cache: store.in_cache[i] })
        })
        .collect()
}

/// Values that would make the answer too large for a frame are left out; the neighbours stay, so the search goes on
/// elsewhere.
fn write_findings(findings: &[Finding]) -> Vec<FindResult> {
    let mut results: Vec<FindResult> = findings.iter().map(|finding| write_neighbours(&finding.nearest)).collect();
    let mut size: usize = results.iter().map(Message::encoded_len).sum();
    for (result, finding) in results.iter_mut().zip(findings) {
        let Some(found) = &finding.value else { continue };
        let (kind, value) = match &found.value {
            Stored::Regular(value) => (ResultType::FoundRegular, value.clone()),
            Stored::Dictionary(items) => (ResultType::FoundDictionary, write_dictionary(items).encode()),
        };
        if size + value.len() + FOUND_FRAMING > MAX_ANSWER {
            continue;
        }
        size += value.len() + FOUND_FRAMING;
        result.set_type(kind);
        result.value = value;
        result.expiration_time = found.expiration.0;
    }
    results
}

/// Type, length and expiration of a found value, in bytes; rounded up.
const FOUND_FRAMING: usize = 32;

fn write_neighbours(nearest: &[Contact]) -> FindResult {
    FindResult {
        nearest_node_ids: nearest.iter().map(|contact| id_bytes(&contact.id)).collect(),
        nearest_peer_ids: nearest.iter().map(|contact| contact.peer.to_bytes().into()).collect(),
        ..FindResult::default()
    }
}

/// What cannot be read counts as not found; neighbours that cannot be read are left out.
fn read_finding(result: &FindResult) -> Finding {
    let expiration = WallTime(result.expiration_time);
    let value = match result.r#type() {
        ResultType::NotFound => None,
        ResultType::FoundRegular => Some(Stored::Regular(result.value.clone())),
        ResultType::FoundDictionary => read_dictionary(&result.value).ok().map(Stored::Dictionary),
    };
    let pairs = result.nearest_node_ids.iter().zip(&result.nearest_peer_ids);
    let nearest = pairs
        .take(MAX_NEIGHBOURS)
        .filter_map(|(id, peer)| Some(Contact { id: DhtId::from_slice(id)?, peer: PeerId::from_bytes(peer).ok()? }))
        .collect();
    Finding { value: value.map(|value| Timed { value, expiration }), nearest }
}

/// Subkeys that are no MessagePack are left out: nobody could read them.
fn write_dictionary(items: &BTreeMap<Bytes, Timed<Bytes>>) -> DictionaryValue {
    let items = items.iter().filter_map(|(subkey, item)| {
        let subkey = msgpack::deserialize(subkey).ok()?;
        Some(DictionaryItem { subkey, value: item.value.clone(), expiration: item.expiration.0 })
    });
    DictionaryValue::new(items.collect())
}

fn read_dictionary(bytes: &[u8]) -> Result<BTreeMap<Bytes, Timed<Bytes>>, String> {
    let dictionary = DictionaryValue::decode(bytes).map_err(|error| error.to_string())?;
    let items = dictionary.items.into_iter().map(|item| {
        let timed = Timed { value: item.value, expiration: WallTime(item.expiration) };
        (msgpack::serialize(&item.subkey), timed)
    });
    Ok(items.collect())
}

/// A subkey as skep would write it, so that one value has one form; `None` if it is no MessagePack value.
pub(crate) fn canonical_subkey(subkey: &Bytes) -> Option<Bytes> {
    msgpack::deserialize(subkey).ok().map(|value| msgpack::serialize(&value))
}

#[cfg(test)]
mod tests {
    use skep_wire::proto::MAX_FIELDS;

    use super::*;

    #[test]
    fn calls_and_answers_of_too_many_fields_are_refused_unread() {
        // A field that nobody knows, so that no other limit is in the way.
        let unknown = [0x78, 0].repeat(MAX_FIELDS + 1);
        for method in [Method::Ping, Method::Store, Method::Find] {
            assert!(Request::decode(method, &unknown[2..]).is_ok() && Response::decode(method, &unknown[2..]).is_ok());
            let refused =
                [Request::decode(method, &unknown).unwrap_err(), Response::decode(method, &unknown).unwrap_err()];
            assert!(refused.iter().all(|error| error.reason.contains("more than 131072 fields")), "{refused:?}");
        }
    }
}
