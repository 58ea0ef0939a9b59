//! Nodes of one simulated DHT.
#![allow(dead_code)]

use std::{sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use skep_dht::{Dht, DhtConfig, DhtParts};
use skep_kernel::Deadline;
use skep_rpc::{Bans, Router, SharedTransport};
use skep_testkit::{Sim, SimTransport};
use skep_wire::{ExpertPrefix, ExpertUid};

/// A node that serves.
pub fn member(sim: &Sim, seed: u64, initial: &[PeerId]) -> Dht {
    member_with(sim, seed, initial, DhtConfig::default())
}

pub fn member_with(sim: &Sim, seed: u64, initial: &[PeerId], config: DhtConfig) -> Dht {
    let router = Router::new();
    let transport = sim.network().node(router.clone());
    start(sim, seed, initial, config, transport, router)
}

/// A node that only asks.
pub fn client(sim: &Sim, seed: u64, initial: &[PeerId]) -> Dht {
    start(sim, seed, initial, DhtConfig::client(), sim.network().client(), Router::new())
}

fn start(sim: &Sim, seed: u64, initial: &[PeerId], config: DhtConfig, transport: SimTransport, router: Router) -> Dht {
    let transport: SharedTransport = Arc::new(transport);
    let initial_peers = initial.to_vec();
    Dht::start_unsupervised(DhtParts {
        transport,
        router,
        bans: Bans::new(),
        clock: sim.clock(),
        seed,
        config,
        initial_peers,
    })
}

/// So many members that all joined through the first.
pub async fn members(sim: &Sim, count: u64) -> Vec<Dht> {
    let mut members = vec![member(sim, 1, &[])];
    for seed in 2..=count {
        let next = member(sim, seed, &[members[0].local_peer()]);
        next.joined(within(sim, 5)).await.expect("the first node answers");
        members.push(next);
    }
    members
}

pub fn within(sim: &Sim, seconds: u64) -> Deadline {
    Deadline::after(sim.now(), Duration::from_secs(seconds))
}

pub fn uid(text: &str) -> ExpertUid {
    text.parse().expect("a uid")
}

pub fn uids(texts: &[&str]) -> Vec<ExpertUid> {
    texts.iter().map(|text| uid(text)).collect()
}

pub fn prefix(text: &str) -> ExpertPrefix {
    text.parse().expect("a prefix")
}
