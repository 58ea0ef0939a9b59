//! For tests: golden vectors, and a mixture's experts in this process.

use std::sync::{Arc, Mutex};

use base64::Engine;
use serde_json::Value;
use skep_expert::{Backend, Batch};
use skep_kernel::Rows;
use skep_moe::{BackwardGather, Chosen, Gather, GridScores, MoeError};
use skep_wire::{DType, HostTensor};
use tch::{Device, Tensor, nn::VarStore};

use crate::{Ffn, OptimizerSpec, TorchBackend, fan_out::FanOut, to_host, to_tensor};

pub(crate) fn vectors(name: &str) -> Value {
    let path = format!("{}/tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn tensor(value: &Value) -> Tensor {
    let bytes = base64::engine::general_purpose::STANDARD.decode(value["b64"].as_str().unwrap()).unwrap();
    let dtype = DType::from_name(value["dtype"].as_str().unwrap()).unwrap();
    to_tensor(HostTensor::new(dtype, sizes(&value["shape"]), bytes.into()).unwrap()).unwrap()
}

pub(crate) fn sizes(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect()
}

#[track_caller]
pub(crate) fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.size(), want.size(), "{what}");
    assert!(got.allclose(want, 1e-5, 1e-5, false), "{what}: got {got}, want {want}");
}

/// Experts of `mixture.json` in this process; the choice is the vectors' or a script's.
pub(crate) struct Script {
    experts: Mutex<Vec<(String, TorchBackend)>>,
    pub k: usize,
    pub chosen: Mutex<Vec<Vec<String>>>,
    /// Experts that do not answer.
    pub dead: Vec<String>,
    pub backward_dead: Vec<String>,
    pub seen_scores: Mutex<Option<GridScores>>,
}

impl Script {
    pub(crate) fn new(k: usize, chosen: Vec<Vec<String>>) -> Self {
        let params = &vectors("mixture")["expert_params"];
        let expert = |(uid, params): (&String, &Value)| {
            let module = Box::new(Ffn::new(4, Device::Cpu, 0).unwrap());
            let mut backend = TorchBackend::new(module, OptimizerSpec::none(), Device::Cpu).unwrap();
            let mut state = backend.save().unwrap();
            for (name, host) in &mut state.tensors {
                *host = to_host(&tensor(&params[name.strip_prefix("module.").unwrap()])).unwrap();
            }
            backend.load(&state).unwrap();
            (uid.clone(), backend)
        };
        let experts = Mutex::new(params.as_object().unwrap().iter().map(expert).collect());
        let (chosen, seen_scores) = (Mutex::new(chosen), Mutex::new(None));
        Self { experts, k, chosen, dead: vec![], backward_dead: vec![], seen_scores }
    }

    fn run(&self, uid: &str, inputs: Vec<HostTensor>, grads: Option<Vec<HostTensor>>) -> Vec<HostTensor> {
        let mut experts = self.experts.lock().unwrap();
        let backend = &mut experts.iter_mut().find(|(known, _)| known == uid).unwrap().1;
        let rows = Rows(inputs[0].rows() as u32);
        match grads {
            None => backend.forward(&Batch { rows, inputs, grad_outputs: vec![] }).unwrap(),
            Some(grad_outputs) => backend.backward(&Batch { rows, inputs, grad_outputs }).unwrap(),
        }
    }
}

impl FanOut for Script {
    fn k_best(&self) -> usize {
        self.k
    }

    fn forward(&self, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
        *self.seen_scores.lock().unwrap() = Some(scores);
        let (rows, peer) = (inputs[0].rows(), libp2p_identity::PeerId::random());
        let width = inputs[0].shape()[1];
        let (mut mask, mut data) = (vec![false; rows * self.k], vec![0.0; rows * self.k * width]);
        let named = self.chosen.lock().unwrap().clone();
        for (row, experts) in named.iter().enumerate() {
            for (rank, uid) in experts.iter().enumerate().filter(|(_, uid)| !self.dead.contains(uid)) {
                let y = self.run(uid, vec![inputs[0].slice_rows(row, row + 1).unwrap()], None);
                let slot = row * self.k + rank;
                mask[slot] = true;
                data[slot * width..][..width].copy_from_slice(&y[0].to_f32().unwrap());
            }
        }
        let coordinates = |uid: &str| uid.split('.').skip(1).map(|c| c.parse().unwrap()).collect();
        let chosen = |uid: &String| Chosen { uid: uid.parse().unwrap(), peer, coordinates: coordinates(uid) };
        Ok(Gather {
            chosen: named.iter().map(|experts| experts.iter().map(chosen).collect()).collect(),
            mask,
            outputs: vec![HostTensor::from_f32([rows, self.k, width], &data).unwrap()],
            failures: vec![],
        })
    }

    fn backward(
        &self,
        gather: &Arc<Gather>,
        inputs: Vec<HostTensor>,
        grads: Vec<HostTensor>,
    ) -> Result<BackwardGather, MoeError> {
        let (x, grads, width) = (&inputs[0], grads[0].to_f32().unwrap(), inputs[0].shape()[1]);
        let mut sum = vec![0.0; x.numel()];
        let mut answers = 0;
        for (row, experts) in gather.chosen.iter().enumerate() {
            for (rank, expert) in experts.iter().enumerate() {
                let slot = row * self.k + rank;
                if !gather.mask[slot] || self.backward_dead.contains(&expert.uid.to_string()) {
                    continue;
                }
                answers += 1;
                let grad = HostTensor::from_f32([1, width], &grads[slot * width..][..width]).unwrap();
                let answer = self.run(expert.uid.as_str(), vec![x.slice_rows(row, row + 1).unwrap()], Some(vec![grad]));
                let answer = answer[0].to_f32().unwrap();
                sum[row * width..][..width].iter_mut().zip(answer).for_each(|(s, g)| *s += g);
            }
        }
        if answers == 0 {
            return Err(MoeError::Invalid("nobody answered".into()));
        }
        let grad_inputs = vec![HostTensor::from_f32(x.shape(), &sum).unwrap()];
        Ok(BackwardGather { grad_inputs, mask: gather.mask.clone(), failures: vec![] })
    }
}

pub(crate) fn names(value: &Value) -> Vec<Vec<String>> {
    serde_json::from_value(value.clone()).unwrap()
}

pub(crate) fn set_gate(vs: &VarStore, case: &Value) {
    let _guard = tch::no_grad_guard();
    for (name, key) in [("proj.weight", "proj_weight"), ("proj.bias", "proj_bias")] {
        vs.variables()[name].shallow_clone().copy_(&tensor(&case[key]));
    }
}
