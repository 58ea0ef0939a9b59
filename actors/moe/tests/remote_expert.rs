//! One expert of another process: found, described, called, trained.

mod common;

use std::sync::Arc;

use common::*;
use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_kernel::time::before;
use skep_moe::{Client, RemoteExpert};
use skep_rpc::{Answer, Body, Call, RpcError, SharedTransport, Step, Transport};
use skep_testkit::{Latency, ScriptedBackend, Sim, Wire};
use skep_wire::{HostTensor, Method, proto::MAX_FIELDS};

#[test]
fn an_expert_is_found_by_its_name_and_answers_with_its_schema() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(2).experts(["expert.1", "expert.4"]).start().await;
        let client = sim.client(&hive).await;
        let expert = RemoteExpert::find(&client, &"expert.4".parse().unwrap(), within(&sim, millis(5000))).await;
        let expert = expert.unwrap().expect("it is announced");
        assert_eq!(expert.peer(), hive.hosting("expert.4").peer());
        assert_eq!(expert.info().flat_inputs()[0].size, [None, Some(WIDTH)]);
        let outputs = expert.forward(vec![rows(3)], within(&sim, millis(1000))).await.unwrap();
        let doubled: Vec<f32> = rows(3).to_f32().unwrap().iter().map(|v| v * 2.0).collect();
        assert_eq!(outputs[0].to_f32().unwrap(), doubled);
        assert!(
            RemoteExpert::find(&client, &"expert.2".parse().unwrap(), within(&sim, millis(9000)))
                .await
                .unwrap()
                .is_none()
        );
    });
}

#[test]
fn backward_trains_the_expert_and_returns_input_gradients() {
    Sim::with_seed(2).run(|sim| async move {
        let hive = sim
            .servers(1)
            .experts(["expert.0"])
            .backend(ScriptedBackend::affine(3.0, 0.1).of_width(WIDTH))
            .start()
            .await;
        let client = sim.client(&hive).await;
        let expert = RemoteExpert::find(&client, &"expert.0".parse().unwrap(), within(&sim, millis(5000))).await;
        let expert = expert.unwrap().unwrap();
        let gradient = filled(&[2, WIDTH], 1.0);
        let answer = expert.backward(vec![filled(&[2, WIDTH], 0.5)], vec![gradient], within(&sim, millis(1000))).await;
        assert_eq!(answer.unwrap()[0], filled(&[2, WIDTH], 3.0));
        assert_eq!(hive.steps("expert.0"), 1);
        let outputs = expert.forward(vec![filled(&[1, WIDTH], 1.0)], within(&sim, millis(1000))).await.unwrap();
        // weight -= 0.1 · Σ 0.5 · 1 over 8 values
        assert_eq!(outputs[0], filled(&[1, WIDTH], 2.6));
    });
}

/// Adds a field that nobody knows to every schema, so many times.
struct Padding(SharedTransport, usize);

impl Transport for Padding {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let (answering, fields) = (self.0.call(call), self.1);
        Box::pin(async move {
            let answer = answering.await?;
            let body = match answer.body {
                Body::Message(schema) => Body::Message([&schema[..], &[0x78, 0].repeat(fields)].concat().into()),
                tensors @ Body::Tensors(_) => tensors,
            };
            Ok(Answer { body, ..answer })
        })
    }

    fn local_peer(&self) -> PeerId {
        self.0.local_peer()
    }

    fn addresses(&self) -> Vec<multiaddr::Multiaddr> {
        self.0.addresses()
    }

    fn add_addresses(&self, peer: PeerId, addresses: Vec<multiaddr::Multiaddr>) {
        self.0.add_addresses(peer, addresses);
    }
}

#[test]
fn a_schema_of_too_many_fields_is_malformed() {
    Sim::with_seed(5).run(|sim| async move {
        let hive = sim.servers(1).experts(["expert.0"]).start().await;
        let client = sim.client(&hive).await;
        let peer = hive.servers()[0].peer();
        let described = async |fields: usize| {
            let transport = Arc::new(Padding(client.transport.clone(), fields));
            let client = Client { transport, ..client.clone() };
            RemoteExpert::at(&client, "expert.0".parse().unwrap(), peer, within(&sim, millis(1000))).await.map(drop)
        };
        assert_eq!(described(MAX_FIELDS - 1).await, Ok(()));
        let Err(RpcError::Malformed { reason, .. }) = described(MAX_FIELDS).await else { panic!("it is refused") };
        assert!(reason.contains("more than 131072 fields"), "{reason}");
    });
}

