//! [`SimMoe`]: a mixture whose gate is the simulation's seed.

use std::{ops::Deref, time::Duration};

use rand::Rng;
use skep_dht::{ListLimits, Listed};
use skep_kernel::Deadline;
use skep_moe::{BackwardGather, Gather, GridScores, Mixture, MoeConfig, MoeError};
use skep_wire::HostTensor;

use crate::{Sim, SimClient};

/// Virtual time that a listing of all experts may take.
const LISTING: Duration = Duration::from_secs(120);

impl Sim {
    /// A float32 tensor `[rows, width]` of values between -1 and 1, drawn by the seed.
    pub fn rows(&self, rows: usize, width: usize) -> HostTensor {
        let random = &mut *self.random();
        let values: Vec<f32> = (0..rows * width).map(|_| random.random_range(-1.0..1.0)).collect();
        HostTensor::from_f32([rows, width], &values).expect("as many values as the shape says")
    }

    /// Scores of a gate for so many rows over a grid, drawn by the seed.
    pub fn scores(&self, rows: usize, grid: &[usize]) -> GridScores {
        let random = &mut *self.random();
        let dimensions =
            grid.iter().map(|&size| (size, (0..rows * size).map(|_| random.random_range(-1.0..1.0)).collect()));
        GridScores { rows, dimensions: dimensions.collect() }
    }
}

/// A mixture about to be made. Setters are those of [`MoeConfig`].
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(2).experts("ffn.[0:2].[0:3]").start().await;
///     let moe = sim.client(&hive).moe("ffn.", [2, 3]).k_best(3).k_min(1).forward_timeout(Duration::from_secs(2));
///     let moe = moe.build().await;
///     assert_eq!(moe.visible_experts().await.len(), 6);
/// });
/// ```
pub struct MoeBuilder {
    client: SimClient,
    config: MoeConfig,
}

impl MoeBuilder {
    pub(crate) fn new(client: SimClient, config: MoeConfig) -> Self {
        Self { client, config }
    }

    /// Experts asked per row.
    pub fn k_best(mut self, k: usize) -> Self {
        self.config.k_best = k;
        self
    }

    /// Answers that each row needs in forward.
    pub fn k_min(mut self, k: usize) -> Self {
        self.config.k_min = k;
        self
    }

    /// Answers that the batch needs in backward.
    pub fn backward_k_min(mut self, k: usize) -> Self {
        self.config.backward_k_min = k;
        self
    }

    /// Longest wait for forward.
    pub fn forward_timeout(mut self, wait: Duration) -> Self {
        self.config.forward_timeout = wait;
        self
    }

    /// Longest wait for backward.
    pub fn backward_timeout(mut self, wait: Duration) -> Self {
        self.config.backward_timeout = wait;
        self
    }

    /// Longest wait once every row has `k_min` answers.
    pub fn timeout_after_k_min(mut self, wait: Duration) -> Self {
        self.config.timeout_after_k_min = Some(wait);
        self
    }

    /// Rows short of `k_min` become zero rows instead of an error.
    pub fn allow_zero_outputs(mut self, allow: bool) -> Self {
        self.config.allow_zero_outputs = allow;
        self
    }

    /// Changes anything else of the configuration.
    pub fn configure(mut self, change: impl FnOnce(MoeConfig) -> MoeConfig) -> Self {
        self.config = change(self.config);
        self
    }

    /// The mixture, once its client has joined.
    ///
    /// # Panics
    /// When the client has not joined within a minute, and when the configuration makes no sense.
    pub async fn build(self) -> SimMoe {
        self.client.joined().await;
        let mixture = Mixture::new(&self.client, self.config).unwrap_or_else(|error| panic!("no mixture: {error}"));
        SimMoe { client: self.client, mixture }
    }
}

