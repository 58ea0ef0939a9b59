//! Golden vectors and the notation in which they write Python values.

use base64::Engine as _;
use bytes::Bytes;
use serde_json::Value as Json;
use skep_wire::msgpack::Value;

pub fn vectors(name: &str) -> Json {
    let path = format!("{}/tests/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn unhex(json: &Json) -> Bytes {
    hex::decode(json.as_str().unwrap()).unwrap().into()
}

pub fn unbase64(json: &Json) -> Bytes {
    base64::engine::general_purpose::STANDARD.decode(json.as_str().unwrap()).unwrap().into()
}

/// A tagged Python value.
pub fn tagged(json: &Json) -> Value {
    let list = |items: &Json| items.as_array().unwrap().iter().map(tagged).collect::<Vec<_>>();
    match json {
        Json::Null => Value::Nil,
        Json::Bool(b) => Value::Bool(*b),
        Json::String(text) => text.as_str().into(),
        Json::Object(tag) => match tag.keys().next().unwrap().as_str() {
            "int" => {
                let digits = tag["int"].as_str().unwrap();
                digits.parse().map(Value::Int).unwrap_or_else(|_| Value::UInt(digits.parse().unwrap()))
            }
            "f64" | "bits" => Value::F64(f64::from_le_bytes(unhex(&tag["bits"]).as_ref().try_into().unwrap())),
            "bin" => Value::Bin(unhex(&tag["bin"])),
            "tuple" => Value::Tuple(list(&tag["tuple"])),
            "list" => Value::List(list(&tag["list"])),
            "map" => {
                let entries = tag["map"].as_array().unwrap();
                Value::Map(entries.iter().map(|e| (tagged(&e[0]), tagged(&e[1]))).collect())
            }
            other => panic!("unknown tag {other}"),
        },
        other => panic!("untagged {other}"),
    }
}
