//! Servers and a client in one process, behind a simulated network.
#![allow(dead_code, reason = "each scenario uses its own part")]

use std::{sync::Arc, time::Duration};

use skep_dht::{Dht, DhtConfig, DhtParts};
use skep_expert::{HostedExpert, Server, ServerConfig, ServerParts};
use skep_kernel::{Deadline, SharedClock, Spawner, TokioClock};
use skep_moe::Client;
use skep_rpc::{Bans, Router, SharedTransport};
use skep_testkit::SimNetwork;
use skep_torch::{Ffn, Sgd, factory, tch::Device};
use skep_wire::{ExpertUid, HostTensor};

pub const WAIT: Duration = Duration::from_secs(60);

/// What every expert's optimizer is.
pub fn optimizer() -> Sgd {
    Sgd::lr(0.05)
}

/// Servers and a client in this process, on a system thread of their own and real time.
pub struct World {
    pub network: SimNetwork,
    clock: SharedClock,
    spawner: Spawner,
    pub servers: Vec<(Dht, Server)>,
    pub client: Client,
}

impl World {
    /// As many servers as lists of uids. Each hosts FFNs of width 8, the n-th of server s made from the seed 10 s + n.
    pub fn start(servers: &[&[&str]]) -> Self {
        let (send, arbiter) = std::sync::mpsc::sync_channel(1);
        let system = move || {
            let system = actix_rt::System::new();
            send.send(actix_rt::Arbiter::current()).unwrap();
            system.run().unwrap();
        };
        std::thread::Builder::new().name("skep-system".into()).spawn(system).unwrap();
        let spawner = Spawner::arbiter(arbiter.recv().unwrap());
        let clock: SharedClock = Arc::new(TokioClock::system());
        let network = SimNetwork::new(clock.clone(), 0xBEE);
        let uids: Vec<Vec<ExpertUid>> =
            servers.iter().map(|uids| uids.iter().map(|uid| uid.parse().unwrap()).collect()).collect();
        let (net, time, spawn) = (network.clone(), clock.clone(), spawner.clone());
        let deadline = Deadline::after(clock.now(), WAIT);
        let build = async move {
            let mut servers: Vec<(Dht, Server)> = Vec::new();
            for (number, uids) in uids.into_iter().enumerate() {
                let router = Router::new();
                let transport: SharedTransport = Arc::new(net.node(router.clone()));
                let known: Vec<_> = servers.first().map(|(dht, _)| dht.local_peer()).into_iter().collect();
                let dht = dht(&time, transport, router.clone(), number as u64, DhtConfig::default(), known);
                let hosted = uids.into_iter().zip(10 * number as u64..).map(|(uid, seed)| {
                    let factory = factory(Ffn::hidden(8), optimizer().into(), Device::Cpu, seed);
                    HostedExpert { uid, factory }
                });
                let parts = ServerParts {
                    clock: time.clone(),
                    spawner: spawn.clone(),
                    dht: Some(dht.clone()),
                    router,
                    seed: number as u64,
                    checkpoints: None,
                    config: ServerConfig { executors: 1, ..ServerConfig::default() },
                };
                let server = Server::new(parts, hosted.collect()).unwrap();
                server.ready(deadline).await.unwrap();
                servers.push((dht, server));
            }
            let transport: SharedTransport = Arc::new(net.client());
            let known = vec![servers[0].0.local_peer()];
            let dht = dht(&time, transport.clone(), Router::new(), 99, DhtConfig::client(), known);
            dht.joined(deadline).await.unwrap();
            (servers, Client { dht, transport, clock: time, spawner: spawn, seed: 99 })
        };
        let (servers, client) = spawner.wait(&clock, deadline, build).unwrap();
        Self { network, clock, spawner, servers, client }
    }

    fn expert(&self, uid: &str) -> skep_expert::ExpertHandle {
        let uid = uid.parse().unwrap();
        self.servers.iter().find_map(|(_, server)| server.expert(&uid)).unwrap()
    }

    pub fn steps(&self, uid: &str) -> u64 {
        self.expert(uid).status().steps
    }

    /// An expert's parameters by name, as they are now.
    pub fn parameters(&self, uid: &str) -> Vec<(String, HostTensor)> {
        let (expert, deadline) = (self.expert(uid), Deadline::after(self.clock.now(), WAIT));
        let saving = async move { expert.save(deadline).await.unwrap() };
        self.spawner.wait(&self.clock, deadline, saving).unwrap().tensors
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let (deadline, servers) = (Deadline::after(self.clock.now(), WAIT), std::mem::take(&mut self.servers));
        let stop = async move {
            for (_, server) in servers {
                let _frozen_servers_may_hold_calls = server.stop(deadline).await;
            }
            actix_rt::System::current().stop();
        };
        let _the_system_is_gone = self.spawner.wait(&self.clock, deadline, stop);
    }
}

fn dht(
    clock: &SharedClock,
    transport: SharedTransport,
    router: Router,
    seed: u64,
    config: DhtConfig,
    initial_peers: Vec<libp2p_identity::PeerId>,
) -> Dht {
    Dht::start_unsupervised(DhtParts {
        transport,
        router,
        bans: Bans::new(),
        clock: clock.clone(),
        seed,
        config,
        initial_peers,
    })
}
