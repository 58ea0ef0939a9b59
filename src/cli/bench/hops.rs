//! `skep bench hops`: where the time of one small call goes, by time stamps at the seams between the rooms.
//!
//! Client and server are in one process, so that the stamps are of one clock; they are two networks all the same, and
//! connected over loopback like two processes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use futures::future::BoxFuture;
use libp2p_identity::{Keypair, PeerId};
use serde_json::json;
use skep_expert::{
    Backend, BackendError, BackendFactory, Batch, HostedExpert, Server, ServerConfig, ServerParts, Snapshot,
};
use skep_kernel::{Deadline, SharedClock, Spawner, TokioClock};
use skep_net::{Net, NetConfig, probe};
use skep_rpc::{
    Answer, Body, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, Service, TensorBody, Transport,
};
use skep_torch::{ModuleSpec, OptimizerSpec, tch::Device};
use skep_wire::{Compression, ExpertInfo, HostTensor, Method, compress};

use super::{
    caller::noise,
    latency::{Latencies, Summary},
    machine::Machine,
    network::echo,
    report::{microseconds, print, seconds},
};
use crate::{cli::Failure, error::Error};

const WIDTH: usize = 64;
const UID: &str = "bench.0";
/// Longest wait for anything.
const WAIT: Duration = Duration::from_secs(60);
/// Calls before those that count.
const WARM: u32 = 200;

const EXAMPLES: &str = "\
Examples:
  skep bench hops
  skep bench hops --seconds 10 --json

Calls of one row to an expert that returns its input, one after the other. Beside them, in turn with them: as many bytes \
over bare TLS and back, and a word from thread to thread and back.";

/// Options of `skep bench hops`.
#[derive(Debug, Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Hops {
    /// Seconds for each of the three
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Parts of a call, in order, by what ends them.
const HOPS: [&str; 5] = [
    "caller to the server's service",
    "service to the executor",
    "the executor computes",
    "executor to the service",
    "service to the caller",
];

/// When the call under way passed each seam, in nanoseconds since `base`.
struct Stamps {
    base: Instant,
    at: [AtomicU64; 4],
}

impl Stamps {
    fn stamp(&self, seam: usize) {
        self.at[seam].store(self.now(), Ordering::Release);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn seam(&self, seam: usize) -> u64 {
        self.at[seam].load(Ordering::Acquire)
    }
}

/// Stamps calls before and after they are served.
struct StampedService {
    inner: Router,
    stamps: Arc<Stamps>,
}

impl Service for StampedService {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        self.stamps.stamp(0);
        let (serving, stamps) = (self.inner.serve(inbound), self.stamps.clone());
        Box::pin(async move {
            let answer = serving.await;
            stamps.stamp(3);
            answer
        })
    }
}

/// Stamps batches before and after they are computed.
struct StampedBackend {
    inner: Box<dyn Backend>,
    stamps: Arc<Stamps>,
}

impl Backend for StampedBackend {
    fn info(&self) -> &ExpertInfo {
        self.inner.info()
    }

    fn class(&self) -> &str {
        self.inner.class()
    }

    fn parameter_count(&self) -> u64 {
        self.inner.parameter_count()
    }

    fn steps(&self) -> u64 {
        self.inner.steps()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.stamps.stamp(1);
        let outputs = self.inner.forward(batch);
        self.stamps.stamp(2);
        outputs
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.inner.backward(batch)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        self.inner.save()
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        self.inner.load(snapshot)
    }
}

/// What was measured.
#[derive(Default)]
struct Measured {
    call: Latencies,
    hops: [Latencies; 5],
    tls: Latencies,
    threads: Latencies,
}

impl Hops {
    pub fn run(self) -> Result<(), Failure> {
        let lasting = seconds("--seconds", self.seconds)?;
        let measured = actix_rt::System::new().block_on(measure(lasting))?;
        let summaries = measured.hops.each_ref().map(Latencies::summary);
        let (call, tls, threads) = (measured.call.summary(), measured.tls.summary(), measured.threads.summary());
        let report = json!({
            "benchmark": "hops",
            "version": env!("CARGO_PKG_VERSION"),
            "machine": Machine::here(),
            "seconds": self.seconds,
            "call_us": call,
            "hops_us": HOPS.iter().copied().zip(&summaries).collect::<std::collections::BTreeMap<_, _>>(),
            "tls_us": tls,
            "threads_us": threads,
        });
        print(self.json, &report, || {
            let rows = HOPS.iter().copied().zip(&summaries);
            let beside = [("bare TLS and back", &tls), ("thread to thread and back", &threads)];
            rows.chain([("the whole call", &call)]).chain(beside).map(line).collect::<Vec<_>>().join("\n")
        });
        Ok(())
    }
}

fn line((name, times): (&str, &Summary)) -> String {
    format!("{name:32} p50 {:>9}  p99 {:>9}", microseconds(times.p50), microseconds(times.p99))
}

