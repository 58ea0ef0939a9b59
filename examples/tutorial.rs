//! The tutorial: experts by uid inside a graph of one's own, then a mixture of them.
//!
//! `cargo run --example tutorial -- --peer ADDR` uses the experts `expert.0` … `expert.4` of width 512 that a server hosts
//! (skep or hivemind); without an address it hosts them itself.

use std::time::Duration;

use skep::{
    prelude::*,
    tch::{
        Device, Kind, Tensor,
        nn::{self, Module, OptimizerConfig},
    },
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hive;
    let client = match std::env::args().skip_while(|arg| arg != "--peer").nth(1) {
        Some(address) => Runtime::client([address.parse()?])?,
        None => {
            let experts = Experts::pattern("expert.[0:5]").module(Ffn::hidden(512)).optimizer(Sgd::lr(0.01));
            hive = Runtime::builder().listen("/ip4/127.0.0.1/tcp/0").host(experts).start()?;
            Runtime::client(hive.addresses())?
        }
    };

    // An expert behaves like a module: its output is part of the graph, its backward pass trains it.
    let expert1 = skep::torch::RemoteExpert::find(&client, "expert.1")?;
    let expert4 = skep::torch::RemoteExpert::find(&client, "expert.4")?;
    let x = Tensor::randn([3, 512], (Kind::Float, Device::Cpu));
    let before = expert1.forward(&[&x])?.remove(0);
    before.sum(Kind::Float).f_backward()?; // trains expert.1 although x needs no gradient
    let change = (expert1.forward(&[&x])?.remove(0) - before).abs().max().double_value(&[]);
    println!("one backward pass moved expert.1's output by {change:.6}");

    // Local and remote layers together.
    let vs = nn::VarStore::new(Device::Cpu);
    let out = nn::linear(vs.root() / "out", 512, 2, Default::default());
    let mut optimizer = nn::Sgd::default().build(&vs, 0.01)?;
    let (x, y) =
        (Tensor::randn([32, 512], (Kind::Float, Device::Cpu)), Tensor::randint(2, [32], (Kind::Int64, Device::Cpu)));
    for step in 0..=100 {
        let hidden = expert1.forward(&[&expert4.forward(&[&x])?[0]])?.remove(0);
        let loss = out.forward(&hidden).cross_entropy_for_logits(&y);
        optimizer.zero_grad();
        loss.f_backward()?;
        optimizer.step();
        if step % 20 == 0 {
            println!("step {step:3}  loss {:.4}", loss.double_value(&[]));
        }
    }

    // A mixture: a trainable gate picks the two best of five experts for every row.
    let config = MoeConfig::grid("expert.", [5]).k_best(2).forward_timeout(Duration::from_secs(30));
    let moe = MixtureOfExperts::new(vs.root() / "moe", &client, 512, config)?;
    let mixed = moe.forward(&x)?;
    mixed.mean(Kind::Float).f_backward()?;
    println!("the mixture gave {:?} for {:?}", mixed.size(), x.size());
    Ok(())
}
