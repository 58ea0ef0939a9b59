use bytes::Bytes;
use prost::Message;
use skep_wire::proto::{
    self, MAX_FIELDS, MessageError,
    crypto::{KeyType, PrivateKey, PublicKey},
    dht::{FindRequest, FindResponse, NodeInfo, PingRequest, PingResponse, ResultType, StoreRequest, StoreResponse},
    gather_request, gather_response,
    p2pd::{CallUnaryRequest, PersistentConnectionRequest},
    runtime::{ExpertRequest, ExpertResponse, ExpertUid, Tensor},
};

use crate::support::{unhex, vectors};

fn reencode<M: Message + Default>(bytes: &Bytes) -> Vec<u8> {
    proto::decode::<M>(bytes.clone()).unwrap().encode_to_vec()
}

fn recorded(name: &str) -> Bytes {
    let all = vectors("dht_messages.json");
    let messages = all["messages"].as_array().unwrap();
    unhex(&messages.iter().find(|m| m["name"] == name).unwrap()["hex"])
}

#[test]
fn every_recorded_dht_message_is_read_and_written_back_byte_for_byte() {
    for case in vectors("dht_messages.json")["messages"].as_array().unwrap() {
        let bytes = unhex(&case["hex"]);
        let again = match case["type"].as_str().unwrap() {
            "PingRequest" => reencode::<PingRequest>(&bytes),
            "PingResponse" => reencode::<PingResponse>(&bytes),
            "StoreRequest" => reencode::<StoreRequest>(&bytes),
            "StoreResponse" => reencode::<StoreResponse>(&bytes),
            "FindRequest" => reencode::<FindRequest>(&bytes),
            "FindResponse" => reencode::<FindResponse>(&bytes),
            other => panic!("no message type {other}"),
        };
        assert_eq!(hex::encode(again), hex::encode(&bytes), "{}", case["name"]);
    }
}

#[test]
fn a_client_mode_node_sends_an_empty_but_present_node_info() {
    let ping = PingRequest { auth: None, peer: Some(NodeInfo::default()), validate: false };
    assert_eq!(ping.encode_to_vec(), recorded("ping_client_mode"));
}

