//! Hosts an expert class of one's own: a gated block of several inputs and outputs, written in Rust, registered by name.
//!
//! `cargo run --example custom_expert` hosts, trains and calls it in one process. With arguments it is the whole `skep`
//! command with one class more, for example
//! `cargo run --example custom_expert -- serve --expert_cls gated --hidden_dim 64 --expert_uids gated.0`.

use std::process::ExitCode;

use skep::{
    prelude::*,
    tch::{Device, Kind, TchError, Tensor},
    torch::{Error, ExpertModule, ModuleSpec, RemoteExpert, register_class},
    wire::{DType, ExpertInfo, Nested, TensorDescriptor},
};

/// `(x, (condition, shift), keep) → {"gate": g, "y": (x · g + shift) · (row is kept)}` with `g = sigmoid(W·condition)`: all
/// are `[batch, hidden]`, but the keyword input `keep`, `[batch]` of bools.
struct Gated {
    hidden_dim: usize,
    weight: Tensor,
}

impl Gated {
    fn make(hidden_dim: usize, device: Device, seed: u64) -> Result<Box<dyn ExpertModule>, Error> {
        // Parameters depend on the seed alone, so a restart without a checkpoint begins at the same place.
        let scale = ((seed % 7) as f64 + 1.0) / 100.0;
        let size = hidden_dim as i64;
        let weight = Tensor::f_eye(size, (Kind::Float, device))?.f_mul_scalar(scale)?.f_set_requires_grad(true)?;
        Ok(Box::new(Self { hidden_dim, weight }))
    }
}

impl ExpertModule for Gated {
    fn class(&self) -> &str {
        "gated"
    }

    fn info(&self) -> ExpertInfo {
        let rows = TensorDescriptor::batched(DType::F32, &[self.hidden_dim]);
        let (input, output) = (|| Nested::Leaf(rows.clone()), || Nested::Leaf(rows.clone().with_grad()));
        let keep = Nested::Leaf(TensorDescriptor::batched(DType::Bool, &[]));
        ExpertInfo {
            args: vec![input(), Nested::Tuple(vec![input(), input()])],
            kwargs: [("keep".to_owned(), keep)].into(),
            outputs: Nested::Map([("gate".to_owned(), output()), ("y".to_owned(), output())].into()),
            keyword_names: vec!["keep".to_owned()],
        }
    }

    fn forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, TchError> {
        // In the order of the schema: positional inputs, depth first, then keyword inputs by name.
        let [x, condition, shift, keep] = inputs else {
            return Err(TchError::Shape("four inputs are expected".into()));
        };
        let gate = condition.f_linear(&self.weight, None::<&Tensor>)?.f_sigmoid()?;
        let y = x.f_mul(&gate)?.f_add(shift)?.f_mul(&keep.f_unsqueeze(-1)?)?;
        Ok(vec![gate, y])
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("weight".to_owned(), self.weight.shallow_clone())]
    }
}

fn main() -> ExitCode {
    register_class("gated", Gated::make).expect("no other class has this name");
    if std::env::args_os().len() > 1 {
        return skep::cli::main(std::env::args_os());
    }
    match try_it() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_it() -> Result<(), Box<dyn std::error::Error>> {
    skep::torch::process::tune(&Default::default())?;
    let experts = Experts::pattern("gated.[0:2]").module(ModuleSpec::named("gated", 16)?).optimizer(Adam::lr(0.05));
    let hive = Runtime::builder().host(experts).start()?;
    let client = Runtime::client(hive.addresses())?;
    let expert = RemoteExpert::find(&client, "gated.0")?;
    let x = Tensor::randn([8, 16], (Kind::Float, Device::Cpu));
    let shift = Tensor::zeros_like(&x);
    let keep = Tensor::from_slice(&[true, true, true, false, true, true, true, true]);
    for step in 0..5 {
        // Keyword inputs follow the positional ones in the order of their names.
        let outputs = expert.forward(&[&x, &x, &shift, &keep])?;
        let loss = (&outputs[1] - &x).square().mean(Kind::Float);
        println!("step {step}: loss {:.4}", loss.double_value(&[]));
        loss.backward();
    }
    client.stop(secs(1))?;
    hive.stop(secs(5))?;
    Ok(())
}
