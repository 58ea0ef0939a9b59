//! What the simulated network promises to tests.

mod echo;

use std::sync::Arc;

use echo::{SECOND, TENTH, call, echo};
use futures::future::BoxFuture;
use skep_rpc::{Answer, Body, Inbound, RequestId, Router, RpcError, ServeError, Service, Step, Transport};
use skep_testkit::{Latency, Sim, Wire};
use skep_wire::Method;

#[test]
fn a_call_takes_the_way_there_the_service_and_the_way_back() {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().latency(Latency::constant(TENTH));
        let (server, client) = (echo(&sim, TENTH), sim.network().client());
        let answer = client.call(call(&sim, server.local_peer(), "hi")).await.unwrap();
        assert_eq!(answer.body, Body::Message("hi".into()));
        assert_eq!(sim.now().as_nanos(), 3 * TENTH.as_nanos() as u64);
        assert_eq!(sim.network().delivered_to(server.local_peer(), Method::Ping), 1);
    });
}

#[test]
fn killed_and_frozen_peers_answer_nothing_until_the_deadline() {
    Sim::with_seed(2).run(|sim| async move {
        let (server, client) = (echo(&sim, TENTH), sim.network().client());
        let peer = server.local_peer();
        sim.network().kill(peer);
        let late = client.call(call(&sim, peer, "hi")).await.unwrap_err();
        assert_eq!(late, RpcError::Deadline { peer, step: Step::Exchange, waited: SECOND });
        sim.network().freeze(peer);
        assert!(client.call(call(&sim, peer, "hi")).await.is_err());
        sim.network().restore(peer);
        assert!(client.call(call(&sim, peer, "hi")).await.is_ok());
        assert_eq!(sim.network().in_flight(), 0);
    });
}

#[test]
fn a_frozen_peer_goes_on_where_it_stopped() {
    Sim::with_seed(3).run(|sim| async move {
        let (server, client) = (echo(&sim, TENTH), sim.network().client());
        let pending = client.call(call(&sim, server.local_peer(), "hi"));
        let network = sim.network().clone();
        let thaw = async {
            sim.advance(TENTH / 2).await;
            network.freeze(server.local_peer());
            sim.advance(5 * TENTH).await;
            network.restore(server.local_peer());
        };
        let (answer, ()) = futures::join!(pending, thaw);
        assert!(answer.is_ok());
        assert_eq!(sim.now().as_nanos(), (TENTH / 2 + 5 * TENTH).as_nanos() as u64);
    });
}

#[test]
fn a_refusing_peer_breaks_calls_at_once() {
    Sim::with_seed(4).run(|sim| async move {
        let (server, client) = (echo(&sim, TENTH), sim.network().client());
        let pending = client.call(call(&sim, server.local_peer(), "hi"));
        let crash = async {
            sim.advance(TENTH / 2).await;
            sim.network().refuse(server.local_peer());
        };
        let (broken, ()) = futures::join!(pending, crash);
        assert!(matches!(broken, Err(RpcError::Unreachable { step: Step::Exchange, .. })));
        let refused = client.call(call(&sim, server.local_peer(), "hi")).await;
        assert!(matches!(refused, Err(RpcError::Unreachable { step: Step::Dial, .. })));
        assert_eq!(sim.now().as_nanos(), (TENTH / 2).as_nanos() as u64);
    });
}

#[test]
fn services_that_panic_or_do_not_exist_are_answers() {
    Sim::with_seed(5).run(|sim| async move {
        let (server, client) = (echo(&sim, TENTH), sim.network().client());
        let panicked = client.call(call(&sim, server.local_peer(), "panic")).await;
        let Err(RpcError::Remote { text }) = panicked else { panic!("{panicked:?}") };
        assert!(text.contains("its service panicked") && text.contains("ordered"), "{text}");
        let mut unknown = call(&sim, server.local_peer(), "hi");
        unknown.method = Method::Info;
        assert!(matches!(client.call(unknown).await, Err(RpcError::Refused { .. })));
        let nobody = server.call(call(&sim, client.local_peer(), "hi")).await;
        assert!(matches!(nobody, Err(RpcError::Unreachable { step: Step::Resolve, .. })));
    });
}

/// Tells what it saw of the caller's meta.
struct Witness;

impl Service for Witness {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let text = format!("{} {}", inbound.meta.request_id == RequestId(1), inbound.knows_overload);
        Box::pin(async move { Ok(Answer { body: Body::Message(text.into()), load: None }) })
    }
}

#[test]
fn hivemind_s_wire_drops_what_only_the_native_one_carries() {
    Sim::with_seed(6).run(|sim| async move {
        let router = Router::new();
        router.route(&[Method::Ping], Arc::new(Witness));
        let (server, client) = (sim.network().node(router), sim.network().client());
        for (wire, seen) in [(Wire::Native, "true true"), (Wire::Hivemind, "false false")] {
            sim.network().wire(wire);
            let answer = client.call(call(&sim, server.local_peer(), "hi")).await.unwrap();
            assert_eq!(answer.body, Body::Message(seen.into()));
        }
    });
}

#[test]
fn the_same_seed_gives_the_same_peers_and_latencies() {
    let run = || {
        Sim::with_seed(7).run(|sim| async move {
            sim.network().latency(Latency::uniform(TENTH..SECOND / 3));
            let (server, client) = (echo(&sim, TENTH), sim.network().client());
            client.call(call(&sim, server.local_peer(), "hi")).await.unwrap();
            (server.local_peer(), sim.now())
        })
    };
    assert_eq!(run(), run());
}
