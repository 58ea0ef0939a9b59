//! Reading golden vectors (see `tests/vectors/README.md`).
#![allow(dead_code)]

use base64::Engine;
use serde_json::Value;
use skep_torch::tch::Tensor;
use skep_wire::{DType, HostTensor};

pub fn vectors(name: &str) -> Value {
    let path = format!("{}/tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn host(value: &Value) -> HostTensor {
    let shape: Vec<usize> = value["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
    let bytes = base64::engine::general_purpose::STANDARD.decode(value["b64"].as_str().unwrap()).unwrap();
    HostTensor::new(DType::from_name(value["dtype"].as_str().unwrap()).unwrap(), shape, bytes.into()).unwrap()
}

pub fn tensor(value: &Value) -> Tensor {
    skep_torch::to_tensor(host(value)).unwrap()
}

#[track_caller]
pub fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.size(), want.size(), "shape of {what}");
    assert_eq!(got.kind(), want.kind(), "dtype of {what}");
    assert!(got.allclose(want, 1e-5, 1e-5, false), "{what}: got {got}, want {want}");
}

#[track_caller]
pub fn assert_host_close(got: &HostTensor, want: &HostTensor, what: &str) {
    let tensor = |host: &HostTensor| skep_torch::to_tensor(host.clone()).unwrap();
    assert_close(&tensor(got), &tensor(want), what);
}
