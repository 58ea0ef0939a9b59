//! Calls as they come from the network: bodies, schemas, error texts, two wires.

mod common;

use std::time::Duration;

use common::{calls::*, *};
use prost::Message;
use skep_expert::{HostedExpert, Kind, ServerConfig};
use skep_rpc::{Body, RequestId, RpcError, TensorBody};
use skep_testkit::{ScriptedBackend, Sim, Wire};
use skep_wire::{
    Compression, DType, ExpertInfo, Method, TensorDescriptor,
    compression::{compress, decompress},
    proto::{self, runtime},
};

fn scale(uid: &str, factor: f32) -> HostedExpert {
    HostedExpert {
        uid: uid.parse().unwrap(),
        factory: Box::new(move || Ok(Box::new(ScriptedBackend::scale(factor).of_width(2)))),
    }
}

#[test]
fn info_forward_and_backward_answer_by_schema() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![scale("ffn.0.1", 3.0)]).await;
        let request = runtime::ExpertUid { uid: "ffn.0.1".to_owned() };
        let info = hive.call(Method::Info, Body::Message(request.encode_to_vec().into())).await.unwrap();
        let Body::Message(info) = info.body else { panic!("a message is expected") };
        let info = proto::decode::<runtime::ExpertInfo>(info).unwrap();
        let expected = hive.server.experts()[0].info().clone();
        assert_eq!(ExpertInfo::decode(&info.serialized_info).unwrap(), expected);

        let x = rows(4, 2, 1.0);
        let y = hive.call(Method::Forward, body("ffn.0.1", std::slice::from_ref(&x))).await.unwrap();
        assert_eq!(y.load.unwrap().waiting_rows, 0);
        assert_eq!(tensors(y), [rows(4, 2, 3.0)]);
        let g = hive.call(Method::Backward, body("ffn.0.1", &[x, rows(4, 2, 2.0)])).await.unwrap();
        assert_eq!(tensors(g), [rows(4, 2, 6.0)]);
        assert_eq!(hive.server.status().experts[0].steps, 1);
    });
}

#[test]
fn a_question_for_a_schema_of_too_many_fields_is_refused() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![scale("ffn.0.1", 3.0)]).await;
        let question = runtime::ExpertUid { uid: "ffn.0.1".to_owned() }.encode_to_vec();
        let padded = |fields: usize| [question.clone(), [0x78, 0].repeat(fields)].concat();
        let ask = |message: Vec<u8>| hive.call(Method::Info, Body::Message(message.into()));
        assert!(ask(padded(proto::MAX_FIELDS - 1)).await.is_ok());
        let error = ask(padded(proto::MAX_FIELDS)).await.unwrap_err();
        assert!(error.to_string().contains("more than 131072 fields"), "{error}");
    });
}

#[test]
fn python_reads_our_errors_as_its_own() {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().wire(Wire::Hivemind);
        let panics = Closures::echo().on_forward(|_| panic!("boom"));
        let hosted = vec![scale("ffn.0.1", 3.0), panics.hosted("ffn.0.2")];
        let hive = Hive::with(&sim, ServerConfig::default(), hosted).await;
        for (uid, tensor, text) in [
            ("ffn.9.9", rows(1, 2, 1.0), "KeyError('ffn.9.9')"),
            ("ffn.0.1", rows(1, 3, 1.0), "ValueError('input 0: expected float32 [batch, 2], got float32 [1, 3]')"),
            ("ffn.0.1", rows(0, 2, 1.0), "ValueError('a request of 0 rows; expected at least one')"),
            ("ffn.0.2", rows(1, 2, 1.0), "RuntimeError('forward panicked: boom')"),
        ] {
            let error = hive.call(Method::Forward, body(uid, &[tensor])).await.unwrap_err();
            assert_eq!(error, RpcError::Remote { text: text.to_owned() });
        }
        let good = hive.call(Method::Forward, body("ffn.0.1", &[rows(1, 2, 1.0)])).await.unwrap();
        assert_eq!(tensors(good), [rows(1, 2, 3.0)], "the expert still answers");
    });
}

#[test]
fn malformed_bodies_are_errors_and_nothing_more() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![scale("e.0", 3.0)]).await;
        let mut short = compress(&rows(2, 2, 1.0), Compression::None).unwrap();
        short.buffer = short.buffer.slice(..7);
        let unknown = runtime::Tensor { compression: 77, ..compress(&rows(2, 2, 1.0), Compression::None).unwrap() };
        let huge = runtime::Tensor { size: vec![u32::MAX, u32::MAX, u32::MAX], ..short.clone() };
        for tensor in [short, unknown, huge] {
            let bad = Body::Tensors(TensorBody { uid: "e.0".to_owned(), tensors: vec![tensor] });
            let error = hive.call(Method::Forward, bad).await.unwrap_err();
            assert!(matches!(&error, RpcError::Remote { text } if text.starts_with("tensor 0: ")), "{error}");
        }
        for method in [Method::Info, Method::Forward] {
            let swapped = if method == Method::Info { body("e.0", &[]) } else { Body::Message(vec![1, 2].into()) };
            assert!(matches!(hive.call(method, swapped).await, Err(RpcError::Remote { .. })));
        }
        let junk = Body::Message(vec![0xff; 40].into());
        assert!(matches!(hive.call(Method::Info, junk).await, Err(RpcError::Remote { .. })));
    });
}

