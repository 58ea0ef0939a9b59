//! A fan-out against one that Python hivemind 1.1.12 made: who is chosen, which rows reach whom, what is joined.

mod common;

use std::{collections::BTreeMap, sync::Arc};

use base64::Engine;
use common::*;
use serde_json::Value;
use skep_expert::{Backend, BackendError, Batch, Executors, HostedExpert, Server, ServerParts, Snapshot};
use skep_kernel::Deadline;
use skep_moe::{GridScores, Mixture, MoeConfig};
use skep_testkit::Sim;
use skep_wire::{DType, ExpertInfo, HostTensor, TensorDescriptor};

fn tensor(value: &Value) -> HostTensor {
    let shape: Vec<usize> = serde_json::from_value(value["shape"].clone()).unwrap();
    let data = base64::engine::general_purpose::STANDARD.decode(value["b64"].as_str().unwrap()).unwrap();
    HostTensor::new(DType::F32, shape, data.into()).unwrap()
}

/// Answers each row with what the expert of that name answered it in the recording.
#[derive(Clone)]
struct Replay {
    info: ExpertInfo,
    answers: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Backend for Replay {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn class(&self) -> &str {
        "replay"
    }

    fn parameter_count(&self) -> u64 {
        0
    }

    fn steps(&self) -> u64 {
        0
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        let input = &batch.inputs[0];
        let mut data = Vec::new();
        for row in input.data().chunks(input.row_bytes()) {
            let answer = self.answers.get(row);
            data.extend(answer.ok_or_else(|| BackendError::Invalid("a row of another expert".to_owned()))?);
        }
        Ok(vec![HostTensor::new(DType::F32, input.shape(), data.into()).unwrap()])
    }

    fn backward(&mut self, _batch: &Batch) -> Result<Vec<HostTensor>, BackendError> {
        Err(BackendError::Failed("not recorded".to_owned()))
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        Ok(Snapshot::default())
    }

    fn load(&mut self, _snapshot: &Snapshot) -> Result<(), BackendError> {
        Ok(())
    }
}

fn uids(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|uid| uid.as_str().unwrap()).collect()
}

#[test]
fn recorded_mixtures_choose_route_and_join_alike() {
    let file: Value = serde_json::from_str(include_str!("vectors/mixture.json")).unwrap();
    for case in file["cases"].as_array().unwrap() {
        Sim::with_seed(1).run(|sim| async move { replay(&sim, case).await });
    }
}

async fn replay(sim: &Sim, case: &Value) {
    let x = tensor(&case["x"]);
    let expected: Vec<Vec<&str>> = case["chosen"].as_array().unwrap().iter().map(uids).collect();
    let descriptor = TensorDescriptor::batched(DType::F32, &x.shape()[1..]);
    let info = ExpertInfo::simple(descriptor.clone(), descriptor.with_grad());
    let mut experts: BTreeMap<&str, Replay> = uids(&case["alive"])
        .into_iter()
        .map(|uid| (uid, Replay { info: info.clone(), answers: BTreeMap::new() }))
        .collect();
    for (row, names) in expected.iter().enumerate() {
        for (rank, name) in names.iter().enumerate() {
            let output = tensor(&case["expert_outputs_per_sample"][row][rank]);
            let input = x.slice_rows(row, row + 1).unwrap();
            experts.get_mut(name).unwrap().answers.insert(input.data().to_vec(), output.data().to_vec());
        }
    }

    // A hive whose only server hosts the recorded experts.
    let hive = sim.servers(0).start().await;
    let client = sim.client(&hive).await;
    let router = skep_rpc::Router::new();
    let dht = sim.dht_beside(&hive, router.clone());
    let ending = dht.clone();
    sim.at_end(async move { ending.stop().await });
    let hosted = experts.into_iter().map(|(uid, replay)| HostedExpert {
        uid: uid.parse().unwrap(),
        factory: Box::new(move || Ok(Box::new(replay.clone()) as Box<dyn Backend>)),
    });
    let parts = ServerParts {
        clock: sim.clock(),
        spawner: sim.spawner(),
        dht: Some(dht),
        router,
        seed: sim.seed(),
        checkpoints: None,
        config: skep_expert::ServerConfig::default(),
    };
    let cost = Arc::new(|_: &_, _, _| millis(0));
    let server = Server::with_executors(parts, hosted.collect(), Executors::Inline { cost }).unwrap();
    let (ending, clock) = (server.clone(), sim.clock());
    sim.at_end(async move {
        ending.stop(Deadline::after(clock.now(), millis(10_000))).await.unwrap();
    });
    server.ready(within(sim, millis(60_000))).await.unwrap();

    let k = case["k_best"].as_u64().unwrap() as usize;
    let grid: Vec<usize> = serde_json::from_value(case["grid_size"].clone()).unwrap();
    let moe = Mixture::new(&client, MoeConfig::grid(case["prefix"].as_str().unwrap(), grid.clone()).k_best(k)).unwrap();
    let dimensions = grid.iter().zip(case["grid_scores"].as_array().unwrap());
    let dimensions = dimensions.map(|(size, scores)| (*size, tensor(scores).to_f32().unwrap()));
    let scores = GridScores { rows: x.rows(), dimensions: dimensions.collect() };
    let gather = moe.forward(vec![x.clone()], scores.clone()).await.unwrap();
    assert_eq!(chosen(&gather), expected);
    assert!(gather.mask.iter().all(|answered| *answered) && gather.failures.is_empty());

    let outputs = gather.outputs[0].to_f32().unwrap();
    let width = x.shape()[1];
    let mixed: Vec<f64> =
        (0..x.rows()).flat_map(|row| mix(&scores, &gather.chosen[row], row, &outputs, width)).collect();
    for (got, want) in mixed.iter().zip(tensor(&case["output"]).to_f32().unwrap()) {
        assert!((got - f64::from(want)).abs() < 1e-5, "{got} {want}");
    }
}

/// docs/wire.md §10.2: softmax of the experts' scores over those that answered.
fn mix(scores: &GridScores, chosen: &[skep_moe::Chosen], row: usize, outputs: &[f32], width: usize) -> Vec<f64> {
    let score = |chosen: &skep_moe::Chosen| {
        let parts = chosen.coordinates.iter().zip(&scores.dimensions);
        parts.map(|(c, (size, values))| f64::from(values[row * size + c])).sum::<f64>().exp()
    };
    let weights: Vec<f64> = chosen.iter().map(score).collect();
    let total: f64 = weights.iter().sum();
    let k = chosen.len();
    let column = |c| (0..k).map(|rank| weights[rank] / total * f64::from(outputs[(row * k + rank) * width + c])).sum();
    (0..width).map(column).collect()
}
