//! Trains a classifier of handwritten digits through experts of other processes, and kills one of them half way.
//!
//! Run it by `make demo`. Starts a bootstrap node and two servers (the real `skep` command), each with one half of a grid
//! of FFN experts, and trains three models on the same rows: a linear classifier alone; experts that are never trained
//! behind a trained gate; experts that train. Writes the loss curves to `demo-out/loss.svg`.
#![allow(clippy::disallowed_methods, reason = "the demo watches other processes, in real time")]

mod digits;
mod hive;
mod plot;

use std::{path::Path, time::Instant};

use digits::Split;
use hive::Process;
use indicatif::{ProgressBar, ProgressStyle};
use skep::{
    prelude::*,
    tch::{
        Device, Kind, Tensor,
        nn::{self, Module, OptimizerConfig},
    },
    torch::Calls,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const BATCH: i64 = 64;
const STEPS: usize = 2000;
const OUT: &str = "demo-out";

fn main() -> Result<()> {
    skep::torch::process::tune(&Default::default())?;
    std::fs::create_dir_all(OUT)?;
    let out = Path::new(OUT);
    let (train, held_out) = digits::load()?;

    println!("starting a bootstrap node and two servers …");
    let skep = hive::skep_binary()?;
    let bootstrap = Process::start("bootstrap", &skep, out, &["dht"])?;
    let join = bootstrap.address.to_string();
    let server =
        |name, config| Process::start(name, &skep, out, &["serve", "--config", config, "--initial_peers", &join]);
    let survivor = server("server-a", "examples/demo/server-a.toml")?;
    let mut victim = server("server-b", "examples/demo/server-b.toml")?;
    let client = Runtime::client([bootstrap.address.clone()])?;

    let linear = train_linear(&train, &held_out)?;
    let frozen = Model::new(&client, "frozen.")?.train("frozen experts", &train, &held_out, |_| Ok(()))?;
    let hive = Model::new(&client, "hive.")?.train("trained experts", &train, &held_out, |step| {
        if step == STEPS / 2 {
            victim.kill()?;
        }
        Ok(())
    })?;

    plot::losses(
        &out.join("loss.svg"),
        &[("frozen experts", &frozen.losses), ("trained experts", &hive.losses)],
        STEPS / 2,
    )?;
    report(linear, &frozen, &hive);
    drop(client);
    survivor.stop()?;
    bootstrap.stop()?;
    judge(linear, &frozen, &hive)
}

/// A gate over a 2 × 4 grid of remote experts, and a local linear layer behind it.
struct Model {
    vs: nn::VarStore,
    moe: MixtureOfExperts,
    head: nn::Linear,
}

/// What a training run gave.
struct Outcome {
    accuracy: f64,
    losses: Vec<f64>,
    steps_per_second: f64,
    failed_before_kill: u64,
    failed_after_kill: u64,
    calls: Calls,
}

impl Model {
    fn new(client: &Runtime, prefix: &str) -> Result<Self> {
        skep::tch::manual_seed(0);
        let vs = nn::VarStore::new(Device::Cpu);
        let config = MoeConfig::grid(prefix, [2, 4]).k_best(2).forward_timeout(secs(5)).backward_timeout(secs(5));
        let moe = MixtureOfExperts::new(vs.root() / "moe", client, 64, config)?;
        let head = nn::linear(vs.root() / "head", 64, 10, Default::default());
        Ok(Self { vs, moe, head })
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(&self.moe.forward(pixels)?))
    }

    fn train(
        self,
        name: &str,
        train: &Split,
        held_out: &Split,
        mut before_step: impl FnMut(usize) -> Result<()>,
    ) -> Result<Outcome> {
        let mut optimizer = nn::Adam::default().build(&self.vs, 3e-3)?;
        let bar = progress(name);
        let (mut losses, mut failed_before_kill) = (Vec::with_capacity(STEPS), 0);
        let start = Instant::now();
        for step in 0..STEPS {
            if step == STEPS / 2 {
                failed_before_kill = self.moe.calls().failed();
            }
            before_step(step)?;
            let (pixels, labels) = batch(train, step);
            let loss = self.logits(&pixels)?.cross_entropy_for_logits(&labels);
            optimizer.zero_grad();
            loss.f_backward()?;
            optimizer.step();
            losses.push(loss.double_value(&[]));
            bar.set_message(format!("loss {:.3}", losses[step]));
            bar.inc(1);
        }
        let steps_per_second = STEPS as f64 / start.elapsed().as_secs_f64();
        bar.finish();
        let accuracy = skep::tch::no_grad(|| self.logits(&held_out.pixels)).map(|logits| correct(&logits, held_out))?;
        let calls = self.moe.calls();
        let failed_after_kill = calls.failed() - failed_before_kill;
        Ok(Outcome { accuracy, losses, steps_per_second, failed_before_kill, failed_after_kill, calls })
    }
}