/// A real [`Mixture`]; the scores of its gate are drawn by the simulation's seed.
///
/// ```
/// use skep_testkit::{ScriptedBackend, Sim};
///
/// Sim::with_seed(5).run(|sim| async move {
///     let hive = sim.servers(2).experts("ffn.[0:4]").backend(ScriptedBackend::affine(1.0, 0.1)).start().await;
///     let moe = sim.client(&hive).moe("ffn.", [4]).k_best(2).build().await;
///     let out = moe.forward(sim.rows(3, 8)).await.expect("all servers live");
///     moe.backward(&out, out.ones()).await.expect("all servers live");
///     let steps: u64 = (0..4).map(|i| hive.steps(&format!("ffn.{i}"))).sum();
///     assert!(steps >= 2);
/// });
/// ```
#[derive(Clone)]
pub struct SimMoe {
    client: SimClient,
    mixture: Mixture,
}

impl SimMoe {
    /// The real mixture, for scores of one's own.
    pub fn mixture(&self) -> &Mixture {
        &self.mixture
    }

    /// Its client.
    pub fn client(&self) -> &SimClient {
        &self.client
    }

    /// Fans `rows`, `[rows, …]`, out by scores that the seed draws, and joins the outputs.
    ///
    /// # Errors
    /// Those of [`Mixture::forward`].
    pub async fn forward(&self, rows: HostTensor) -> Result<MoeOutput, MoeError> {
        let scores = self.client.sim().scores(rows.rows(), &self.mixture.config().grid_size);
        let gather = self.mixture.forward(vec![rows.clone()], scores).await?;
        Ok(MoeOutput { inputs: vec![rows], k: self.mixture.config().k_best, gather })
    }

    /// Trains the experts that answered on `grad_outputs`, `[rows, k, …]`.
    ///
    /// # Errors
    /// Those of [`Mixture::backward`].
    pub async fn backward(&self, output: &MoeOutput, grad_outputs: HostTensor) -> Result<BackwardGather, MoeError> {
        self.mixture.backward(&output.gather, output.inputs.clone(), vec![grad_outputs]).await
    }

    /// All experts that are announced under its prefix now, as this client's DHT node finds them; caches do not count.
    ///
    /// # Panics
    /// When the DHT does not answer within two minutes.
    pub async fn visible_experts(&self) -> Vec<Listed> {
        let deadline = Deadline::after(self.client.sim().now(), LISTING);
        let listed = self.client.dht.experts_under(self.mixture.prefix(), ListLimits::default(), deadline).await;
        listed.unwrap_or_else(|error| panic!("experts cannot be listed: {error}"))
    }
}

/// A joined forward pass with what backward needs.
///
/// ```
/// use skep_testkit::Sim;
///
/// Sim::with_seed(1).run(|sim| async move {
///     let hive = sim.servers(2).experts("ffn.[0:4]").start().await;
///     let moe = sim.client(&hive).moe("ffn.", [4]).k_best(2).build().await;
///     let out = moe.forward(sim.rows(3, 4)).await.expect("both servers live");
///     assert_eq!(out.responders_per_row().collect::<Vec<_>>(), [2, 2, 2]);
///     assert_eq!(out.outputs[0].shape(), [3, 2, 4]); // what the real `Gather` holds: rows, k, width
/// });
/// ```
#[derive(Clone, Debug)]
pub struct MoeOutput {
    inputs: Vec<HostTensor>,
    k: usize,
    gather: Gather,
}

impl MoeOutput {
    /// How many experts answered for each row.
    pub fn responders_per_row(&self) -> impl Iterator<Item = usize> + '_ {
        self.gather.mask.chunks(self.k).map(|row| row.iter().filter(|answered| **answered).count())
    }

    /// A gradient of ones in the shape of the output.
    pub fn ones(&self) -> HostTensor {
        let shape = self.gather.outputs[0].shape();
        HostTensor::from_f32(shape, &vec![1.0; shape.iter().product()]).expect("as many values as the shape says")
    }
}

impl Deref for MoeOutput {
    type Target = Gather;

    fn deref(&self) -> &Gather {
        &self.gather
    }
}