#[test]
fn fields_of_recorded_messages_are_where_they_belong() {
    let ping = proto::decode::<PingResponse>(recorded("ping_response")).unwrap();
    assert_eq!((ping.dht_time, ping.available), (1_700_000_000.5, true));
    assert_eq!(ping.peer.unwrap().node_id.len(), 20);

    let store = proto::decode::<StoreRequest>(recorded("store_subkey")).unwrap();
    assert_eq!(store.subkeys, [Bytes::from_static(&[0]), Bytes::from_static(&[3])]);
    assert_eq!(store.expiration_time, [4_102_444_800.0, 4_102_444_801.0]);
    assert_eq!(store.in_cache, [false, false]);

    let find = proto::decode::<FindResponse>(recorded("find_response")).unwrap();
    let types: Vec<_> = find.results.iter().map(|r| r.r#type()).collect();
    assert_eq!(types, [ResultType::FoundRegular, ResultType::FoundDictionary, ResultType::NotFound]);
    assert_eq!(find.results[1].nearest_peer_ids.len(), 2);
}

#[test]
fn repeated_numbers_are_read_packed_and_unpacked() {
    let unpacked = [0x10, 1, 0x10, 0, 0x10, 1];
    assert_eq!(proto::decode::<StoreResponse>(&unpacked[..]).unwrap().store_ok, [true, false, true]);
    let mut one = vec![0x29];
    one.extend_from_slice(&7.5f64.to_le_bytes());
    assert_eq!(proto::decode::<StoreRequest>(&one[..]).unwrap().expiration_time, [7.5]);
}

#[test]
fn required_fields_are_written_even_when_empty() {
    assert_eq!(CallUnaryRequest::default().encode_to_vec(), [0x0a, 0, 0x12, 0, 0x1a, 0]);
    assert_eq!(PersistentConnectionRequest::default().encode_to_vec(), [0x0a, 0]);
    let key = PublicKey { key_type: KeyType::Rsa as i32, data: Bytes::new() };
    assert_eq!(key.encode_to_vec(), [0x08, 0, 0x12, 0]);
}

#[test]
fn a_private_key_does_not_show_itself() {
    let key = PrivateKey { key_type: 0, data: Bytes::from_static(b"hush") };
    assert!(!format!("{key:?}").contains("104"));
    assert_eq!(key.encode_to_vec(), [0x08, 0, 0x12, 4, b'h', b'u', b's', b'h']);
}

fn recorded_tensors() -> serde_json::Value {
    vectors("tensors.json")
}

#[test]
fn expert_messages_are_read_and_written_back_byte_for_byte() {
    let vectors = recorded_tensors();
    let (uid, request, response) = ("ExpertUID_hex", "ExpertRequest_hex", "ExpertResponse_hex");
    assert_eq!(reencode::<ExpertUid>(&unhex(&vectors[uid])), unhex(&vectors[uid]));
    assert_eq!(reencode::<ExpertRequest>(&unhex(&vectors[request])), unhex(&vectors[request]));
    assert_eq!(reencode::<ExpertResponse>(&unhex(&vectors[response])), unhex(&vectors[response]));
}

#[test]
fn gathered_segments_are_the_bytes_of_the_message_and_share_large_buffers() {
    let large = Bytes::from(vec![7u8; 100_000]);
    let tensor = |buffer: Bytes, size: &[u32]| Tensor {
        buffer,
        size: size.to_vec(),
        dtype: "float32".to_owned(),
        requires_grad: true,
        compression: 2,
        chunks: 3,
    };
    let some = vec![
        tensor(large.clone(), &[25_000, 1]),
        tensor(Bytes::from_static(b"abcd"), &[1]),
        tensor(large.clone(), &[5, 5_000]),
        tensor(Bytes::new(), &[0, 4]),
        Tensor::default(),
    ];
    for (uid, tensors) in [("ffn.0.12", some.clone()), ("", some), ("ffn.0", Vec::new()), ("", Vec::new())] {
        let segments = gather_request(uid, &tensors);
        let whole = ExpertRequest { uid: uid.to_owned(), tensors: tensors.clone(), metadata: Bytes::new() };
        assert_eq!(segments.concat(), whole.encode_to_vec());
        let shared = segments.iter().filter(|s| s.as_ptr() == large.as_ptr()).count();
        assert_eq!(shared, tensors.iter().filter(|t| t.buffer.len() == large.len()).count());
        assert!(segments.iter().all(|segment| !segment.is_empty()));

        let whole = ExpertResponse { tensors: tensors.clone(), metadata: Bytes::new() };
        assert_eq!(gather_response(&tensors).concat(), whole.encode_to_vec());
    }
}

#[test]
fn buffers_of_a_received_message_are_slices_of_it() {
    let tensor = Tensor { buffer: vec![1; 5000].into(), ..Tensor::default() };
    let bytes = Bytes::from(gather_response(&[tensor]).concat());
    let read = proto::decode::<ExpertResponse>(bytes.clone()).unwrap();
    assert!(bytes.as_ptr_range().contains(&read.tensors[0].buffer.as_ptr()));
    let copied = proto::decode::<ExpertResponse>(&bytes[..]).unwrap();
    assert!(!bytes.as_ptr_range().contains(&copied.tensors[0].buffer.as_ptr()), "a slice is not kept");
}

#[test]
fn a_message_of_many_empty_fields_is_refused() {
    let tensors = |n: usize| Bytes::from([0x12, 0].repeat(n));
    assert_eq!(proto::decode::<ExpertRequest>(tensors(MAX_FIELDS)).unwrap().tensors.len(), MAX_FIELDS);
    assert_eq!(proto::decode::<ExpertRequest>(tensors(MAX_FIELDS + 1)), Err(MessageError::TooManyFields));
    let cut_short = Bytes::from_static(&[0x12, 5, 0]);
    assert!(matches!(proto::decode::<ExpertRequest>(cut_short), Err(MessageError::Protobuf(_))));
}
