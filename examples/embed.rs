//! Hosts experts inside a program that has a tokio runtime of its own.
//!
//! `cargo run --example embed`

use skep::{
    prelude::*,
    tch::{Device, Kind, Tensor},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    skep::torch::process::tune(&Default::default())?;
    let experts = Experts::pattern("embedded.[0:3]").module(Ffn::hidden(64)).optimizer(Adam::lr(1e-3));
    let hive = Runtime::builder().listen("/ip4/127.0.0.1/tcp/0").host(experts).start_async().await?;
    for expert in hive.experts() {
        println!("hosting {} ({}, {} parameters)", expert.uid, expert.class, expert.parameters);
    }

    // Something else that the program does, while experts serve on threads of their own.
    let ticks = tokio::spawn(async {
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        "the program's own work went on"
    });

    // A client of the same process; a synchronous call is fine on the program's threads.
    let client = Runtime::builder().client_mode().initial_peers(hive.addresses()).start_async().await?;
    let expert = skep::torch::RemoteExpert::find(&client, "embedded.0")?;
    let x = Tensor::randn([4, 64], (Kind::Float, Device::Cpu));
    let y = expert.forward(&[&x])?;
    println!("embedded.0 answered {:?} for {:?}; {}", y[0].size(), x.size(), ticks.await?);
    client.stop(secs(1))?;
    hive.stop(secs(5))?;
    Ok(())
}