/// Starts both sides, lets a thread of its own call.
async fn measure(lasting: Duration) -> Result<Measured, Error> {
    let system = |source| Error::System { what: "cannot start the benchmark".to_owned(), source };
    let clock: SharedClock = Arc::new(TokioClock::system());
    let stamps = Arc::new(Stamps { base: Instant::now(), at: Default::default() });
    let (served, outside) = (Router::new(), Router::new());
    let parts = ServerParts {
        clock: clock.clone(),
        spawner: Spawner::arbiter(actix_rt::Arbiter::current()),
        dht: None,
        router: served.clone(),
        seed: 1,
        checkpoints: None,
        config: ServerConfig::default(),
    };
    let uid = UID.parse().expect("a constant name");
    let failed = |error: &dyn std::fmt::Display| Error::Invalid(error.to_string());
    let server = Server::new(parts, vec![HostedExpert { uid, factory: nop(stamps.clone()) }]);
    let server = server.map_err(|error| failed(&error))?;
    let deadline = Deadline::after(clock.now(), WAIT);
    server.ready(deadline).await.map_err(|error| failed(&error))?;
    outside.route(&[Method::Forward], Arc::new(StampedService { inner: served, stamps: stamps.clone() }));
    let far = Net::start(NetConfig::default(), Keypair::generate_ed25519(), outside, clock.clone());
    let far = far.map_err(|error| failed(&error))?;
    let near = Net::start(NetConfig::client(), Keypair::generate_ed25519(), Router::new(), clock.clone());
    let near = near.map_err(|error| failed(&error))?;
    near.add_addresses(far.local_peer(), far.addresses());
    let (peer, calling) = (far.local_peer(), clock.clone());
    let (done, outcome) = tokio::sync::oneshot::channel();
    let calls = move || {
        // The other side gave up.
        let _nobody_waits = done.send(call_from_here(&near, peer, &calling, &stamps, lasting));
    };
    let caller = thread::Builder::new().name("bench-caller".to_owned()).spawn(calls).map_err(system)?;
    let measured = outcome.await.map_err(|_| Error::Invalid("the caller panicked".to_owned()))?;
    caller.join().map_err(|_| Error::Invalid("the caller panicked".to_owned()))?;
    server.stop(Deadline::after(clock.now(), WAIT)).await.map_err(|error| failed(&error))?;
    far.shutdown(Deadline::after(clock.now(), WAIT)).await;
    measured
}

fn nop(stamps: Arc<Stamps>) -> BackendFactory {
    Box::new(move || {
        let module = ModuleSpec::named("nop", WIDTH).map_err(|error| BackendError::Failed(error.to_string()))?;
        let inner = skep_torch::factory(module, OptimizerSpec::none(), Device::Cpu, 1)()?;
        Ok(Box::new(StampedBackend { inner, stamps: stamps.clone() }))
    })
}

/// Calls, bare TLS and bare threads in turn.
fn call_from_here(
    net: &Net,
    peer: PeerId,
    clock: &SharedClock,
    stamps: &Stamps,
    lasting: Duration,
) -> Result<Measured, Error> {
    const ROUNDS: u32 = 4;
    let system = |source| Error::System { what: "cannot start tokio".to_owned(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(system)?;
    let input = HostTensor::from_f32([1, WIDTH], &noise(WIDTH, 1)).map_err(|e| Error::Invalid(e.to_string()))?;
    let input = compress(&input, Compression::None).map_err(|error| Error::Invalid(error.to_string()))?;
    let mut number = 0;
    let mut call = || -> Result<[u64; 6], RpcError> {
        number += 1;
        let body = Body::Tensors(TensorBody { uid: UID.to_owned(), tensors: vec![input.clone()] });
        let deadline = Deadline::after(clock.now(), WAIT);
        let meta = Meta { deadline, request_id: RequestId(number), trace: None };
        let begun = stamps.now();
        runtime.block_on(net.call(Call { peer, method: Method::Forward, body, meta }))?;
        let ended = stamps.now();
        Ok([begun, stamps.seam(0), stamps.seam(1), stamps.seam(2), stamps.seam(3), ended])
    };
    for _ in 0..WARM {
        call()?;
    }
    let mut measured = Measured::default();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        while begun.elapsed() < lasting / ROUNDS {
            let times = call()?;
            for (hop, ends) in measured.hops.iter_mut().zip(times.windows(2)) {
                hop.record(Duration::from_nanos(ends[1].saturating_sub(ends[0])));
            }
            measured.call.record(Duration::from_nanos(times[5] - times[0]));
        }
        let failed = |source| Error::System { what: "a bare stream".to_owned(), source };
        let (near, far) = probe::tls_pair().map_err(failed)?;
        echo(near, far, WIDTH * 4, lasting / ROUNDS, &mut measured.tls).map_err(failed)?;
        words(lasting / ROUNDS, &mut measured.threads).map_err(failed)?;
    }
    Ok(measured)
}

/// A word to another thread and back, over and over, both blocking.
fn words(lasting: Duration, times: &mut Latencies) -> std::io::Result<()> {
    let (ask, asked) = std::sync::mpsc::sync_channel::<()>(1);
    let (answer, answered) = std::sync::mpsc::sync_channel::<()>(1);
    let other = thread::Builder::new()
        .name("bench-echo".to_owned())
        .spawn(move || while asked.recv().is_ok_and(|()| answer.send(()).is_ok()) {})?;
    let begun = Instant::now();
    while begun.elapsed() < lasting {
        let started = Instant::now();
        if ask.send(()).and_then(|()| answered.recv().map_err(|_| std::sync::mpsc::SendError(()))).is_err() {
            break;
        }
        times.record(started.elapsed());
    }
    drop(ask);
    other.join().map_err(|_| std::io::Error::other("the other thread panicked"))
}
