//! Joining the network: initial peers are asked, with validation, until one of them answers (§6.4). What is wrong is
//! said, and tried again for ever.

use std::time::Duration;

use libp2p_identity::PeerId;
use rand::Rng;
use skep_kernel::{Moment, WallTime};

use super::{Ask, For, Node, Purpose};
use crate::DhtError;

/// How far joining has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct JoinState {
    /// There is nobody to join, or somebody answered.
    pub joined: bool,
    /// What went wrong last.
    pub problem: Option<DhtError>,
    /// Rounds in which every initial peer was asked in vain since the last success.
    pub failed_rounds: u32,
}

#[derive(Debug)]
pub(super) struct Join {
    peers: Vec<PeerId>,
    state: JoinState,
    /// Initial peers that were asked and have not answered yet.
    waiting: usize,
    retry_at: Option<Moment>,
}

impl Join {
    pub fn new(peers: Vec<PeerId>) -> Self {
        let state = JoinState { joined: peers.is_empty(), ..JoinState::default() };
        let retry_at = (!peers.is_empty()).then_some(Moment::START);
        Self { peers, state, waiting: 0, retry_at }
    }

    pub fn state(&self) -> &JoinState {
        &self.state
    }

    /// Whether we were told to join through this peer.
    pub fn is_initial(&self, peer: &PeerId) -> bool {
        self.peers.contains(peer)
    }

    pub fn retry_at(&self) -> Option<Moment> {
        self.retry_at
    }
}

impl Node {
    /// Asks the initial peers when it is time to, at first and whenever everybody known has gone.
    pub(super) fn keep_joined(&mut self) {
        let is_lost = self.join.state.joined && !self.join.peers.is_empty() && self.table.is_empty();
        if is_lost && self.join.waiting == 0 && self.join.retry_at.is_none() {
            self.join.state.joined = false;
            self.join.state.problem = Some(DhtError::Bootstrap("every known node has gone".to_owned()));
            self.schedule_retry();
        }
        if self.join.retry_at.is_none_or(|at| at > self.now) {
            return;
        }
        self.join.retry_at = None;
        self.join.waiting = self.join.peers.len();
        for peer in self.join.peers.clone() {
            self.call(peer, Ask::Ping { validate: true }, Purpose::Bootstrap { asked_at: self.wall });
        }
    }

    pub(super) fn on_bootstrap_answer(&mut self, peer: PeerId, asked_at: WallTime, available: bool, dht_time: f64) {
        let tolerance = self.config.allowed_clock_difference;
        let in_range = dht_time >= asked_at.0 - tolerance && dht_time <= self.wall.0 + tolerance;
        if dht_time != 0.0 && !in_range {
            let skew = (asked_at.0 + self.wall.0) / 2.0 - dht_time;
            return self.on_bootstrap_problem(DhtError::ClockSkew { skew, peer });
        }
        if !available && !self.config.client_mode {
            let text = format!(
                "{peer} answers but cannot reach this node; listen on an address that it can reach, or use client mode"
            );
            return self.on_bootstrap_problem(DhtError::Bootstrap(text));
        }
        self.join.waiting = self.join.waiting.saturating_sub(1);
        if !self.join.state.joined {
            self.join.state = JoinState { joined: true, problem: None, failed_rounds: 0 };
            self.join.retry_at = None;
            // Who is near us is who must know us.
            let search = self.start_search(vec![self.own], 1, For::Table);
            self.drive(search);
        }
    }

    pub(super) fn on_bootstrap_failed(&mut self, peer: PeerId, reason: String) {
        self.on_bootstrap_problem(DhtError::Bootstrap(format!("pinging {peer} failed: {reason}")));
    }

    fn on_bootstrap_problem(&mut self, problem: DhtError) {
        self.join.waiting = self.join.waiting.saturating_sub(1);
        if self.join.state.joined {
            return;
        }
        self.join.state.problem = Some(problem);
        if self.join.waiting == 0 {
            self.join.state.failed_rounds = self.join.state.failed_rounds.saturating_add(1);
            self.schedule_retry();
        }
    }

    fn schedule_retry(&mut self) {
        let doubled = FIRST_RETRY.saturating_mul(2u32.saturating_pow(self.join.state.failed_rounds));
        let backoff = doubled.min(LAST_RETRY);
        let jitter = self.rng.random_range(0.5..1.0);
        self.join.retry_at = Some(self.now + backoff.mul_f64(jitter));
    }
}

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);
