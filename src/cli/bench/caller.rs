//! The job of a client process: call experts, over and over.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use multiaddr::Multiaddr;
use serde::{Deserialize, Serialize};
use skep_moe::RemoteExpert;
use skep_rpc::RpcError;
use skep_wire::{DType, ExpertUid, HostTensor, TensorDescriptor};

use super::{
    clients::Way,
    latency::{Latencies, Recorded},
    worker::Start,
};
use crate::{Runtime, error::Error};

/// Longest wait for one call.
const CALL: Duration = Duration::from_secs(280);

/// Which calls to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calls {
    /// Whom to ask.
    pub peer: Multiaddr,
    /// How calls travel.
    pub way: Way,
    /// Experts, called in turn.
    pub uids: Vec<String>,
    /// Rows of a call.
    pub rows: usize,
    /// Whether each forward call is followed by a backward call.
    pub backward: bool,
    /// Callers, each of which waits for its answer before it calls again.
    pub at_once: usize,
    /// Seconds in which calls begin.
    pub seconds: f64,
}

/// How they went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Called {
    /// Forward calls, with their backward calls, that were answered.
    pub calls: u64,
    /// Those that were not.
    pub failed: u64,
    /// What the first of them said.
    pub failure: Option<String>,
    /// Calls per second: the sum over the callers, each by the time to its last answer.
    pub rate: f64,
    /// How long they took.
    pub latency: Recorded,
}

/// Connects, tries every expert once, calls at each word.
pub fn run(calls: Calls, start: &Start) -> Result<(), Error> {
    let builder = Runtime::builder().client_mode().initial_peers([calls.peer.clone()]);
    let runtime = calls.way.set(builder).start()?;
    let client = runtime.as_ref();
    let mut experts = Vec::new();
    for uid in &calls.uids {
        let uid: &ExpertUid = &uid.parse().map_err(|error: skep_wire::UidError| Error::Invalid(error.to_string()))?;
        let found = RemoteExpert::find_wait(client, uid, client.deadline(CALL))?;
        experts.push(found.ok_or_else(|| Error::NoSuchExpert { uid: uid.clone() })?);
    }
    let info = experts.first().ok_or_else(|| Error::Invalid("no expert to call".to_owned()))?.info().clone();
    let inputs = tensors(info.flat_inputs().into_iter(), calls.rows, 1)?;
    let gradients = match calls.backward {
        true => Some(tensors(info.flat_outputs().into_iter(), calls.rows, 2)?),
        false => None,
    };
    let tokio = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let tokio = tokio.map_err(|source| Error::System { what: "cannot start tokio".to_owned(), source })?;
    let caller = Rc::new(Caller { experts, inputs, gradients });
    tokio.block_on(async {
        for expert in &caller.experts {
            caller.call(expert).await?;
        }
        Ok::<_, RpcError>(())
    })?;
    start.rounds(|| {
        let until = Instant::now() + Duration::from_secs_f64(calls.seconds);
        let local = tokio::task::LocalSet::new();
        let tasks: Vec<_> =
            (0..calls.at_once).map(|number| local.spawn_local(caller.clone().call_until(number, until))).collect();
        let mut all = Called::default();
        let mut latencies = Latencies::default();
        local.block_on(&tokio, async {
            for task in tasks {
                let ended = task.await.map_err(|error| Error::Invalid(format!("a caller ended: {error}")));
                let (called, times) = ended?;
                times.into_iter().for_each(|took| latencies.record(took));
                all.add(called);
            }
            Ok::<_, Error>(())
        })?;
        all.latency = latencies.recorded();
        Ok(all)
    })
}

impl Called {
    /// Counts calls that were made at the same time, but for their latencies.
    pub fn add(&mut self, other: Called) {
        self.calls += other.calls;
        self.failed += other.failed;
        self.rate += other.rate;
        self.failure = self.failure.take().or(other.failure);
    }
}

struct Caller {
    experts: Vec<RemoteExpert>,
    inputs: Vec<HostTensor>,
    gradients: Option<Vec<HostTensor>>,
}

impl Caller {
    async fn call(&self, expert: &RemoteExpert) -> Result<(), RpcError> {
        let deadline = expert.client().deadline(CALL);
        expert.forward(self.inputs.clone(), deadline).await?;
        if let Some(gradients) = &self.gradients {
            expert.backward(self.inputs.clone(), gradients.clone(), deadline).await?;
        }
        Ok(())
    }

    async fn call_until(self: Rc<Self>, number: usize, until: Instant) -> (Called, Vec<Duration>) {
        let (mut called, mut times) = (Called::default(), Vec::new());
        let begun = Instant::now();
        let mut last = begun;
        for turn in number.. {
            let started = Instant::now();
            if started >= until {
                break;
            }
            match self.call(&self.experts[turn % self.experts.len()]).await {
                Ok(()) => {
                    last = Instant::now();
                    times.push(last - started);
                    called.calls += 1;
                }
                Err(error) => {
                    called.failed += 1;
                    called.failure.get_or_insert_with(|| error.to_string());
                    // What fails at once must not keep the other callers from their turn.
                    tokio::task::yield_now().await;
                }
            }
        }
        if called.calls > 0 {
            called.rate = called.calls as f64 / (last - begun).as_secs_f64();
        }
        (called, times)
    }
}

/// Small numbers that fit descriptors, the same for the same seed.
pub fn tensors<'a>(
    descriptors: impl Iterator<Item = &'a TensorDescriptor>,
    rows: usize,
    seed: u32,
) -> Result<Vec<HostTensor>, Error> {
    let tensor = |descriptor: &TensorDescriptor| {
        let shape: Vec<usize> = descriptor.size.iter().map(|size| size.unwrap_or(rows)).collect();
        match descriptor.dtype.unwrap_or(DType::F32) {
            DType::F32 => HostTensor::from_f32(shape.clone(), &noise(shape.iter().product(), seed)),
            other => HostTensor::zeros(other, shape),
        }
    };
    descriptors.map(|descriptor| tensor(descriptor).map_err(|error| Error::Invalid(error.to_string()))).collect()
}

/// Numbers between -1 and 1 without a pattern (xorshift).
pub fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0) as f32
    };
    (0..count).map(|_| draw()).collect()
}