#[test]
fn a_large_batch_is_cut_into_calls_and_joined_in_order() {
    Sim::with_seed(3).run(|sim| async move {
        let hive = sim.servers(1).experts(["expert.0"]).start().await;
        let client = sim.client(&hive).await;
        let (uid, peer) = ("expert.0".parse().unwrap(), hive.servers()[0].peer());
        let expert = RemoteExpert::at(&client, uid, peer, within(&sim, millis(1000))).await.unwrap();
        let outputs = expert.forward(vec![rows(5000)], within(&sim, millis(5000))).await.unwrap();
        assert_eq!(outputs[0].shape(), [5000, WIDTH]);
        let doubled: Vec<f32> = rows(5000).to_f32().unwrap().iter().map(|v| v * 2.0).collect();
        assert_eq!(outputs[0].to_f32().unwrap(), doubled);
        assert_eq!(sim.network().delivered(Method::Forward), 3);
        expert.backward(vec![rows(5000)], vec![rows(5000)], within(&sim, millis(5000))).await.unwrap();
        assert_eq!(hive.steps("expert.0"), 3);
    });
}

#[test]
fn calls_that_make_no_sense_are_never_sent() {
    Sim::with_seed(4).run(|sim| async move {
        let hive = sim.servers(1).experts(["expert.0"]).start().await;
        let client = sim.client(&hive).await;
        let (uid, peer) = ("expert.0".parse().unwrap(), hive.servers()[0].peer());
        let expert = RemoteExpert::at(&client, uid, peer, within(&sim, millis(1000))).await.unwrap();
        let deadline = within(&sim, millis(1000));
        let too_many = expert.forward(vec![rows(1), rows(1)], deadline).await;
        let nothing =
            expert.forward(vec![HostTensor::zeros(skep_wire::DType::F32, [0, WIDTH]).unwrap()], deadline).await;
        let uneven = expert.backward(vec![rows(2)], vec![rows(1)], deadline).await;
        for refused in [too_many, nothing, uneven] {
            assert!(
                matches!(&refused, Err(RpcError::Invalid { reason }) if reason.contains("expert.0")),
                "{refused:?}"
            );
        }
        assert_eq!(sim.network().delivered(Method::Forward) + sim.network().delivered(Method::Backward), 0);
    });
}

#[test]
fn a_refusal_is_readable_and_the_expert_answers_afterwards() {
    for wire in [Wire::Native, Wire::Hivemind] {
        Sim::with_seed(5).run(|sim| async move {
            sim.network().wire(wire);
            let hive = sim.servers(1).experts(["expert.0"]).start().await;
            let client = sim.client(&hive).await;
            let (uid, peer) = ("expert.0".parse().unwrap(), hive.servers()[0].peer());
            let expert = RemoteExpert::at(&client, uid, peer, within(&sim, millis(1000))).await.unwrap();
            let wide = expert.forward(vec![filled(&[1, WIDTH + 1], 1.0)], within(&sim, millis(1000))).await;
            assert!(matches!(&wide, Err(RpcError::Remote { text }) if text.contains('5')), "{wide:?}");
            assert!(expert.forward(vec![rows(1)], within(&sim, millis(1000))).await.is_ok());
            let missing =
                RemoteExpert::at(&client, "expert.9".parse().unwrap(), peer, within(&sim, millis(1000))).await;
            let text = missing.err().expect("nobody of that name").to_string();
            assert!(text.contains("KeyError('expert.9')"), "{text}");
        });
    }
}

#[test]
fn deadlines_end_calls_and_dropped_calls_cost_nothing_more() {
    Sim::with_seed(6).run(|sim| async move {
        let hive = sim.servers(1).experts(["expert.0"]).start().await;
        let client = sim.client(&hive).await;
        let (uid, peer) = ("expert.0".parse().unwrap(), hive.servers()[0].peer());
        let expert = RemoteExpert::at(&client, uid, peer, within(&sim, millis(1000))).await.unwrap();
        sim.network().freeze(peer);
        let start = sim.now();
        let late = expert.forward(vec![rows(1)], within(&sim, millis(250))).await;
        assert!(matches!(late, Err(RpcError::Deadline { waited, .. }) if waited == millis(250)), "{late:?}");
        assert_eq!(sim.now() - start, millis(250));
        sim.network().refuse(peer);
        let gone = expert.forward(vec![rows(1)], within(&sim, millis(250))).await;
        assert!(matches!(gone, Err(RpcError::Unreachable { step: Step::Dial, .. })), "{gone:?}");

        sim.network().restore(peer);
        sim.network().latency(Latency::constant(millis(50)));
        let forward = expert.forward(vec![rows(1)], within(&sim, millis(250)));
        assert!(before(&*sim.clock(), within(&sim, millis(10)), forward).await.is_err());
        sim.advance(millis(300)).await;
        assert!(hive.recording("expert.0").batches().is_empty(), "nobody waited for it any more");
    });
}
