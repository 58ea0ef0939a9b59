//! Synchronous calls work wherever a program's code runs, and fail at once where waiting for them could never end.

use std::{
    sync::{Arc, OnceLock},
    thread,
};

use actix::{Actor, Context, Handler, Message, System};
use skep::{
    RemoteExpert,
    expert::{Backend, BackendError, BackendFactory, Batch, Snapshot},
    prelude::*,
    rpc::RpcError,
    wire::{DType, ExpertInfo, HostTensor, TensorDescriptor},
};

const WIDTH: usize = 3;

/// Answers its input; when it has an expert to ask, asks it first.
struct Echo {
    info: ExpertInfo,
    asks: Arc<OnceLock<RemoteExpert>>,
}

impl Echo {
    fn factory(asks: Arc<OnceLock<RemoteExpert>>) -> BackendFactory {
        Box::new(move || {
            let tensor = TensorDescriptor::batched(DType::F32, &[WIDTH]);
            Ok(Box::new(Echo { info: ExpertInfo::simple(tensor.clone(), tensor), asks: asks.clone() }))
        })
    }
}

impl Backend for Echo {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn class(&self) -> &str {
        "echo"
    }

    fn parameter_count(&self) -> u64 {
        0
    }

    fn steps(&self) -> u64 {
        0
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        match self.asks.get() {
            Some(expert) => ask(expert).map_err(|error| BackendError::Failed(error.to_string())),
            None => Ok(batch.inputs.clone()),
        }
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        Ok(batch.grad_outputs.clone())
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        Ok(Snapshot::default())
    }

    fn load(&mut self, _: &Snapshot) -> Result<(), BackendError> {
        Ok(())
    }
}

fn input() -> Vec<HostTensor> {
    vec![HostTensor::from_f32([1, WIDTH], &[1.0, 2.0, 3.0]).expect("a row")]
}

/// One synchronous call.
fn ask(expert: &RemoteExpert) -> Result<Vec<HostTensor>, RpcError> {
    expert.forward_wait(input(), expert.client().deadline(secs(30)))
}

/// A server and a client in one process, with an expert that the client has found.
struct Hive {
    expert: RemoteExpert,
    /// What the expert asks itself, once it is set.
    asks: Arc<OnceLock<RemoteExpert>>,
    // Dropped in this order: the client leaves first.
    _client: Runtime,
    _server: Runtime,
}

impl Hive {
    fn start() -> Self {
        let asks = Arc::new(OnceLock::new());
        let experts = Experts::uids(["echo.0".parse().expect("a uid")]);
        let experts = experts.backend({
            let asks = asks.clone();
            move |_| Echo::factory(asks.clone())
        });
        let server = Runtime::builder().host(experts).start().expect("a server starts");
        let client = Runtime::client(server.addresses()).expect("a client joins");
        let deadline = client.as_ref().deadline(secs(30));
        let found = RemoteExpert::find_wait(client.as_ref(), &"echo.0".parse().expect("a uid"), deadline);
        Self { expert: found.expect("a search").expect("it is announced"), asks, _client: client, _server: server }
    }
}

#[test]
fn a_plain_thread_may_wait() {
    let hive = Hive::start();
    let answer = thread::scope(|scope| scope.spawn(|| ask(&hive.expert)).join().expect("no panic"));
    assert_eq!(answer, Ok(input()));
}

#[test]
fn a_tokio_worker_may_wait() {
    let hive = Hive::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("a runtime");
    let expert = hive.expert.clone();
    let answer = runtime.block_on(async { tokio::spawn(async move { ask(&expert) }).await.expect("no panic") });
    assert_eq!(answer, Ok(input()));
}

#[test]
fn a_current_thread_runtime_may_wait_though_nothing_else_runs_on_it_meanwhile() {
    let hive = Hive::start();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    assert_eq!(runtime.block_on(async { ask(&hive.expert) }), Ok(input()));
}

/// An actor of the program.
struct Asker(RemoteExpert);

impl Actor for Asker {
    type Context = Context<Self>;
}

struct Ask;

impl Message for Ask {
    type Result = Result<Vec<HostTensor>, RpcError>;
}

impl Handler<Ask> for Asker {
    type Result = Result<Vec<HostTensor>, RpcError>;

    fn handle(&mut self, _: Ask, _: &mut Self::Context) -> Self::Result {
        ask(&self.0)
    }
}

#[test]
fn an_actix_handler_may_wait() {
    let hive = Hive::start();
    let asker = Asker(hive.expert.clone());
    let answer = System::new().block_on(async { asker.start().send(Ask).await.expect("the actor lives") });
    assert_eq!(answer, Ok(input()));
}

#[test]
fn the_thread_of_skeps_actors_is_told_that_it_would_wait_for_itself() {
    let hive = Hive::start();
    let (done, answer) = std::sync::mpsc::sync_channel(1);
    let expert = hive.expert.clone();
    assert!(hive.expert.client().spawner.spawn(async move { done.send(ask(&expert)).expect("the test waits") }));
    assert_eq!(answer.recv_timeout(secs(30)).expect("an answer at once"), Err(RpcError::WouldDeadlock));
}

#[test]
fn an_executor_is_told_that_it_would_wait_for_itself() {
    let hive = Hive::start();
    assert!(hive.asks.set(hive.expert.clone()).is_ok());
    match ask(&hive.expert) {
        Err(RpcError::Remote { text, .. }) => assert!(text.contains(&RpcError::WouldDeadlock.to_string()), "{text}"),
        other => panic!("the expert's own call went through: {other:?}"),
    }
}
