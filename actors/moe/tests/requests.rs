//! Request ids, and calls from ordinary threads.

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use futures::future::BoxFuture;
use libp2p_identity::PeerId;
use skep_moe::{Client, Mixture, MoeConfig, MoeError, RemoteExpert};
use skep_rpc::{Answer, Call, RequestId, RpcError, SharedTransport, Transport};
use skep_testkit::Sim;
use skep_wire::Method;

/// Notes the ids of backward calls, and says that the first `overloads` of them found no room.
struct Noting {
    inner: SharedTransport,
    ids: Mutex<Vec<RequestId>>,
    overloads: usize,
}

impl Transport for Noting {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        if call.method == Method::Backward {
            let mut ids = self.ids.lock().unwrap();
            ids.push(call.meta.request_id);
            if ids.len() <= self.overloads {
                let retry_after = millis(30);
                return Box::pin(async move { Err(RpcError::Overloaded { waiting: 8, limit: 8, retry_after }) });
            }
        }
        self.inner.call(call)
    }

    fn local_peer(&self) -> PeerId {
        self.inner.local_peer()
    }

    fn addresses(&self) -> Vec<multiaddr::Multiaddr> {
        self.inner.addresses()
    }

    fn add_addresses(&self, peer: PeerId, addresses: Vec<multiaddr::Multiaddr>) {
        self.inner.add_addresses(peer, addresses);
    }
}

fn noting(client: &Client, overloads: usize) -> (Client, Arc<Noting>) {
    let noting = Arc::new(Noting { inner: client.transport.clone(), ids: Mutex::default(), overloads });
    (Client { transport: noting.clone(), ..client.clone() }, noting)
}

#[test]
fn a_retried_step_keeps_its_request_id_and_every_other_has_its_own() {
    Sim::with_seed(1).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let (client, noting) = noting(&sim.client(&hive).await, 2);
        let moe = Mixture::new(&client, MoeConfig::grid("m.", [1]).k_best(1)).unwrap();
        let gather = moe.forward(vec![rows(1)], descending(1, &[1])).await.unwrap();
        let start = sim.now();
        for _ in 0..2 {
            moe.backward(&gather, vec![rows(1)], vec![filled(&[1, 1, WIDTH], 1.0)]).await.unwrap();
        }
        let ids = noting.ids.lock().unwrap().clone();
        assert_eq!(ids.len(), 4);
        assert!(ids[0] == ids[1] && ids[1] == ids[2], "two refusals and the call that ran");
        assert_ne!(ids[2], ids[3]);
        assert_eq!(sim.now() - start, millis(60), "it waited as it was told");
        assert_eq!(hive.steps("m.0"), 2);
    });
}

#[test]
fn overload_that_lasts_is_an_answer() {
    Sim::with_seed(2).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let (client, noting) = noting(&sim.client(&hive).await, usize::MAX);
        let (uid, peer) = ("m.0".parse().unwrap(), hive.servers()[0].peer());
        let expert = RemoteExpert::at(&client, uid, peer, within(&sim, millis(1000))).await.unwrap();
        let refused = expert.backward(vec![rows(1)], vec![rows(1)], within(&sim, millis(60_000))).await;
        assert!(matches!(refused, Err(RpcError::Overloaded { .. })), "{refused:?}");
        assert_eq!(noting.ids.lock().unwrap().len(), 4);
    });
}

#[test]
fn ordinary_threads_wait_for_answers() {
    Sim::with_seed(3).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let client = sim.client(&hive).await;
        let moe = Mixture::new(&client, MoeConfig::grid("m.", [1]).k_best(1)).unwrap();
        // While a blocking task runs, virtual time stands still.
        let work = move || {
            let deadline = client.deadline(millis(5000));
            let expert = RemoteExpert::find_wait(&client, &"m.0".parse().unwrap(), deadline).unwrap().unwrap();
            let doubled = expert.forward_wait(vec![rows(1)], deadline).unwrap();
            let gather = moe.forward_wait(vec![rows(1)], descending(1, &[1])).unwrap();
            assert_eq!(gather.outputs[0].to_f32().unwrap(), doubled[0].to_f32().unwrap());
            let gradients = vec![filled(&[1, 1, WIDTH], 1.0)];
            let backward = moe.backward_wait(&gather, vec![rows(1)], gradients).unwrap();
            let direct = expert.backward_wait(vec![rows(1)], vec![filled(&[1, WIDTH], 1.0)], deadline).unwrap();
            assert_eq!(backward.grad_inputs, direct);
        };
        tokio::task::spawn_blocking(work).await.unwrap();
        assert_eq!(hive.steps("m.0"), 2);
    });
}

#[test]
fn skep_s_own_threads_are_told_that_they_would_wait_for_themselves() {
    Sim::with_seed(4).run(|sim| async move {
        let hive = sim.servers(1).experts(["m.0"]).start().await;
        let moe = Mixture::new(&sim.client(&hive).await, MoeConfig::grid("m.", [1]).k_best(1)).unwrap();
        #[allow(clippy::disallowed_methods, reason = "it stands for a thread of the runtime and ends at once")]
        let own = std::thread::spawn(move || {
            skep_kernel::ask::mark_runtime_thread();
            moe.forward_wait(vec![rows(1)], descending(1, &[1])).map(drop)
        });
        assert!(matches!(own.join().unwrap(), Err(MoeError::Rpc(RpcError::WouldDeadlock))));
    });
}
