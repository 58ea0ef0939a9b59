//! Servers come and go while messages get lost: whoever lives is found, whoever died vanishes.

use std::collections::BTreeMap;

use rand::{Rng, seq::IteratorRandom};
use rand_chacha::ChaCha8Rng;
use skep_dht::DhtConfig;
use skep_kernel::Moment;
use skep_testkit::{Latency, Sim, SimServer};
use skep_wire::{ExpertUid, Method};

use crate::common::*;

const SERVERS: usize = 200;

/// A hive whose servers come and go, one expert each.
struct Hive {
    sim: Sim,
    config: DhtConfig,
    alive: BTreeMap<ExpertUid, SimServer>,
    dead: BTreeMap<ExpertUid, Moment>,
    next: u64,
    /// Lookups that had to be made twice.
    missed: usize,
}

impl Hive {
    fn uid(&mut self) -> ExpertUid {
        self.next += 1;
        format!("e.{}.{}", self.next / 16, self.next % 16).parse().unwrap()
    }

    async fn start(sim: &Sim, config: DhtConfig) -> Self {
        let mut hive =
            Self { sim: sim.clone(), config, alive: BTreeMap::new(), dead: BTreeMap::new(), next: 0, missed: 0 };
        let uids: Vec<ExpertUid> = (0..SERVERS).map(|_| hive.uid()).collect();
        let servers = sim.servers(SERVERS).experts(uids.clone()).dht(hive.config.clone()).start().await;
        hive.alive = uids.into_iter().zip(servers.servers().iter().cloned()).collect();
        hive
    }

    /// One server dies, another one joins through a third.
    async fn churn(&mut self, random: &mut ChaCha8Rng) {
        let victim = self.alive.keys().choose(random).expect("many live").clone();
        let server = self.alive.remove(&victim).expect("it was just seen");
        server.node().kill();
        self.dead.insert(victim, self.sim.now());
        let door = self.alive.values().choose(random).expect("many live").peer();
        let uid = self.uid();
        let newcomer = self.sim.servers(1).experts(uid.as_str()).dht(self.config.clone()).join(&[door]).start().await;
        self.alive.insert(uid, newcomer.servers()[0].clone());
    }

    /// Looks every expert up from a node that lives; tells how many of them live.
    async fn check(&mut self, random: &mut ChaCha8Rng) -> usize {
        let (now, told) = (self.sim.now(), format!("seed {} at {:?}", self.sim.seed(), self.sim.now()));
        let asker = self.alive.values().choose(random).expect("many live").dht();
        let uids: Vec<ExpertUid> = self.alive.keys().cloned().collect();
        let mut found = find(&self.sim, &asker, &uids).await;
        // A lookup that loses messages may miss one; who looks again finds it.
        let missed: Vec<usize> = (0..uids.len()).filter(|&i| found[i].is_none()).collect();
        let again: Vec<ExpertUid> = missed.iter().map(|&i| uids[i].clone()).collect();
        for (i, second) in missed.iter().zip(find(&self.sim, &asker, &again).await) {
            found[*i] = second;
        }
        self.missed += missed.len();
        for ((uid, server), found) in self.alive.iter().zip(found) {
            assert_eq!(found.map(|found| found.value), Some(server.peer()), "{told}: {uid}");
        }
        let expiration = secs(self.config.announced_for() as u64);
        let gone = self.dead.iter().filter(|(_, died)| now - **died >= expiration).map(|(uid, _)| uid.clone());
        let gone: Vec<ExpertUid> = gone.collect();
        for (uid, found) in gone.iter().zip(find(&self.sim, &asker, &gone).await) {
            assert_eq!(found, None, "{told}: {uid} is dead");
        }
        uids.len()
    }
}

#[test]
fn every_live_expert_is_found_and_a_dead_one_is_gone_within_its_expiration() {
    let watch = Stopwatch::start("3, churn");
    let update_period = size(900.0, 30.0);
    let config = DhtConfig { update_period, ..DhtConfig::default() };
    let hours = size(1, 2);
    let (found, missed, died, calls) = Sim::with_seed(3).run(|sim| live(sim, config.clone(), hours));
    assert_eq!(died, hours * SERVERS / 10);
    watch.report(format!(
        "{SERVERS} servers, {hours} h, announced every {update_period} s: {died} died and were gone in time, \
         {found} of {found} lookups found who lives, {missed} of them at the second attempt; {calls} DHT calls"
    ));
}

/// Lookups of living experts, all of which were found; those made twice; servers that died; DHT calls.
async fn live(sim: Sim, config: DhtConfig, hours: usize) -> (usize, usize, usize, u64) {
    let random = &mut random(3);
    sim.network().latency(Latency::uniform(millis(10)..millis(90))).loss(0.05);
    let mut hive = Hive::start(&sim, config).await;
    let mut found = 0;
    // Ten in a hundred an hour: one every three minutes.
    for event in 1..=hours * SERVERS / 10 {
        sim.advance(millis(random.random_range(170_000..180_000))).await;
        hive.churn(random).await;
        if event % 10 == 0 {
            found += hive.check(random).await;
        }
    }
    sim.advance(secs(hive.config.announced_for() as u64)).await;
    found += hive.check(random).await;
    let calls = [Method::Ping, Method::Store, Method::Find].map(|method| sim.network().delivered(method));
    (found, hive.missed, hive.dead.len(), calls.iter().sum())
}
