//! After `tune`, an operation runs on the thread that asked for it and on no other. Alone in its process, which it tunes.
#![cfg(target_os = "linux")]

use std::{fs, sync::Arc, time::Duration};

use skep_expert::{HostedExpert, Kind, Server, ServerConfig, ServerParts};
use skep_kernel::{Deadline, SharedClock, Spawner, TokioClock};
use skep_rpc::Router;
use skep_torch::{
    Adam, Ffn, OptimizerSpec, Sgd, factory,
    process::{Tuning, tune},
    tch::Device,
};
use skep_wire::HostTensor;

const EXECUTORS: usize = 2;
/// Enough for torch to share out each of the operations, if it may.
const ROWS: usize = 512;
const WIDTH: usize = 256;

/// Threads of this process that are called so. OpenMP's have the name of the thread that asked for them.
fn threads_called(prefix: &str) -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with(prefix)).count()
}

#[test]
fn an_executor_computes_on_its_own_thread_only() {
    tune(&Tuning::default()).unwrap();
    let optimizers: [OptimizerSpec; 2] = [Sgd::lr(0.01).into(), Adam::lr(0.01).into()];
    let hosted = optimizers.into_iter().enumerate().map(|(number, optimizer)| HostedExpert {
        uid: format!("wide.{number}").parse().unwrap(),
        factory: factory(Ffn::hidden(WIDTH), optimizer.clip_grad_norm(1.0), Device::Cpu, 1),
    });
    actix_rt::System::new().block_on(async {
        let clock: SharedClock = Arc::new(TokioClock::system());
        let deadline = Deadline::after(clock.now(), Duration::from_secs(60));
        let parts = ServerParts {
            clock,
            spawner: Spawner::arbiter(actix_rt::Arbiter::current()),
            dht: None,
            router: Router::new(),
            seed: 1,
            checkpoints: None,
            config: ServerConfig { executors: EXECUTORS, ..ServerConfig::default() },
        };
        let server = Server::new(parts, hosted.collect()).unwrap();
        server.ready(deadline).await.unwrap();
        let rows = || HostTensor::from_f32([ROWS, WIDTH], &vec![0.5; ROWS * WIDTH]).unwrap();
        let mut answers = Vec::new();
        for uid in ["wide.0", "wide.1"] {
            let expert = server.expert(&uid.parse().unwrap()).unwrap();
            answers.push(expert.submit(Kind::Forward, vec![rows()], deadline).unwrap());
            answers.push(expert.submit(Kind::Backward, vec![rows(), rows()], deadline).unwrap());
        }
        for answer in answers {
            answer.answer().await.unwrap();
        }
        assert_eq!(threads_called("skep-exec-cpu"), EXECUTORS);
        server.stop(deadline).await.unwrap();
    });
}
