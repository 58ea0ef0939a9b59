//! A client of skep for the tests in Python: commands on standard input, answers on standard output, one JSON object a
//! line; tensors travel in files of raw bytes. `rust_client.py` speaks to it.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error,
    fs,
    io::{BufRead, Write},
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use skep::{
    Multiaddr,
    prelude::*,
    tch::{Device, Kind, Tensor, nn, no_grad},
    torch::{RemoteExpert, to_host, to_tensor},
    wire::{DType, HostTensor},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
enum Command {
    /// One pass through layers behind each other, and back for the gradients of the outputs that are floats, if given.
    Pass {
        layers: Vec<Layer>,
        inputs: Vec<Stored>,
        grads: Vec<Stored>,
        /// What balancing losses count.
        balance: f64,
    },
    /// One expert asked with each input at the same time; only whether each call was answered comes back.
    Many {
        expert: String,
        inputs: Vec<Stored>,
    },
    End,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Layer {
    Expert(String),
    Moe(Grid),
    Switch(Grid),
}

#[derive(Deserialize)]
struct Grid {
    prefix: String,
    grid: Vec<usize>,
    k_best: usize,
    weight: Stored,
    bias: Stored,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    file: PathBuf,
}

#[derive(Default, Serialize)]
struct Answer {
    outputs: Vec<Stored>,
    /// Per input its gradient, if it has one.
    grads: Vec<Option<Stored>>,
    /// Per mixture, in the layers' order, the gradients of its gate.
    gates: Vec<BTreeMap<String, Stored>>,
    /// Per switch mixture its balancing loss.
    losses: Vec<f64>,
    /// What the calls of `many` came to; empty for an answer.
    failures: Vec<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Reply {
    Done(Answer),
    Failed { error: String },
}

struct Session {
    runtime: Runtime,
    experts: HashMap<String, RemoteExpert>,
    folder: PathBuf,
    written: usize,
}

fn main() -> Result<()> {
    skep::torch::process::tune(&Default::default())?;
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("usage: interop_client FOLDER PEER…")?);
    let peers: Vec<Multiaddr> = args.map(|peer| peer.parse()).collect::<std::result::Result<_, _>>()?;
    let runtime = Runtime::client(peers)?;
    let mut session = Session { runtime, experts: HashMap::new(), folder, written: 0 };
    for line in std::io::stdin().lock().lines() {
        let command: Command = serde_json::from_str(&line?)?;
        let reply = match session.obey(command) {
            Ok(Some(answer)) => Reply::Done(answer),
            Ok(None) => break,
            Err(error) => Reply::Failed { error: chain(&*error) },
        };
        let mut stdout = std::io::stdout().lock();
        serde_json::to_writer(&mut stdout, &reply)?;
        writeln!(stdout)?;
        stdout.flush()?;
    }
    session.runtime.stop(secs(1))?;
    Ok(())
}

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

impl Session {
    /// `None` at the end.
    fn obey(&mut self, command: Command) -> Result<Option<Answer>> {
        match command {
            Command::Pass { layers, inputs, grads, balance } => self.pass(&layers, &inputs, &grads, balance).map(Some),
            Command::Many { expert, inputs } => self.many(&expert, &inputs).map(Some),
            Command::End => Ok(None),
        }
    }

    fn pass(&mut self, layers: &[Layer], inputs: &[Stored], grads: &[Stored], balance: f64) -> Result<Answer> {
        let inputs = inputs.iter().map(read).collect::<Result<Vec<Tensor>>>()?;
        let leaves: Vec<Tensor> = inputs
            .iter()
            .map(|input| input.set_requires_grad(!grads.is_empty() && input.is_floating_point()))
            .collect();
        let mut answer = Answer::default();
        let (mut gates, mut losses) = (Vec::new(), Vec::new());
        let mut at = leaves.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        for layer in layers {
            let borrowed: Vec<&Tensor> = at.iter().collect();
            at = match layer {
                Layer::Expert(uid) => self.expert(uid)?.forward(&borrowed)?,
                Layer::Moe(grid) => {
                    let (vs, width) = (nn::VarStore::new(Device::Cpu), grid.weight.shape[1] as i64);
                    let layer = MixtureOfExperts::new(vs.root(), &self.runtime, width, grid.config())?;
                    gates.push(grid.set(vs)?);
                    layer.forward_all(&borrowed)?.outputs
                }
                Layer::Switch(grid) => {
                    let (vs, width) = (nn::VarStore::new(Device::Cpu), grid.weight.shape[1] as i64);
                    let mut config = SwitchConfig::grid(&grid.prefix, grid.grid.clone());
                    config.moe = MoeConfig { k_min: config.moe.k_min, ..grid.config() };
                    config.moe.backward_k_min = 0;
                    config.jitter_eps = 0.0;
                    let layer = SwitchMixtureOfExperts::new(vs.root(), &self.runtime, width, config)?;
                    gates.push(grid.set(vs)?);
                    let (answered, loss) = layer.forward_all(&borrowed, true)?;
                    losses.push(loss);
                    answered.outputs
                }
            };
        }
        if !grads.is_empty() {
            let floats = at.iter().filter(|output| output.is_floating_point());
            let weighted = floats.zip(grads).map(|(output, grad)| Ok((output * read(grad)?).sum(Kind::Double)));
            let total = weighted.sum::<Result<Tensor>>()? + losses.iter().sum::<Tensor>() * balance;
            total.f_backward().map_err(|error| {
                skep::torch::take_backward_error().map_or_else(|| Box::new(error) as Box<dyn Error>, Into::into)
            })?;
            for leaf in &leaves {
                let grad = leaf.grad();
                answer.grads.push(if grad.defined() { Some(self.write(&grad)?) } else { None });
            }
            for vs in &gates {
                let grads = vs.variables().into_iter().filter(|(_, variable)| variable.grad().defined());
                let stored = grads.map(|(name, variable)| Ok((name, self.write(&variable.grad())?)));
                answer.gates.push(stored.collect::<Result<_>>()?);
            }
        }
        answer.losses = losses.iter().map(|loss| loss.double_value(&[])).collect();
        answer.outputs = at.iter().map(|output| self.write(&output.detach())).collect::<Result<_>>()?;
        Ok(answer)
    }

    fn many(&mut self, uid: &str, inputs: &[Stored]) -> Result<Answer> {
        let expert = self.expert(uid)?;
        let inputs = inputs.iter().map(|stored| Ok(to_host(&read(stored)?)?)).collect::<Result<Vec<HostTensor>>>()?;
        let deadline = expert.host().client().deadline(Duration::from_secs(60));
        let calls = inputs.into_iter().map(|input| {
            let host = expert.host().clone();
            let call = move || host.forward_wait(vec![input], deadline);
            std::thread::Builder::new().name("call".to_owned()).spawn(call)
        });
        let mut answer = Answer::default();
        for call in calls.collect::<std::io::Result<Vec<_>>>()? {
            match call.join().expect("a call does not panic") {
                Ok(outputs) => {
                    let output = to_tensor(outputs.into_iter().next().ok_or("an answer without outputs")?)?;
                    answer.outputs.push(self.write(&output)?);
                    answer.failures.push(String::new());
                }
                Err(error) => answer.failures.push(error.to_string()),
            }
        }
        Ok(answer)
    }

    fn expert(&mut self, uid: &str) -> Result<RemoteExpert> {
        if let Some(expert) = self.experts.get(uid) {
            return Ok(expert.clone());
        }
        let expert = RemoteExpert::find(&self.runtime, uid)?;
        self.experts.insert(uid.to_owned(), expert.clone());
        Ok(expert)
    }

    fn write(&mut self, tensor: &Tensor) -> Result<Stored> {
        let host = to_host(tensor)?;
        let file = self.folder.join(format!("answer-{}", self.written));
        self.written += 1;
        fs::write(&file, host.data())?;
        Ok(Stored { dtype: host.dtype().name().to_owned(), shape: host.shape().to_vec(), file })
    }
}

impl Grid {
    fn config(&self) -> MoeConfig {
        MoeConfig::grid(&self.prefix, self.grid.clone()).k_best(self.k_best)
    }

    fn set(&self, vs: nn::VarStore) -> Result<nn::VarStore> {
        let mut variables = vs.variables();
        for (name, stored) in [("proj.weight", &self.weight), ("proj.bias", &self.bias)] {
            let value = read(stored)?;
            let variable = variables.get_mut(name).ok_or("a gate has a weight and a bias")?;
            no_grad(|| variable.f_copy_(&value))?;
        }
        Ok(vs)
    }
}

fn read(stored: &Stored) -> Result<Tensor> {
    let dtype = DType::from_name(&stored.dtype).ok_or_else(|| format!("no dtype {}", stored.dtype))?;
    Ok(to_tensor(HostTensor::new(dtype, stored.shape.clone(), fs::read(&stored.file)?.into())?)?)
}
