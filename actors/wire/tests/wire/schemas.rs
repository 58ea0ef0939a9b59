use std::collections::BTreeMap;

use prost::Message;
use serde_json::Value as Json;
use skep_wire::{
    Compression, DType, ExpertInfo, HostTensor, Nested, TensorDescriptor,
    msgpack::{self, Value},
    proto,
};

use crate::support::{unhex, vectors};

fn golden(name: &str) -> Vec<u8> {
    let all = vectors("expert_info.json");
    let case = all.as_array().unwrap().iter().find(|case| case["name"] == name).unwrap().clone();
    unhex(&case["serialized_info_hex"]).to_vec()
}

#[test]
fn every_recorded_expert_info_is_read_and_written_back_byte_for_byte() {
    for case in vectors("expert_info.json").as_array().unwrap() {
        let bytes = unhex(&case["serialized_info_hex"]);
        let info = ExpertInfo::decode(&bytes).unwrap();
        assert_eq!(hex::encode(info.encode()), hex::encode(&bytes), "{}", case["name"]);
        let message = proto::runtime::ExpertInfo { serialized_info: info.encode().into() };
        assert_eq!(message.encode_to_vec(), unhex(&case["ExpertInfo_protobuf_hex"]), "{}", case["name"]);
    }
}

#[test]
fn an_ffn_built_here_describes_itself_as_pythons_does() {
    let tensor = || TensorDescriptor::batched(DType::F32, &[16]);
    let info = ExpertInfo::simple(tensor(), tensor().with_grad());
    assert_eq!(info.encode(), golden("ffn hidden=16 compression=NONE"));

    let half = TensorDescriptor { compression: Compression::Float16, ..tensor() };
    assert_eq!(ExpertInfo::simple(half, tensor().with_grad()).encode(), golden("ffn hidden=16 compression=FLOAT16"));
}

#[test]
fn keywords_keep_their_declared_order_and_flatten_sorted() {
    let info = ExpertInfo::decode(&golden("kwargs and nested outputs (tuple of tensor and dict)")).unwrap();
    assert_eq!(info.keyword_names, ["beta", "alpha"]);
    let inputs = info.flat_inputs();
    assert_eq!(inputs.len(), 3);
    assert_eq!(inputs[1].size, [None, Some(2), Some(4)], "alpha before beta");
    assert_eq!((inputs[2].compression, inputs[2].dtype), (Compression::Uniform8, None));
    assert_eq!(info.flat_outputs().len(), 3);
}

#[test]
fn a_descriptor_admits_any_batch_but_no_other_width_rank_or_dtype() {
    let descriptor = TensorDescriptor::batched(DType::F32, &[4]);
    let admits = |dtype, shape: &[usize]| descriptor.admits(&HostTensor::zeros(dtype, shape).unwrap());
    assert!(admits(DType::F32, &[1, 4]) && admits(DType::F32, &[9, 4]));
    assert!(!admits(DType::F32, &[1, 5]) && !admits(DType::F32, &[4]) && !admits(DType::F64, &[1, 4]));
}

#[test]
fn schemas_that_a_python_client_would_refuse_are_refused() {
    let decoded = msgpack::deserialize(&golden("nop hidden=16 compression=NONE")).unwrap();
    let Value::Map(entries) = decoded else { panic!("a map") };
    for missing in 0..entries.len() {
        let mut less = entries.clone();
        less.remove(missing);
        assert!(ExpertInfo::decode(&msgpack::serialize(&Value::Map(less))).is_err());
    }
    let mut list_for_tuple = entries.clone();
    let Value::Tuple(parts) = &entries[0].1 else { panic!("a tuple") };
    list_for_tuple[0].1 = Value::List(parts.clone());
    assert!(ExpertInfo::decode(&msgpack::serialize(&Value::Map(list_for_tuple))).is_err());
}

#[test]
fn nested_structures_flatten_in_pythons_order() {
    fn nested(json: &Json) -> Nested<u64> {
        let list = |items: &Json| items.as_array().unwrap().iter().map(nested).collect();
        if let Some(n) = json.get("int") {
            return Nested::Leaf(n.as_str().unwrap().parse().unwrap());
        }
        if let Some(items) = json.get("tuple") {
            return Nested::Tuple(list(items));
        }
        if let Some(items) = json.get("list") {
            return Nested::List(list(items));
        }
        let entries = json["map"].as_array().unwrap().iter();
        Nested::Map(entries.map(|e| (e[0].as_str().unwrap().to_owned(), nested(&e[1]))).collect::<BTreeMap<_, _>>())
    }
    for case in vectors("nested.json").as_array().unwrap() {
        let expected: Vec<u64> = case["flat"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert_eq!(nested(&case["structure"]).flatten(), expected.iter().collect::<Vec<_>>());
    }
}