#[test]
fn answers_are_compressed_as_the_schema_says() {
    Sim::with_seed(1).run(|sim| async move {
        let mut input = TensorDescriptor::batched(DType::F32, &[20_000]);
        input.compression = Compression::Float16;
        let mut output = TensorDescriptor::batched(DType::F32, &[20_000]);
        output.compression = Compression::MeanStd16;
        let hosted = Closures::echo().with_info(ExpertInfo::simple(input, output)).hosted("e.0");
        let hive = Hive::with(&sim, ServerConfig::default(), vec![hosted]).await;
        let x = rows(2, 20_000, 1.5);
        for (method, tensors, codec) in [
            (Method::Forward, vec![x.clone()], Compression::MeanStd16),
            (Method::Backward, vec![x.clone(), x.clone()], Compression::Float16),
        ] {
            let Body::Tensors(answer) = hive.call(method, body("e.0", &tensors)).await.unwrap().body else {
                panic!("tensors are expected")
            };
            assert_eq!(answer.tensors[0].compression, codec as i32);
            assert_eq!(decompress(&answer.tensors[0]).unwrap(), x);
        }
    });
}

#[test]
fn native_callers_are_refused_when_the_line_is_full_and_hivemind_callers_wait() {
    for wire in [Wire::Native, Wire::Hivemind] {
        Sim::with_seed(1).run(|sim| async move {
            sim.network().wire(wire);
            let config = ServerConfig { max_batch_size: 1, mailbox_rows: 2, ..Default::default() };
            let hive = Hive::with(&sim, config, vec![scale("e.0", 1.0)]).await;
            let calls = (0..10).map(|_| hive.call(Method::Forward, body("e.0", &[rows(1, 2, 1.0)])));
            let results = futures::future::join_all(calls).await;
            let overloaded = results.iter().filter(|r| matches!(r, Err(RpcError::Overloaded { limit: 2, .. }))).count();
            let served = results.iter().filter(|r| r.is_ok()).count();
            match wire {
                Wire::Native => assert!(overloaded >= 7 && served + overloaded == 10, "{served} {overloaded}"),
                Wire::Hivemind => assert_eq!(served, 10),
            }
        });
    }
}

#[test]
fn a_call_ends_by_its_deadline_or_the_legacy_deadline() {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().wire(Wire::Hivemind);
        let config =
            ServerConfig { legacy_deadline: Duration::from_millis(15), max_batch_size: 1, ..Default::default() };
        let hive = Hive::with(&sim, config, vec![scale("e.0", 1.0)]).await;
        let calls = (0..3).map(|_| hive.call(Method::Forward, body("e.0", &[rows(1, 2, 1.0)])));
        let results = futures::future::join_all(calls).await;
        assert!(results[0].is_ok());
        for late in &results[1..] {
            let text = "TimeoutError('deadline passed before the call ran')".to_owned();
            assert_eq!(late, &Err(RpcError::Remote { text }));
        }
    });
}

#[test]
fn a_stopping_server_finishes_calls_and_refuses_new_ones() {
    Sim::with_seed(1).run(|sim| async move {
        let config = ServerConfig { max_batch_size: 1, mailbox_rows: 100, ..Default::default() };
        let hive = Hive::with(&sim, config, vec![scale("e.0", 1.0)]).await;
        let accepted = (0..5).map(|_| hive.call(Method::Forward, body("e.0", &[rows(1, 2, 1.0)])));
        let late = async {
            sim.advance(millis(5)).await;
            hive.call(Method::Forward, body("e.0", &[rows(1, 2, 1.0)])).await
        };
        let stop = async {
            sim.advance(millis(1)).await;
            hive.server.stop(within(&sim, 1000)).await
        };
        let (results, late, stopped) = futures::join!(futures::future::join_all(accepted), late, stop);
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(late, Err(RpcError::Remote { text: "the server is stopping".to_owned() }));
        assert_eq!(stopped, Ok(()));
    });
}

#[test]
fn a_caller_that_hangs_up_is_not_served() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let hosted = vec![Closures::echo().logging_to(&log).hosted("e.0")];
        let hive = Hive::with(&sim, ServerConfig::default(), hosted).await;
        let busy = occupy(&sim, &hive.server.experts()[0]);
        sim.advance(millis(1)).await;
        let call = hive.call_as(Method::Forward, body("e.0", &[rows(3, 2, 1.0)]), RequestId(7), within(&sim, 4));
        assert!(call.await.is_err());
        busy.answer().await.unwrap();
        sim.advance(millis(100)).await;
        assert_eq!(log.batches(), [(Kind::Forward, 1)]);
        assert_eq!(hive.server.status().calls, 0);
    });
}

#[test]
fn a_server_without_experts_is_ready_and_knows_nobody() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = Hive::with(&sim, ServerConfig::default(), vec![]).await;
        let error = hive.call(Method::Forward, body("e.0", &[rows(1, 2, 1.0)])).await.unwrap_err();
        assert_eq!(error, RpcError::Remote { text: "KeyError('e.0')".to_owned() });
    });
}
