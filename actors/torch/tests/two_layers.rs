//! Two mixtures in one graph against the same experts in one process: outputs, every gradient, and the experts' weights
//! after the step.

#[path = "support/world.rs"]
mod world;

use skep_moe::MoeConfig;
use skep_torch::{
    ExpertModule, Ffn, MixtureOfExperts,
    tch::{Device, Kind, Tensor, nn, no_grad},
    to_tensor,
};
use world::{World, optimizer};

const WIDTH: i64 = 8;
const K: i64 = 2;

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.size(), want.size(), "{what}");
    assert!(want.abs().max().double_value(&[]) > 1e-4, "{what} proves nothing: {want}");
    assert!(got.allclose(want, 1e-5, 1e-5, false), "{what}: got {got}, want {want}");
}

/// A mixture over a 2 × 2 grid in plain torch: every expert is scored, the best K answer.
struct Plain {
    /// In the order of their uids.
    experts: Vec<Box<dyn ExpertModule>>,
    weight: Tensor,
    bias: Tensor,
}

impl Plain {
    /// Twin of the remote mixture whose gate stands in `vs`, with copies of its variables.
    fn new(vs: &nn::VarStore, gate: &str, seeds: [u64; 4]) -> Self {
        let variables = vs.variables();
        let twin = |name: &str| variables[&format!("{gate}.proj.{name}")].detach().copy().set_requires_grad(true);
        let experts = seeds.map(|seed| Ffn::hidden(WIDTH as usize).build(Device::Cpu, seed).unwrap());
        Self { experts: experts.into(), weight: twin("weight"), bias: twin("bias") }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let scores = x.linear(&self.weight, Some(&self.bias));
        let at = |expert: i64| scores.select(1, expert / 2) + scores.select(1, 2 + expert % 2);
        let all = Tensor::stack(&(0..4).map(at).collect::<Vec<_>>(), 1);
        let (best, index) = all.topk(K, 1, true, true);
        let answers: Vec<Tensor> =
            self.experts.iter().map(|expert| expert.forward(&[x.shallow_clone()]).unwrap().remove(0)).collect();
        let index = index.unsqueeze(2).expand([-1, -1, WIDTH], false);
        let chosen = Tensor::stack(&answers, 1).gather(1, &index, false);
        (chosen * best.softmax(1, Kind::Float).unsqueeze(2)).sum_dim_intlist(1, false, Kind::Float)
    }
}

#[test]
fn a_mixture_over_a_mixture_equals_the_same_experts_in_one_process() {
    // Each layer's experts are spread over both servers.
    let world = World::start(&[
        &["lower.0.0", "lower.0.1", "upper.0.0", "upper.0.1"],
        &["lower.1.0", "lower.1.1", "upper.1.0", "upper.1.1"],
    ]);
    let vs = nn::VarStore::new(Device::Cpu);
    let layer = |name: &str| {
        let config = MoeConfig::grid(&format!("{name}."), [2, 2]).k_best(K as usize).k_min(K as usize);
        MixtureOfExperts::new(vs.root() / name, &world.client, WIDTH, config).unwrap()
    };
    let (lower, upper) = (layer("lower"), layer("upper"));
    let between = nn::linear(vs.root() / "between", WIDTH, WIDTH, Default::default());
    // See `World::start` for the seeds.
    let plain = [Plain::new(&vs, "lower", [0, 1, 10, 11]), Plain::new(&vs, "upper", [2, 3, 12, 13])];
    let twin = |name: &str| vs.variables()[&format!("between.{name}")].detach().copy().set_requires_grad(true);
    let (weight, bias) = (twin("weight"), twin("bias"));

    let x = randn(&[16, WIDTH]).set_requires_grad(true);
    let plain_x = x.detach().copy().set_requires_grad(true);
    let target = randn(&[16, WIDTH]);
    let hidden = lower.forward(&x).unwrap().apply(&between).tanh() + &x;
    let y = upper.forward(&hidden).unwrap();
    let plain_hidden = plain[0].forward(&plain_x).linear(&weight, Some(&bias)).tanh() + &plain_x;
    let plain_y = plain[1].forward(&plain_hidden);
    assert_close(&y, &plain_y, "the output");

    (&y - &target).square().mean(Kind::Float).backward();
    (&plain_y - &target).square().mean(Kind::Float).backward();
    assert_close(&x.grad(), &plain_x.grad(), "the gradient of the input");
    let variables = vs.variables();
    assert_close(&variables["between.weight"].grad(), &weight.grad(), "the gradient of the layer between");
    assert_close(&variables["between.bias"].grad(), &bias.grad(), "the gradient of its bias");
    for (name, layer) in ["lower", "upper"].iter().zip(&plain) {
        assert_close(&variables[&format!("{name}.proj.weight")].grad(), &layer.weight.grad(), "a gate's gradient");
        assert_close(&variables[&format!("{name}.proj.bias")].grad(), &layer.bias.grad(), "its bias's gradient");
        for (place, expert) in ["0.0", "0.1", "1.0", "1.1"].iter().zip(&layer.experts) {
            let uid = format!("{name}.{place}");
            assert_eq!(world.steps(&uid), 1, "{uid} makes one step a pass");
            let after = world.parameters(&uid);
            for (parameter, before) in expert.parameters() {
                let step = no_grad(|| &before - before.grad() * optimizer().lr);
                let got = after.iter().find(|(known, _)| known.ends_with(&parameter)).unwrap();
                assert_close(&to_tensor(got.1.clone()).unwrap(), &step, &format!("{parameter} of {uid}"));
            }
        }
    }
}
