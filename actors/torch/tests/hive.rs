//! Real experts on real threads behind a simulated network, trained from this thread.

#[path = "support/world.rs"]
mod world;

use std::time::Duration;

use skep_moe::MoeConfig;
use skep_torch::{
    Error, MixtureOfExperts, RemoteExpert, SwitchConfig, SwitchMixtureOfExperts, take_backward_error,
    tch::{Device, Kind, Reduction, Tensor, nn, nn::OptimizerConfig},
};
use world::{WAIT, World};

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

#[test]
fn a_remote_expert_is_found_and_learns_in_a_bigger_graph() {
    let world = World::start(&[&["expert.0", "expert.1"], &["expert.2"]]);
    let expert = RemoteExpert::find(&world.client, "expert.2").unwrap().with_timeout(WAIT);
    assert_eq!(expert.peer(), world.servers[1].0.local_peer());
    let vs = nn::VarStore::new(Device::Cpu);
    let head = nn::linear(vs.root(), 8, 1, Default::default());
    let mut optimizer = nn::Adam::default().build(&vs, 0.01).unwrap();
    let x = randn(&[32, 8]);
    let target = x.sum_dim_intlist(1, true, Kind::Float);
    let mut losses = Vec::new();
    for _ in 0..40 {
        let y = expert.forward(&[&x]).unwrap().remove(0).apply(&head);
        let loss = y.mse_loss(&target, Reduction::Mean);
        optimizer.backward_step(&loss);
        losses.push(loss.double_value(&[]));
    }
    assert!(losses[39] < losses[0] * 0.7, "{losses:?}");
    assert_eq!(world.steps("expert.2"), 40);
    assert_eq!(world.steps("expert.0"), 0);

    let same = RemoteExpert::at(&world.client, "expert.2", expert.peer()).unwrap();
    assert_eq!(**same.info(), **expert.info());
    let error = expert.forward(&[&randn(&[2, 9])]).unwrap_err().to_string();
    assert!(error.starts_with("expert.2: "), "{error}");
    assert_eq!(expert.forward(&[&x]).unwrap()[0].size(), [32, 8], "it still answers");
    assert!(matches!(RemoteExpert::find(&world.client, "expert.7"), Err(Error::NotFound { uid }) if uid == "expert.7"));
    assert!(matches!(RemoteExpert::find(&world.client, "expert"), Err(Error::Uid(_))));

    let y = expert.clone().with_timeout(Duration::from_secs(1)).forward(&[&x]).unwrap().remove(0);
    world.network.kill(expert.peer());
    assert!(y.sum(Kind::Float).f_backward().unwrap_err().to_string().starts_with("Internal torch error: expert.2: "));
    assert!(matches!(take_backward_error(), Some(Error::Rpc { expert, .. }) if expert == "expert.2"));
}

#[test]
fn a_mixture_learns_and_outlives_a_server() {
    let world = World::start(&[&["ffn.0.0", "ffn.0.1"], &["ffn.1.0", "ffn.1.1"]]);
    let vs = nn::VarStore::new(Device::Cpu);
    let config = MoeConfig::grid("ffn.", [2, 2])
        .k_best(4)
        .forward_timeout(Duration::from_secs(2))
        .backward_timeout(Duration::from_secs(2));
    let moe = MixtureOfExperts::new(vs.root() / "moe", &world.client, 8, config).unwrap();
    let head = nn::linear(vs.root() / "head", 8, 1, Default::default());
    let mut optimizer = nn::Adam::default().build(&vs, 0.01).unwrap();
    let x = randn(&[32, 8]);
    let target = x.sum_dim_intlist(1, true, Kind::Float);
    let mut step = || {
        let loss = moe.forward(&x).unwrap().apply(&head).mse_loss(&target, Reduction::Mean);
        optimizer.backward_step(&loss);
        loss.double_value(&[])
    };
    let losses: Vec<f64> = (0..20).map(|_| step()).collect();
    assert!(losses[19] < losses[0] * 0.9, "{losses:?}");
    let calls = moe.calls();
    assert_eq!((calls.answered, calls.failed()), (20 * 32 * 4, 0));
    assert!(calls.experts.values().all(|expert| expert.forward == expert.backward), "{calls:?}");
    assert_eq!(world.steps("ffn.1.1"), 20);

    // A server that is silent, not gone: only the timeout ends the wait for it, with the others' answers.
    world.network.freeze(world.servers[1].0.local_peer());
    let loss = step();
    assert!(loss < losses[0], "{loss}");
    assert_eq!(world.steps("ffn.0.0"), 21);
    assert!(moe.calls().failed_forward > 0);
    assert_eq!(moe.calls().answered, 20 * 32 * 4 + 32 * 2);
}

#[test]
fn a_switch_mixture_learns() {
    let world = World::start(&[&["ffn.0", "ffn.1", "ffn.2"]]);
    let vs = nn::VarStore::new(Device::Cpu);
    let moe = SwitchMixtureOfExperts::new(vs.root(), &world.client, 8, SwitchConfig::grid("ffn.", [3])).unwrap();
    let head = nn::linear(vs.root() / "head", 8, 1, Default::default());
    let mut optimizer = nn::Adam::default().build(&vs, 0.01).unwrap();
    let x = randn(&[32, 8]);
    let target = x.sum_dim_intlist(1, true, Kind::Float);
    let mut losses = Vec::new();
    for _ in 0..20 {
        let (y, balance) = moe.forward(&x).unwrap();
        let loss = y.apply(&head).mse_loss(&target, Reduction::Mean);
        optimizer.backward_step(&(&loss + balance * 0.01));
        losses.push(loss.double_value(&[]));
    }
    assert!(losses[19] < losses[0] * 0.9, "{losses:?}");
    assert!(["ffn.0", "ffn.1", "ffn.2"].iter().map(|uid| world.steps(uid)).sum::<u64>() >= 20);
}
