//! The switch layer against hivemind's numbers, with the experts in this process.

use serde_json::Value;
use tch::{Device, nn::VarStore};

use super::*;
use crate::near::{Script, assert_close, names, set_gate, sizes, tensor, vectors};

fn layer(case: &Value, change: impl FnOnce(&mut SwitchConfig)) -> (VarStore, SwitchMixtureOfExperts, Arc<Script>) {
    let (vs, k) = (VarStore::new(Device::Cpu), case["k_best"].as_u64().unwrap() as usize);
    let mut config = SwitchConfig::grid("m.", sizes(&case["grid_size"]));
    (config.moe.k_best, config.jitter_eps) = (k, 0.0);
    change(&mut config);
    let script = Arc::new(Script::new(k, names(&case["steps"][0]["chosen"])));
    let layer = SwitchMixtureOfExperts::over(&vs.root(), 4, config, script.clone()).unwrap();
    set_gate(&vs, case);
    (vs, layer, script)
}

/// The loss that hivemind means, from its own numbers.
fn intended_loss(step: &Value) -> f64 {
    let softmax: Vec<Tensor> = step["grid_softmax"].as_array().unwrap().iter().map(tensor).collect();
    let used = tensor(&step["grid_utilization_after"]);
    let mut at = 0;
    softmax.iter().fold(0.0, |loss, p| {
        let size = p.size()[1];
        let u = used.narrow(0, at, size);
        at += size;
        let mean = (p.mean_dim(0, false, Kind::Float) * u).mean(Kind::Float).double_value(&[]);
        loss + mean * (size * size) as f64
    })
}

#[test]
fn outputs_gradients_and_utilization_are_hiveminds() {
    let vectors = vectors("switch_mixture");
    for case in vectors["cases"].as_array().unwrap() {
        let (vs, layer, script) = layer(case, |_| ());
        for (i, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            *script.chosen.lock().unwrap() = names(&step["chosen"]);
            assert_close(&layer.utilization(), &tensor(&step["grid_utilization_before"]), "utilization before");
            let x = tensor(&step["x"]).set_requires_grad(true);
            let (y, loss) = layer.forward(&x).unwrap();
            assert_close(&layer.utilization(), &tensor(&step["grid_utilization_after"]), "utilization after");
            assert_close(&y, &tensor(&step["output"]), &format!("output {i}"));
            assert!((loss.double_value(&[]) - intended_loss(step)).abs() < 1e-5);
            for variable in vs.trainable_variables() {
                let mut variable = variable;
                variable.zero_grad();
            }
            (y * tensor(&step["grad_output"])).sum(Kind::Float).backward();
            assert_close(&x.grad(), &tensor(&step["grad_x"]), &format!("gradient of input {i}"));
            for (name, key) in [("proj.weight", "grad_proj_weight"), ("proj.bias", "grad_proj_bias")] {
                assert_close(&vs.variables()[name].grad(), &tensor(&step[key]), &format!("{key} {i}"));
            }
        }
    }
}

#[test]
fn the_balancing_loss_moves_the_gate_away_from_what_is_used_most() {
    let case = &vectors("switch_mixture")["cases"][0];
    let (vs, layer, _) = layer(case, |_| ());
    let (_, loss) = layer.forward(&tensor(&case["steps"][0]["x"])).unwrap();
    loss.backward();
    let bias = vs.variables()["proj.bias"].grad();
    assert!(bias.abs().max().double_value(&[]) > 1e-3, "hivemind's own loss has no gradient");
    let first_dimension = bias.narrow(0, 0, sizes(&case["grid_size"])[0] as i64);
    let used = layer.utilization().narrow(0, 0, first_dimension.size()[0]);
    assert_eq!(first_dimension.argmax(0, false), used.argmax(0, false));
}

#[test]
fn a_two_dimensional_input_stays_as_it_is_and_may_be_a_leaf_that_requires_grad() {
    let case = &vectors("switch_mixture")["cases"][0];
    let (_vs, layer, _) = layer(case, |config| config.jitter_eps = 0.5);
    let x = tensor(&case["steps"][0]["x"]).set_requires_grad(true);
    assert_eq!(x.dim(), 2);
    let before = x.detach().copy();
    let (y, _) = layer.forward(&x).unwrap();
    y.sum(Kind::Float).backward();
    assert!(x.equal(&before) && x.grad().defined());
}

#[test]
fn without_training_nothing_is_random_and_utilization_stays() {
    let case = &vectors("switch_mixture")["cases"][0];
    let (_vs, layer, _) = layer(case, |config| (config.jitter_eps, config.grid_dropout) = (0.5, 0.1));
    let (before, x) = (layer.utilization().copy(), tensor(&case["steps"][0]["x"]));
    let (y, _) = layer.forward_t(&x, false).unwrap();
    assert_close(&y, &tensor(&case["steps"][0]["output"]), "output");
    assert_close(&layer.utilization(), &before, "utilization");
}

#[test]
fn dropped_coordinates_are_ruled_out_but_never_all() {
    let case = &vectors("switch_mixture")["cases"][0];
    for dropout in [0.0, 0.5] {
        let (_vs, layer, script) = layer(case, |config| config.grid_dropout = dropout);
        let mut ruled_out = 0;
        for _ in 0..20 {
            let (y, loss) = layer.forward(&tensor(&case["steps"][0]["x"])).unwrap();
            assert_eq!(y.isfinite().all().int64_value(&[]), 1);
            assert!(loss.double_value(&[]).is_finite());
            for (size, scores) in script.seen_scores.lock().unwrap().take().unwrap().dimensions {
                assert!(scores[..size].iter().any(|score| score.is_finite()));
                ruled_out += scores.iter().filter(|score| score.is_infinite()).count();
            }
        }
        assert_eq!(ruled_out > 0, dropout > 0.0);
    }
}

#[test]
fn numbers_outside_their_range_are_refused() {
    let vs = VarStore::new(Device::Cpu);
    let mut config = SwitchConfig::grid("m.", [3, 4]);
    config.grid_dropout = 1.5;
    let error = SwitchMixtureOfExperts::over(&vs.root(), 4, config, Arc::new(Script::new(1, vec![]))).err().unwrap();
    assert!(error.to_string().contains("grid_dropout"));
}
