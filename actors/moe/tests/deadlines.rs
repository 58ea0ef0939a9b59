//! Peers, networks and threads that never answer: each wait ends in time, and the error says what was waited for.

mod common;

use std::sync::Arc;

use common::*;
use futures::{
    FutureExt,
    future::{BoxFuture, pending},
};
use libp2p_identity::PeerId;
use skep_dht::DhtError;
use skep_kernel::Spawner;
use skep_moe::{Client, Mixture, MoeConfig, MoeError, RemoteExpert};
use skep_rpc::{Answer, Call, RpcError, SharedTransport, Step, Transport};
use skep_testkit::Sim;
use skep_wire::Method;

#[test]
fn a_search_that_nobody_answers_ends_at_the_deadline_of_the_pass() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let client = sim.client(&hive).await;
        sim.network().freeze(hive.bootstrap().local_peer());
        hive.servers().iter().for_each(|server| sim.network().freeze(server.peer()));
        let config = MoeConfig::grid("m.", [2]).k_best(1).forward_timeout(millis(500));
        let start = sim.now();
        let error = Mixture::new(&client, config).unwrap().forward(vec![rows(1)], descending(1, &[2])).await;
        assert!(matches!(error, Err(MoeError::Dht(DhtError::Deadline))), "{error:?}");
        assert_eq!(sim.now() - start, millis(500));

        let found = RemoteExpert::find(&client, &"m.0".parse().unwrap(), within(&sim, millis(700))).await;
        let Err(RpcError::Deadline { step: Step::Search, peer, waited }) = found.map(drop) else { panic!("not found") };
        assert_eq!((peer, waited), (client.transport.local_peer(), millis(700)));
        assert_eq!(sim.now() - start, millis(1200));
    });
}

/// What is done in the place of a call, where anything is.
type Instead = dyn Fn(&Call) -> Option<BoxFuture<'static, Result<Answer, RpcError>>> + Send + Sync;

/// A transport on which some calls meet something else.
struct Bent(SharedTransport, Box<Instead>);

impl Transport for Bent {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        (self.1)(&call).unwrap_or_else(|| self.0.call(call))
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

/// The same client on a transport that bends.
fn bent(
    client: Client,
    instead: impl Fn(&Call) -> Option<BoxFuture<'static, Result<Answer, RpcError>>> + Send + Sync + 'static,
) -> Client {
    Client { transport: Arc::new(Bent(client.transport.clone(), Box::new(instead))), ..client }
}

#[test]
fn a_call_ends_in_time_though_its_transport_forgets_the_deadline() {
    Sim::with_seed(2).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let never = |call: &Call| (call.method == Method::Forward).then(|| pending().boxed());
        let client = bent(sim.client(&hive).await, never);
        let peer = hive.servers()[0].peer();
        let expert = RemoteExpert::at(&client, "m.0".parse().unwrap(), peer, within(&sim, millis(1000))).await.unwrap();
        let start = sim.now();
        let late = expert.forward(vec![rows(1)], within(&sim, millis(250))).await;
        let expected = RpcError::Deadline { peer, step: Step::Schedule, waited: millis(250) };
        assert_eq!(late, Err(expected));
        assert_eq!(sim.now() - start, millis(260));

        let config = MoeConfig::grid("m.", [1]).k_best(1).forward_timeout(millis(300));
        let start = sim.now();
        let error =
            Mixture::new(&client, config).unwrap().forward(vec![rows(1)], descending(1, &[1])).await.unwrap_err();
        assert!(error.to_string().contains(&peer.to_string()), "{error}");
        assert_eq!(sim.now() - start, millis(300), "a pass joins at its own timeout");
    });
}

#[test]
fn a_pass_ends_shortly_after_its_timeout_though_the_system_thread_is_stuck() {
    Sim::with_seed(3).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let held = std::sync::Mutex::new(Vec::new());
        let stuck = Spawner::new(move |future| {
            held.lock().unwrap().push(future);
            true
        });
        let client = Client { spawner: stuck, ..sim.client(&hive).await };
        let config = MoeConfig::grid("m.", [1]).k_best(1).forward_timeout(millis(300));
        let moe = Mixture::new(&client, config).unwrap();
        let start = sim.now();
        let error = moe.forward(vec![rows(1)], descending(1, &[1])).await.unwrap_err();
        assert!(matches!(error, MoeError::Rpc(RpcError::Deadline { step: Step::Schedule, .. })), "{error}");
        assert_eq!(sim.now() - start, millis(800));
    });
}

#[test]
fn a_call_that_panics_leaves_the_answers_of_the_other_experts() {
    Sim::with_seed(5).run(|sim| async move {
        let hive = sim.servers(2).experts(["m.0", "m.1"]).start().await;
        let guilty = hive.hosting("m.0").peer();
        let panics = move |call: &Call| {
            (call.method == Method::Forward && call.peer == guilty).then(|| async { panic!("told to") }.boxed())
        };
        let client = bent(sim.client(&hive).await, panics);
        let moe = Mixture::new(&client, MoeConfig::grid("m.", [2]).k_best(2)).unwrap();
        let gather = moe.forward(vec![rows(2)], descending(2, &[2])).await.unwrap();
        assert_eq!(gather.mask, [false, true, false, true]);
        let [(uid, RpcError::Malformed { peer, reason })] = &gather.failures[..] else { panic!("{gather:?}") };
        assert_eq!((uid.as_str(), *peer), ("m.0", guilty));
        assert!(reason.contains("told to"), "{reason}");
    });
}
