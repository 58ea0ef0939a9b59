//! Nodes of one simulated DHT.
#![allow(dead_code)]

use std::{sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use skep_dht::{Announcer, Dht, DhtConfig, DhtParts};
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
    let bans = Bans::new();
    let parts = DhtParts { transport, router, bans, clock: sim.clock(), seed, config, initial_peers };
    let dht = Dht::start_unsupervised(parts);
    stop_at_end(sim, &dht);
    dht
}

/// Nothing is left of the node when the test is over.
pub fn stop_at_end(sim: &Sim, dht: &Dht) {
    let dht = dht.clone();
    sim.at_end(async move { dht.stop().await });
}

/// An announcer that ends with the test.
pub fn announcer(sim: &Sim, dht: &Dht, seed: u64) -> Announcer {
    let announcer = Announcer::start_unsupervised(dht.clone(), seed);
    let (ending, clock) = (announcer.clone(), sim.clock());
    sim.at_end(async move {
        // Some tests leave it no network to withdraw its records from.
        let _withdrawn = ending.stop(Deadline::after(clock.now(), Duration::from_secs(5))).await;
    });
    announcer
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
