//! `skep call UID`: one forward call with made-up inputs.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use skep_moe::RemoteExpert;
use skep_wire::{DType, ExpertUid, HostTensor, TensorDescriptor};

use super::{Failure, peer::Peer, wait::Waiting};
use crate::error::Error;

const EXAMPLES: &str = "\
Examples:
  skep call expert.1 --peer /ip4/127.0.0.1/tcp/31337/p2p/12D3Koo...
  skep call expert.1 --peer ADDR --rows 32 --json";

/// Options of `skep call`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct CallExpert {
    /// The expert, as in expert.1
    uid: ExpertUid,
    #[command(flatten)]
    peer: Peer,
    /// Rows of the batch
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rows: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl CallExpert {
    pub fn run(self) -> Result<(), Failure> {
        let runtime = self.peer.join()?;
        let client = runtime.as_ref();
        let deadline = client.deadline(self.peer.timeout()?);
        let waiting = Waiting::on(format!("looking for {}", self.uid));
        let found = RemoteExpert::find_wait(client, &self.uid, deadline).map_err(Error::from)?;
        let expert = found.ok_or_else(|| Error::NoSuchExpert { uid: self.uid.clone() })?;
        drop(waiting);
        let inputs: Result<Vec<_>, _> =
            expert.info().flat_inputs().into_iter().map(|d| made_up(d, self.rows as usize)).collect();
        let inputs = inputs?;
        let waiting = Waiting::on(format!("calling {}", self.uid));
        let start = client.clock.now();
        let outputs = expert.forward_wait(inputs.clone(), deadline).map_err(Error::from)?;
        let took = client.clock.now().since(start);
        drop(waiting);
        println!(
            "{}",
            if self.json {
                self.as_json(&expert, &inputs, &outputs, took)
            } else {
                self.as_text(&expert, &inputs, &outputs, took)
            }
        );
        Ok(())
    }

    fn as_text(&self, expert: &RemoteExpert, inputs: &[HostTensor], outputs: &[HostTensor], took: Duration) -> String {
        let shapes = |tensors: &[HostTensor]| {
            let each: Vec<String> = tensors.iter().map(|t| format!("{} {:?}", t.dtype(), t.shape())).collect();
            each.join(", ")
        };
        let mut text = format!("{} at {}\n", self.uid, expert.peer());
        text += &format!("  took  {}\n  gave  {}", shapes(inputs), shapes(outputs));
        for output in outputs {
            if let Ok(values) = output.to_f32() {
                let first: Vec<String> = values.iter().take(4).map(|v| format!("{v:.4}")).collect();
                text += &format!("  [{}, …]", first.join(", "));
            }
        }
        text + &format!("\n  in    {:.1} ms", took.as_secs_f64() * 1e3)
    }

    fn as_json(&self, expert: &RemoteExpert, inputs: &[HostTensor], outputs: &[HostTensor], took: Duration) -> String {
        let describe = |tensors: &[HostTensor]| -> Vec<serde_json::Value> {
            let describe =
                |t: &HostTensor| json!({"dtype": t.dtype().name(), "shape": t.shape(), "finite": t.is_finite()});
            tensors.iter().map(describe).collect()
        };
        json!({
            "uid": self.uid.as_str(),
            "peer": expert.peer().to_string(),
            "inputs": describe(inputs),
            "outputs": describe(outputs),
            "seconds": took.as_secs_f64(),
        })
        .to_string()
    }
}

/// A tensor that fits a descriptor: a slow wave for floats, zeros for the rest.
fn made_up(descriptor: &TensorDescriptor, rows: usize) -> Result<HostTensor, Error> {
    let shape: Vec<usize> = descriptor.size.iter().map(|size| size.unwrap_or(rows)).collect();
    let dtype = descriptor.dtype.unwrap_or(DType::F32);
    let tensor = match dtype {
        DType::F32 => {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.1).sin()).collect();
            HostTensor::from_f32(shape, &values)
        }
        other => HostTensor::zeros(other, shape),
    };
    tensor.map_err(|error| Error::Invalid(error.to_string()))
}
