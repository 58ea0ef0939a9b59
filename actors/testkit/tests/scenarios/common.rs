//! Sizes, measures and small helpers of all scenarios.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use libp2p_identity::PeerId;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use skep_dht::{Dht, Freshness, Hosted};
use skep_kernel::Deadline;
use skep_rpc::{Answer, Body, Call, Meta, RequestId, RpcError, SharedTransport, TensorBody};
use skep_testkit::{Recording, Sim};
use skep_wire::{Compression, ExpertUid, HostTensor, Method, compression::compress};

pub fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub fn within(sim: &Sim, wait: Duration) -> Deadline {
    Deadline::after(sim.now(), wait)
}

/// Whether the large forms were asked for.
pub fn is_soak() -> bool {
    std::env::var_os("SKEP_SOAK").is_some()
}

/// The size of the ordinary form, or of the large one.
pub fn size<T>(ordinary: T, soak: T) -> T {
    if is_soak() { soak } else { ordinary }
}

/// Randomness of the test itself, apart from the simulation's.
pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed ^ 0x7363_656e_6500)
}

/// A tensor `[values.len(), 1]`.
pub fn column(values: &[f32]) -> HostTensor {
    HostTensor::from_f32([values.len(), 1], values).unwrap()
}

/// What a scenario cost on the machine, for `docs/scenarios.md`.
pub struct Stopwatch {
    name: &'static str,
    started: Instant,
    cpu: f64,
}

impl Stopwatch {
    #[allow(clippy::disallowed_methods, reason = "it measures the machine, not the simulation")]
    pub fn start(name: &'static str) -> Self {
        Self { name, started: Instant::now(), cpu: cpu_seconds() }
    }

    /// Prints a line that `--nocapture` shows.
    pub fn report(&self, what: impl Display) {
        let (wall, cpu) = (self.started.elapsed().as_secs_f64(), cpu_seconds() - self.cpu);
        let form = size("ordinary", "soak");
        println!("scenario {} ({form}): {what}; {wall:.1} s wall, {cpu:.1} s CPU", self.name);
    }
}

/// Processor time of this thread, in seconds; 0 where the system does not tell.
fn cpu_seconds() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/thread-self/stat") else { return 0.0 };
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |field: usize| fields.get(field).and_then(|ticks| ticks.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Looks up in the whole network who hosts these experts; caches do not count.
pub async fn find(sim: &Sim, dht: &Dht, uids: &[ExpertUid]) -> Vec<Option<Hosted>> {
    let mut found = Vec::new();
    for uids in uids.chunks(64) {
        found.extend(dht.find_experts(uids.to_vec(), Freshness::Latest, within(sim, secs(600))).await.unwrap());
    }
    found
}

/// One call to an expert, once: what a client's retries would hide shows.
pub struct ExpertCall {
    pub peer: PeerId,
    pub uid: ExpertUid,
    pub method: Method,
    /// Flat inputs, then for backward output gradients.
    pub tensors: Vec<HostTensor>,
    pub request_id: RequestId,
}

impl ExpertCall {
    pub fn forward(peer: PeerId, uid: &ExpertUid, value: f32, request_id: u128) -> Self {
        let (uid, request_id) = (uid.clone(), RequestId(request_id));
        Self { peer, uid, method: Method::Forward, tensors: vec![column(&[value])], request_id }
    }

    /// A step on the input `value` with a gradient of one.
    pub fn backward(peer: PeerId, uid: &ExpertUid, value: f32, request_id: u128) -> Self {
        let tensors = vec![column(&[value]), column(&[1.0])];
        Self { method: Method::Backward, tensors, ..Self::forward(peer, uid, value, request_id) }
    }

    pub async fn send(&self, transport: &SharedTransport, deadline: Deadline) -> Result<Answer, RpcError> {
        let tensors = self.tensors.iter().map(|tensor| compress(tensor, Compression::None).unwrap()).collect();
        let body = Body::Tensors(TensorBody { uid: self.uid.to_string(), tensors });
        let meta = Meta { deadline, request_id: self.request_id, trace: None };
        transport.call(Call { peer: self.peer, method: self.method, body, meta }).await
    }
}

/// The inputs that an expert was trained on, step by step.
pub fn steps(recording: &Recording) -> Vec<Vec<f32>> {
    let backward = recording.batches().into_iter().filter(|recorded| recorded.backward);
    backward.map(|recorded| recorded.batch.inputs[0].to_f32().unwrap()).collect()
}
