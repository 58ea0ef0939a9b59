//! Finding lost nodes again. After a partition each half has dropped the other from its tables, and nobody would ever
//! call across again, as hivemind's nodes do not: peers that stopped answering are pinged now and then.

use std::{collections::BTreeMap, time::Duration};

use libp2p_identity::PeerId;
use rand::{Rng, seq::IteratorRandom};
use skep_kernel::Moment;

use super::{Ask, For, Node, Purpose};
use crate::config::seconds;

/// Peers that had a place in the table, or that we were told to join through, and stopped answering.
#[derive(Debug, Default)]
pub(super) struct Lost {
    since: BTreeMap<PeerId, Moment>,
    next_round: Option<Moment>,
}

impl Lost {
    pub fn next_round(&self) -> Option<Moment> {
        self.next_round
    }

    /// A peer gave a sign of life.
    pub fn found(&mut self, peer: &PeerId) {
        if self.since.remove(peer).is_some() && self.since.is_empty() {
            self.next_round = None;
        }
    }
}

/// Peers remembered as lost, initial ones not counted; those that were lost first are forgotten first.
const MAX_LOST: usize = 256;
/// How long peers are looked for; initial ones for ever.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Peers pinged in one round; of initial ones as many again.
const PINGS: usize = 3;
/// Time to the next round when one was found: it is rarely back alone.
const SOON: Duration = Duration::from_secs(1);

impl Node {
    /// A peer does not answer.
    pub(super) fn lose(&mut self, peer: PeerId) {
        let is_initial = self.join.is_initial(&peer);
        if !self.join.state().joined || !(is_initial || self.table.has_peer(&peer)) {
            return;
        }
        self.lost.since.entry(peer).or_insert(self.now);
        let others = self.lost.since.iter().filter(|(peer, _)| !self.join.is_initial(peer));
        if others.clone().count() > MAX_LOST
            && let Some((first, _)) = others.min_by_key(|(_, since)| **since).map(|(peer, since)| (*peer, *since))
        {
            self.lost.since.remove(&first);
        }
        if self.lost.next_round.is_none() {
            self.next_reunion();
        }
    }

    fn next_reunion(&mut self) {
        let period = seconds(self.config.update_period).mul_f64(self.rng.random_range(0.5..1.0));
        self.lost.next_round = Some(self.now + period);
    }

    /// Pings some of the lost when it is time to.
    pub(super) fn look_for_lost(&mut self) {
        if self.lost.next_round.is_none_or(|at| at > self.now) {
            return;
        }
        let (now, join) = (self.now, &self.join);
        self.lost.since.retain(|peer, since| join.is_initial(peer) || now - *since < PATIENCE);
        let (initial, others): (Vec<PeerId>, Vec<PeerId>) =
            self.lost.since.keys().partition(|peer| self.join.is_initial(peer));
        for group in [initial, others] {
            for peer in group.into_iter().choose_multiple(&mut self.rng, PINGS) {
                self.call(peer, Ask::Ping { validate: false }, Purpose::Reunion);
            }
        }
        self.lost.next_round = None;
        if !self.lost.since.is_empty() {
            self.next_reunion();
        }
    }

    /// One of the lost answered: those around us on its side must know us, and we them.
    pub(super) fn on_reunion(&mut self) {
        if !self.lost.since.is_empty() {
            self.lost.next_round = Some(self.now + SOON);
        }
        if !self.searches.values().any(|running| running.purpose == For::Table) {
            let search = self.start_search(vec![self.own], 1, For::Table);
            self.drive(search);
        }
    }
}
