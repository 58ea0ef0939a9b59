//! The layer against hivemind's numbers, with the experts in this process.

use serde_json::Value;
use skep_moe::MoeError;
use tch::{Device, nn::VarStore};

use super::*;
use crate::{
    near::{Script, assert_close, names, set_gate, sizes, tensor, vectors},
    take_backward_error,
};

fn layer(case: &Value, change: impl FnOnce(&mut Script)) -> (VarStore, MixtureOfExperts, Arc<Script>) {
    let (vs, k) = (VarStore::new(Device::Cpu), case["k_best"].as_u64().unwrap() as usize);
    let mut script = Script::new(k, names(&case["chosen"]));
    change(&mut script);
    let script = Arc::new(script);
    let layer = MixtureOfExperts::over(&vs.root(), 4, &sizes(&case["grid_size"]), script.clone()).unwrap();
    set_gate(&vs, case);
    (vs, layer, script)
}

#[test]
fn outputs_and_gradients_are_hiveminds() {
    let vectors = vectors("mixture");
    for (i, case) in vectors["cases"].as_array().unwrap().iter().enumerate() {
        let (vs, layer, script) = layer(case, |_| ());
        let x = tensor(&case["x"]).set_requires_grad(true);
        let y = layer.forward(&x).unwrap();
        assert_close(&y, &tensor(&case["output"]), &format!("output {i}"));
        (y * tensor(&case["grad_output"])).sum(Kind::Float).backward();
        assert_close(&x.grad(), &tensor(&case["grad_x"]), &format!("gradient of input {i}"));
        for (name, key) in [("proj.weight", "grad_proj_weight"), ("proj.bias", "grad_proj_bias")] {
            assert_close(&vs.variables()[name].grad(), &tensor(&case[key]), &format!("{key} {i}"));
        }
        let scores = script.seen_scores.lock().unwrap().take().unwrap();
        for (got, want) in scores.dimensions.iter().zip(case["grid_scores"].as_array().unwrap()) {
            let got = Tensor::from_slice(&got.1).reshape([-1, got.0 as i64]);
            assert_close(&got, &tensor(want), &format!("scores {i}"));
        }
    }
}

/// The first case with k ≥ 2 and the first expert of row 0.
fn wide_case() -> (Value, String) {
    let vectors = vectors("mixture");
    let case = vectors["cases"].as_array().unwrap().iter().find(|case| case["k_best"].as_u64() == Some(2)).unwrap();
    let first = case["chosen"][0][0].as_str().unwrap().to_owned();
    (case.clone(), first)
}

#[test]
fn a_missing_answer_leaves_its_weight_to_the_others() {
    let (case, dead) = wide_case();
    let (vs, layer, _) = layer(&case, |script| script.dead = vec![dead.clone()]);
    let answered = layer.forward_all(&[&tensor(&case["x"])]).unwrap();
    assert_eq!(Vec::<bool>::try_from(answered.mask.get(0)).unwrap(), [false, true]);
    let alone = case["expert_outputs_per_sample"][0][1].clone();
    assert_close(&answered.outputs[0].get(0), &tensor(&alone).get(0), "the other expert alone");
    answered.outputs[0].get(0).sum(Kind::Float).backward();
    let gate = vs.variables()["proj.weight"].grad();
    assert!(gate.isfinite().all().int64_value(&[]) == 1 && gate.abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn rows_without_an_answer_are_zero_and_train_nothing_to_nan() {
    let (case, _) = wide_case();
    let everyone = names(&case["chosen"]).concat();
    let (vs, layer, _) = layer(&case, |script| {
        script.dead = everyone.into_iter().filter(|uid| *uid != case["chosen"][1][0].as_str().unwrap()).collect();
    });
    let x = tensor(&case["x"]).set_requires_grad(true);
    let answered = layer.forward_all(&[&x]).unwrap();
    let empty = answered.mask.any_dim(1, false).logical_not();
    let y = &answered.outputs[0];
    assert_eq!(
        y.abs().sum_dim_intlist(1, false, Kind::Float).masked_select(&empty).sum(Kind::Float).double_value(&[]),
        0.0
    );
    y.sum(Kind::Float).backward();
    for grad in [x.grad(), vs.variables()["proj.weight"].grad(), vs.variables()["proj.bias"].grad()] {
        assert_eq!(grad.isfinite().all().int64_value(&[]), 1);
    }
}

#[test]
fn the_gate_looks_at_the_mean_of_longer_inputs() {
    let vs = VarStore::new(Device::Cpu);
    let gate = Gate::new(&vs.root(), 4, &[3, 2]).unwrap();
    let x = Tensor::randn([5, 6, 7, 4], (Kind::Float, Device::Cpu));
    let scores = gate.scores(&gate.view(&x).unwrap()).unwrap();
    let mean = x.reshape([5, 42, 4]).mean_dim(1, false, Kind::Float);
    assert_close(&scores[1], &gate.scores(&mean).unwrap()[1], "scores");
    assert_eq!(scores.iter().map(|s| s.size()).collect::<Vec<_>>(), [[5, 3], [5, 2]]);
    assert!(gate.view(&Tensor::zeros([5, 3], (Kind::Float, Device::Cpu))).unwrap_err().to_string().contains("4]"));
}

#[test]
fn a_failed_backward_ends_with_its_reason() {
    let (case, _) = wide_case();
    let (_vs, layer, _) = layer(&case, |script| script.backward_dead = names(&case["chosen"]).concat());
    let y = layer.forward(&tensor(&case["x"])).unwrap();
    let error = y.sum(Kind::Float).f_backward().unwrap_err();
    assert!(error.to_string().contains("nobody answered"), "{error}");
    assert!(matches!(take_backward_error(), Some(Error::Moe(error)) if matches!(*error, MoeError::Invalid(_))));
}