fn train_linear(train: &Split, held_out: &Split) -> Result<f64> {
    skep::tch::manual_seed(0);
    let vs = nn::VarStore::new(Device::Cpu);
    let linear = nn::linear(vs.root(), 64, 10, Default::default());
    let mut optimizer = nn::Adam::default().build(&vs, 3e-3)?;
    for step in 0..STEPS {
        let (pixels, labels) = batch(train, step);
        optimizer.backward_step(&linear.forward(&pixels).cross_entropy_for_logits(&labels));
    }
    Ok(correct(&linear.forward(&held_out.pixels), held_out))
}

/// The rows of one step, moved by up to one pixel: every run sees the same ones.
fn batch(train: &Split, step: usize) -> (Tensor, Tensor) {
    const MOVES: [(i64, i64); 8] = [(0, 0), (0, 1), (0, 0), (1, 0), (0, 0), (0, -1), (0, 0), (-1, 0)];
    let rows = train.labels.size()[0];
    let start = (step as i64 * BATCH) % (rows - BATCH);
    let (dy, dx) = MOVES[step % MOVES.len()];
    let images = train.pixels.narrow(0, start, BATCH).view([BATCH, 8, 8]).constant_pad_nd([1, 1, 1, 1]);
    let pixels = images.narrow(1, 1 + dy, 8).narrow(2, 1 + dx, 8).reshape([BATCH, 64]);
    (pixels, train.labels.narrow(0, start, BATCH))
}

fn correct(logits: &Tensor, split: &Split) -> f64 {
    logits.argmax(-1, false).eq_tensor(&split.labels).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

fn progress(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>16} {bar:32} {pos}/{len} {per_sec} {msg}");
    let bar = ProgressBar::new(STEPS as u64).with_style(style.expect("a literal template"));
    bar.set_prefix(name.to_owned());
    bar
}

fn report(linear: f64, frozen: &Outcome, hive: &Outcome) {
    println!("\noptimizer steps per expert, as their servers confirmed them");
    for (uid, counts) in &hive.calls.experts {
        println!(
            "  {uid:12} {:6} steps  {:6} forward calls  {:4} failed",
            counts.backward, counts.forward, counts.failed
        );
    }
    println!("\nfailed calls: {} before the kill, {} after it", hive.failed_before_kill, hive.failed_after_kill);
    println!("steps/s:      {:.0} (frozen), {:.0} (trained)", frozen.steps_per_second, hive.steps_per_second);
    println!("loss curves:  {OUT}/loss.svg");
    println!("\nheld-out accuracy");
    println!("  linear classifier alone      {linear:.4}");
    println!("  hive with frozen experts     {:.4}", frozen.accuracy);
    println!("  hive with trained experts    {:.4}", hive.accuracy);
}

/// The demo has failed when training through the hive does not pay.
fn judge(linear: f64, frozen: &Outcome, hive: &Outcome) -> Result<()> {
    if hive.accuracy < 0.97 || hive.accuracy <= linear || hive.accuracy <= frozen.accuracy {
        return Err(format!("the trained hive reached only {:.4}", hive.accuracy).into());
    }
    if hive.failed_before_kill > 0 {
        return Err(format!("{} calls failed before anything was killed", hive.failed_before_kill).into());
    }
    Ok(())
}
