//! Bytes from a peer that means harm: every decoder answers with a value or an error.

use bytes::Bytes;
use proptest::prelude::*;
use skep_wire::{
    ExpertInfo, decompress,
    dht_value::DictionaryValue,
    frame::{stream, unary},
    msgpack,
    proto::{self, dht, runtime},
};

use crate::support::{unhex, vectors};

fn feed_everything(bytes: &[u8]) {
    let _ = msgpack::deserialize(bytes);
    let _ = ExpertInfo::decode(bytes);
    let _ = DictionaryValue::decode(bytes);
    let _ = unary::Frame::decode(Bytes::copy_from_slice(bytes));
    let mut decoder = unary::Decoder::new();
    decoder.push(bytes);
    while let Ok(Some(_)) = decoder.next_frame() {}
    let mut decoder = stream::Decoder::new();
    decoder.push(bytes);
    while let Ok(Some(_)) = decoder.next_frame() {}
    let owned = Bytes::copy_from_slice(bytes);
    let _ = proto::decode::<dht::StoreRequest>(owned.clone());
    let _ = proto::decode::<dht::FindResponse>(owned.clone());
    if let Ok(request) = proto::decode::<runtime::ExpertRequest>(owned) {
        for tensor in &request.tensors {
            let _ = decompress(tensor);
        }
    }
}

fn recorded() -> Vec<Bytes> {
    let mut all: Vec<Bytes> = Vec::new();
    all.extend(vectors("expert_info.json").as_array().unwrap().iter().map(|c| unhex(&c["serialized_info_hex"])));
    let storage = vectors("dht_storage.json");
    all.extend(storage["dictionary_values"].as_array().unwrap().iter().map(|c| unhex(&c["ext_encoded_hex"])));
    let messages = vectors("dht_messages.json");
    for kind in ["messages", "unary_frames", "stream_frames"] {
        all.extend(messages[kind].as_array().unwrap().iter().map(|c| unhex(&c["hex"])));
    }
    all.push(unhex(&vectors("tensors.json")["ExpertRequest_hex"]));
    all
}

#[test]
fn no_recorded_message_with_one_byte_changed_panics() {
    for bytes in recorded() {
        for at in 0..bytes.len().min(300) {
            for change in [0x01, 0x80, 0xff] {
                let mut changed = bytes.to_vec();
                changed[at] ^= change;
                feed_everything(&changed);
            }
        }
    }
}

#[test]
fn no_recorded_message_cut_short_panics() {
    for bytes in recorded() {
        (0..bytes.len()).for_each(|end| feed_everything(&bytes[..end]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        feed_everything(&bytes);
    }

    #[test]
    fn no_tensor_message_panics(
        buffer in prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(255), any::<u8>()], 0..64),
        size in prop::collection::vec(prop_oneof![0u32..5, Just(u32::MAX), any::<u32>()], 0..4),
        dtype in prop::sample::select(vec!["float32", "float64", "float16", "bfloat16", "int64", "bool", "", "x"]),
        compression in -1..7,
    ) {
        let tensor = runtime::Tensor { buffer: buffer.into(), size, dtype: dtype.to_owned(), compression, ..Default::default() };
        let _ = decompress(&tensor);
    }
}
