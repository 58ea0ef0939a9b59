//! What the scenarios share: a backend made of closures and a server under virtual time.
#![allow(dead_code, reason = "each scenario uses its own part")]

pub mod calls;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use skep_expert::{
    Accepted, Backend, BackendError, Batch, Executors, ExpertHandle, HostedExpert, Kind, Server, ServerConfig,
    ServerParts, Snapshot, TaskResult,
};
use skep_kernel::{Deadline, SharedClock, Spawner, TokioClock};
use skep_rpc::Router;
use skep_testkit::Sim;
use skep_wire::{DType, ExpertInfo, HostTensor, TensorDescriptor};

type Script = Box<dyn FnMut(&Batch) -> Result<Vec<HostTensor>, BackendError> + Send>;

/// Runs a test under real time, for servers whose executors are real threads.
pub fn in_real_time<R, F>(config: ServerConfig, test: impl FnOnce(ServerParts, SharedClock) -> F) -> R
where
    F: Future<Output = R>,
{
    actix_rt::System::new().block_on(async {
        let clock: SharedClock = Arc::new(TokioClock::system());
        let parts = ServerParts {
            clock: clock.clone(),
            spawner: Spawner::arbiter(actix_rt::Arbiter::current()),
            dht: None,
            router: Router::new(),
            seed: 1,
            checkpoints: None,
            config,
        };
        test(parts, clock).await
    })
}

/// Runs closures; lists what it was given.
pub struct Closures {
    info: ExpertInfo,
    steps: u64,
    forward: Script,
    backward: Script,
    log: Log,
}

/// Kind and rows of each batch, in order.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<(Kind, u32)>>>);

impl Log {
    pub fn batches(&self) -> Vec<(Kind, u32)> {
        self.0.lock().unwrap().clone()
    }
}

impl Closures {
    /// Echoes inputs and gradients of any width.
    pub fn echo() -> Self {
        let side = TensorDescriptor { size: vec![None, None], ..TensorDescriptor::batched(DType::F32, &[]) };
        Self {
            info: ExpertInfo::simple(side.clone(), side.with_grad()),
            steps: 0,
            forward: Box::new(|batch| Ok(batch.inputs.clone())),
            backward: Box::new(|batch| Ok(batch.grad_outputs.clone())),
            log: Log::default(),
        }
    }

    pub fn on_forward(
        mut self,
        script: impl FnMut(&Batch) -> Result<Vec<HostTensor>, BackendError> + Send + 'static,
    ) -> Self {
        self.forward = Box::new(script);
        self
    }

    pub fn on_backward(
        mut self,
        script: impl FnMut(&Batch) -> Result<Vec<HostTensor>, BackendError> + Send + 'static,
    ) -> Self {
        self.backward = Box::new(script);
        self
    }

    pub fn with_info(mut self, info: ExpertInfo) -> Self {
        self.info = info;
        self
    }

    pub fn logging_to(mut self, log: &Log) -> Self {
        self.log = log.clone();
        self
    }

    /// Hosts it once under a name.
    pub fn hosted(self, uid: &str) -> HostedExpert {
        let mut backend = Some(self);
        let factory = move || match backend.take() {
            Some(backend) => Ok(Box::new(backend) as Box<dyn Backend>),
            None => Err(BackendError::Failed("made only once".to_owned())),
        };
        HostedExpert { uid: uid.parse().unwrap(), factory: Box::new(factory) }
    }
}

impl Backend for Closures {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn class(&self) -> &str {
        "closures"
    }

    fn parameter_count(&self) -> u64 {
        0
    }

    fn steps(&self) -> u64 {
        self.steps
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.log.0.lock().unwrap().push((Kind::Forward, batch.rows.0));
        (self.forward)(batch)
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        self.log.0.lock().unwrap().push((Kind::Backward, batch.rows.0));
        let gradients = (self.backward)(batch)?;
        self.steps += 1;
        Ok(gradients)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        Ok(Snapshot { step: self.steps, tensors: Vec::new() })
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        self.steps = snapshot.step;
        Ok(())
    }
}

pub fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Rows of a width, all of one value.
pub fn rows(n: usize, width: usize, value: f32) -> HostTensor {
    HostTensor::from_f32([n, width], &vec![value; n * width]).unwrap()
}

/// Whether any value of a batch equals `bad`.
pub fn contains(batch: &Batch, bad: f32) -> bool {
    batch.inputs.iter().any(|tensor| tensor.to_f32().unwrap().contains(&bad))
}

/// A server with one inline executor whose batches cost 10 ms.
pub fn server_parts(sim: &Sim, config: ServerConfig) -> ServerParts {
    ServerParts {
        clock: sim.clock(),
        spawner: sim.spawner(),
        dht: None,
        router: Router::new(),
        seed: sim.seed(),
        checkpoints: None,
        config: ServerConfig { executors: 1, ..config },
    }
}

pub async fn start(sim: &Sim, config: ServerConfig, experts: Vec<HostedExpert>) -> Server {
    start_parts(sim, server_parts(sim, config), experts).await
}

pub async fn start_parts(sim: &Sim, parts: ServerParts, experts: Vec<HostedExpert>) -> Server {
    let cost = Arc::new(|_uid: &_, _kind, _rows| millis(10));
    let server = Server::with_executors(parts, experts, Executors::Inline { cost }).unwrap();
    stop_at_end(sim, &server);
    server.ready(within(sim, 1000)).await.unwrap();
    server
}

/// Nothing is left of the server when the test is over.
pub fn stop_at_end(sim: &Sim, server: &Server) {
    let (server, clock) = (server.clone(), sim.clock());
    sim.at_end(async move {
        // Some tests have stopped it themselves.
        let _stopped = server.stop(Deadline::after(clock.now(), Duration::from_secs(10))).await;
    });
}

pub fn within(sim: &Sim, ms: u64) -> Deadline {
    Deadline::after(sim.now(), millis(ms))
}

pub fn expert(server: &Server, uid: &str) -> ExpertHandle {
    server.expert(&uid.parse().unwrap()).expect("the expert is hosted")
}

/// Keeps the only executor busy with a batch, so that what follows queues up.
pub fn occupy(sim: &Sim, expert: &ExpertHandle) -> Accepted {
    expert.submit(Kind::Forward, vec![rows(1, 2, 0.0)], within(sim, 60_000)).unwrap()
}

/// Answers of several tasks, in order.
pub async fn answers(tasks: impl IntoIterator<Item = Accepted>) -> Vec<TaskResult> {
    futures::future::join_all(tasks.into_iter().map(Accepted::answer)).await
}
