//! hivemind's experts, number by number, through the port that servers use.

mod support;

use serde_json::Value;
use skep_expert::{Backend, Batch};
use skep_kernel::Rows;
use skep_torch::{
    Adam, DetDropout, ExpertModule, Ffn, Nop, OptimizerSpec, Schedule, Sgd, TorchBackend, Transformer, tch::Device,
};
use skep_wire::HostTensor;
use support::*;

fn host_it(module: impl ExpertModule + 'static, spec: impl Into<OptimizerSpec>, params: &Value) -> TorchBackend {
    let mut backend = TorchBackend::new(Box::new(module), spec.into(), Device::Cpu).unwrap();
    let mut snapshot = backend.save().unwrap();
    for (name, value) in params.as_object().unwrap() {
        let slot = snapshot.tensors.iter_mut().find(|(given, _)| *given == format!("module.{name}"));
        slot.unwrap_or_else(|| panic!("no parameter {name}")).1 = host(value);
    }
    backend.load(&snapshot).unwrap();
    backend
}

fn batch(inputs: &[HostTensor], grad_outputs: &[HostTensor]) -> Batch {
    Batch { rows: Rows(inputs[0].rows() as u32), inputs: inputs.to_vec(), grad_outputs: grad_outputs.to_vec() }
}

/// `skip`: a parameter and the range of its entries that hold amplified rounding noise.
fn replay(
    backend: &mut TorchBackend,
    inputs: &[HostTensor],
    grads: &[HostTensor],
    run: &Value,
    skip: Option<(&str, i64, i64)>,
) {
    for (i, call) in run.as_array().unwrap().iter().enumerate() {
        let outputs = backend.forward(&batch(inputs, &[])).unwrap();
        assert_host_close(&outputs[0], &host(&call["outputs_before_step"][0]), &format!("output before step {i}"));
        let answer = backend.backward(&batch(inputs, grads)).unwrap();
        for (j, want) in call["grad_inputs"].as_array().unwrap().iter().enumerate() {
            assert_host_close(&answer[j], &host(want), &format!("gradient {j} of step {i}"));
        }
        let state = backend.save().unwrap();
        let get = |name: &str| state.tensors.iter().find(|(given, _)| given == name).map(|(_, host)| host).unwrap();
        for (name, want) in call["params_after_step"].as_object().unwrap() {
            let (got, want) = (get(&format!("module.{name}")), host(want));
            match skip {
                Some((skipped, from, to)) if skipped == name => {
                    let (got, want) =
                        (skep_torch::to_tensor(got.clone()).unwrap(), skep_torch::to_tensor(want).unwrap());
                    let rest = want.size()[0] - to;
                    assert_close(&got.narrow(0, 0, from), &want.narrow(0, 0, from), name);
                    assert_close(&got.narrow(0, to, rest), &want.narrow(0, to, rest), name);
                }
                _ => assert_host_close(got, &want, &format!("{name} after step {i}")),
            }
        }
        if let Some(moments) =
            call["optimizer_state_after"]["state"].as_object().or(call["optimizer_state_after"].as_object())
        {
            let names: Vec<_> = state.tensors.iter().filter_map(|(name, _)| name.strip_prefix("module.")).collect();
            for (index, name) in names.iter().enumerate() {
                for (part, want) in moments.get(&index.to_string()).and_then(Value::as_object).into_iter().flatten() {
                    if want.get("b64").is_some() && skip.is_none_or(|(skipped, ..)| skipped != *name) {
                        assert_host_close(
                            get(&format!("optimizer.{name}.{part}")),
                            &host(want),
                            &format!("{name}.{part}"),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn ffn_computes_and_trains_as_in_hivemind() {
    let vectors = vectors("ffn");
    let linear = Schedule::Linear { warmup_steps: 2, total_steps: 5 };
    let specs: [(&str, OptimizerSpec); 5] = [
        ("no_optimizer_1", OptimizerSpec::none()),
        ("sgd_lr0.01_2", Sgd::lr(0.01).into()),
        ("adam_default_3", Adam::default().into()),
        ("adam_linear_warmup2_total5_6", OptimizerSpec::from(Adam::default()).schedule(linear)),
        ("sgd_lr0.01_clip0.1_2", OptimizerSpec::from(Sgd::lr(0.01)).clip_grad_norm(0.1)),
    ];
    assert_eq!(vectors["runs"].as_object().unwrap().len(), specs.len());
    for (run, spec) in specs {
        println!("{run}");
        let mut backend = host_it(Ffn::new(4, Device::Cpu, 0).unwrap(), spec.clone(), &vectors["params"]);
        let (x, grad) = (host(&vectors["x"]), host(&vectors["grad_outputs"]));
        replay(&mut backend, &[x], &[grad], &vectors["runs"][run], None);
        let steps = vectors["runs"][run].as_array().unwrap().len() as u64;
        assert_eq!(backend.steps(), if spec.trains() { steps } else { 0 });
    }
    for (step, factor) in
        vectors["lr_schedule_linear_warmup2_total5_factor_by_step"].as_array().unwrap().iter().enumerate()
    {
        assert!((linear.factor(step as u64) - factor.as_f64().unwrap()).abs() < 1e-9);
    }
}

#[test]
fn transformer_computes_and_trains_as_in_hivemind() {
    let vectors = vectors("transformer");
    let specs: [(&str, OptimizerSpec); 2] =
        [("sgd_lr0.01_1", Sgd::lr(0.01).into()), ("adam_default_1", Adam::default().into())];
    for (run, spec) in specs {
        println!("{run}");
        let module = Transformer::new(16, Device::Cpu, 0).unwrap().dropout(0.0);
        let mut backend = host_it(module, spec, &vectors["params"]);
        let inputs = [host(&vectors["x"]), host(&vectors["key_padding_mask"])];
        let skip = Some(("self_attn.in_proj_bias", 16, 32));
        replay(&mut backend, &inputs, &[host(&vectors["grad_outputs"])], &vectors["runs"][run], skip);
    }
}

#[test]
fn det_dropout_and_nop_compute_as_in_hivemind() {
    let vectors = vectors("other_experts");
    let (dropout, nop) = (&vectors["det_dropout"], &vectors["nop"]);
    let mut backend = host_it(DetDropout::new(4, Device::Cpu, 0).unwrap(), Sgd::lr(0.01), &dropout["params"]);
    let inputs = [host(&dropout["x"]), host(&dropout["mask"])];
    replay(&mut backend, &inputs, &[host(&dropout["grad_outputs"])], &dropout["runs"]["sgd_lr0.01_1"], None);

    let mut backend = host_it(Nop::new(4, Device::Cpu).unwrap(), Adam::default(), &nop["params"]);
    let (x, grad) = (host(&nop["x"]), host(&nop["grad_outputs"]));
    let answer = backend.backward(&batch(std::slice::from_ref(&x), &[grad])).unwrap();
    assert_eq!(answer[0], host(&nop["grad_inputs"][0]));
    assert_eq!(backend.forward(&batch(&[x], &[])).unwrap()[0], host(&nop["outputs"][0]));
}

#[test]
fn schemas_are_hiveminds() {
    let infos = [
        Ffn::new(16, Device::Cpu, 0).unwrap().info(),
        Transformer::new(16, Device::Cpu, 0).unwrap().info(),
        DetDropout::new(16, Device::Cpu, 0).unwrap().info(),
        Nop::new(16, Device::Cpu).unwrap().info(),
    ];
    let inputs: Vec<Vec<String>> = infos
        .iter()
        .map(|info| info.flat_inputs().iter().map(|d| format!("{:?} {}", d.size, d.dtype.unwrap())).collect())
        .collect();
    assert_eq!(inputs[0], ["[None, Some(16)] float32"]);
    assert_eq!(inputs[1], ["[None, Some(128), Some(16)] float32", "[None, Some(128)] bool"]);
    assert_eq!(inputs[2], ["[None, Some(16)] float32", "[None, Some(16)] int64"]);
    let grads: Vec<_> = infos.iter().map(|info| info.flat_outputs()[0].requires_grad).collect();
    assert_eq!(grads, [true, true, true, false]);
}
