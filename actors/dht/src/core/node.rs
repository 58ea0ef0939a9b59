//! [`Node`]: one node of the DHT as a state machine. It is told what happened and when; it says whom to call, what to
//! reply, and when it wants to be woken.

mod get;
mod handover;
mod join;
mod put;
mod reunion;
mod searching;
mod serve;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use libp2p_identity::PeerId;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_kernel::{Moment, WallTime};
use skep_rpc::Bans;

use self::{
    get::{Get, Lookup},
    handover::Handover,
    join::Join,
    put::Put,
    reunion::Lost,
    searching::Running,
};
use super::{
    bucket::Contact,
    cache::Cache,
    message::{Ask, Request, Response, Tell},
    routing::RoutingTable,
    search::Standing,
    storage::{Limits, Storage, WhenFull},
    validate::Validators,
};
use crate::{DhtConfig, DhtId, Freshness, StoreItem, Stored, Timed};

pub(crate) use self::{join::JoinState, put::Outcome};

/// Names a command or an inbound call until it is answered.
pub(crate) type Ticket = u64;
/// Names a call of ours until it is answered.
pub(crate) type CallId = u64;

/// What happens to a node.
#[derive(Debug)]
pub(crate) enum Input {
    /// Another peer asks.
    Inbound { ticket: Ticket, peer: PeerId, request: Request },
    /// Our call was answered.
    Answered { call: CallId, response: Response },
    /// Our call failed. Whether the peer is to blame decides if it stays in the table.
    Failed { call: CallId, reason: String, peer_at_fault: bool },
    /// Somebody here wants values.
    Get { ticket: Ticket, keys: Vec<DhtId>, freshness: Freshness, deadline: Moment },
    /// Somebody here wants values stored.
    Store { ticket: Ticket, items: Vec<StoreItem>, deadline: Moment },
    /// Whoever asked has left.
    Abandoned { ticket: Ticket },
    /// Time has passed.
    Tick,
}

/// What a node wants done.
#[derive(Debug, PartialEq)]
pub(crate) enum Output {
    /// Make a call; report it answered or failed, once.
    Call { call: CallId, peer: PeerId, request: Request, patience: Duration },
    /// Answer an inbound call.
    Reply { ticket: Ticket, response: Response },
    /// A get is complete: one entry per key, in order.
    Got { ticket: Ticket, values: Vec<Option<Timed<Stored>>> },
    /// A store is complete: one entry per item, in order.
    Stored { ticket: Ticket, outcomes: Vec<Outcome> },
    /// The deadline of a command passed.
    Elapsed { ticket: Ticket },
}

/// Why a call is under way.
#[derive(Debug)]
enum Purpose {
    Search {
        search: u64,
        contact: Contact,
        keys: Vec<DhtId>,
        standing: Standing,
    },
    Put {
        ticket: Ticket,
        contact: Contact,
        items: Vec<usize>,
    },
    Bootstrap {
        asked_at: WallTime,
    },
    PingBack {
        ticket: Ticket,
        claimed: DhtId,
    },
    Handover {
        id: u64,
    },
    /// Only the sign of life counts.
    Check,
    /// The peer was lost and may be back.
    Reunion,
    /// Nobody waits for the outcome.
    CacheElsewhere,
}

#[derive(Debug)]
struct Pending {
    peer: PeerId,
    purpose: Purpose,
}

/// Whom a search is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Lookups,
    Put(Ticket),
    /// Filling the table.
    Table,
}

/// See the module's documentation.
pub(crate) struct Node {
    config: DhtConfig,
    own: DhtId,
    local_peer: PeerId,
    rng: ChaCha8Rng,
    /// Time of the input at hand.
    now: Moment,
    wall: WallTime,
    table: RoutingTable,
    storage: Storage,
    cache: Cache,
    bans: Bans,
    validators: Validators,
    next_id: u64,
    calls: BTreeMap<CallId, Pending>,
    /// When calls of searches become slow, in order.
    slow_calls: VecDeque<(Moment, CallId)>,
    searches: BTreeMap<u64, Running>,
    lookups: BTreeMap<DhtId, Lookup>,
    gets: BTreeMap<Ticket, Get>,
    puts: BTreeMap<Ticket, Put>,
    handovers: BTreeMap<u64, Handover>,
    join: Join,
    lost: Lost,
    outputs: VecDeque<Output>,
}

/// Counts for status and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub nodes: usize,
    pub records: usize,
    pub record_bytes: usize,
    pub cached: usize,
    pub cached_bytes: usize,
    pub calls: usize,
    pub commands: usize,
}

impl Node {
    pub fn new(config: DhtConfig, local_peer: PeerId, seed: u64, bans: Bans, initial_peers: Vec<PeerId>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let own = DhtId::of_bytes(&rng.random::<[u8; 20]>());
        let main = Limits {
            records: config.max_records,
            bytes: config.max_record_bytes,
            bytes_per_key: config.max_bytes_per_key,
            life: config.max_record_life,
        };
        let cached = Limits { records: config.max_cached_records, bytes: config.max_cached_bytes, ..main };
        Self {
            own,
            local_peer,
            rng,
            now: Moment::START,
            wall: WallTime(0.0),
            table: RoutingTable::new(own, config.bucket_size, config.depth_modulo),
            storage: Storage::new(WhenFull::Refuse, main),
            cache: Cache::new(cached, config.cache_refresh_before_expiry),
            bans,
            validators: Validators::default(),
            next_id: 0,
            calls: BTreeMap::new(),
            slow_calls: VecDeque::new(),
            searches: BTreeMap::new(),
            lookups: BTreeMap::new(),
            gets: BTreeMap::new(),
            puts: BTreeMap::new(),
            handovers: BTreeMap::new(),
            join: Join::new(initial_peers.into_iter().filter(|peer| *peer != local_peer).collect()),
            lost: Lost::default(),
            outputs: VecDeque::new(),
            config,
        }
    }

    /// Believes what these believe instead of the default ones.
    pub fn with_validators(self, validators: Validators) -> Self {
        Self { validators, ..self }
    }

    /// Takes in one event. Every output it causes is ready afterwards.
    pub fn handle(&mut self, now: Moment, wall: WallTime, input: Input) {
        (self.now, self.wall) = (now, wall);
        match input {
            Input::Inbound { ticket, peer, request } => self.on_inbound(ticket, peer, request),
            Input::Answered { call, response } => self.on_answered(call, response),
            Input::Failed { call, reason, peer_at_fault } => self.on_failed(call, &reason, peer_at_fault),
            Input::Get { ticket, keys, freshness, deadline } => self.start_get(ticket, keys, freshness, deadline),
            Input::Store { ticket, items, deadline } => self.start_put(ticket, items, deadline),
            Input::Abandoned { ticket } => self.drop_command(ticket),
            Input::Tick => {}
        }
        self.on_time();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`handle`](Self::handle) at the latest, with [`Input::Tick`] if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let gets = self.gets.values().map(|get| get.deadline);
        let puts = self.puts.values().map(|put| put.deadline);
        let refresh = self.cache.next_refresh().map(|at| {
            let wait = (at.0 - self.wall.0).clamp(0.0, LONGEST_WAIT);
            self.now + Duration::from_secs_f64(wait)
        });
        let handover = self.handovers.values().any(Handover::is_idle).then_some(self.now);
        let rounds = self.join.retry_at().into_iter().chain(self.lost.next_round()).chain(self.next_slow_call());
        gets.chain(puts).chain(refresh).chain(handover).chain(rounds).min()
    }

    pub fn id(&self) -> DhtId {
        self.own
    }

    pub fn join_state(&self) -> &JoinState {
        self.join.state()
    }

    pub fn counts(&mut self) -> Counts {
        Counts {
            nodes: self.table.len(),
            records: self.storage.records(),
            record_bytes: self.storage.bytes(),
            cached: self.cache.records().records(),
            cached_bytes: self.cache.records().bytes(),
            calls: self.calls.len(),
            commands: self.gets.len() + self.puts.len(),
        }
    }

    /// Commands under way.
    pub fn commands(&self) -> usize {
        self.gets.len() + self.puts.len()
    }

    fn on_time(&mut self) {
        self.expire_commands();
        self.pass_over_slow_calls();
        self.refresh_cache();
        self.advance_handovers();
        self.keep_joined();
        self.look_for_lost();
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Our id as we show it to others: none in client mode.
    fn sender(&self) -> Option<DhtId> {
        (!self.config.client_mode).then_some(self.own)
    }

    fn call(&mut self, peer: PeerId, ask: Ask, purpose: Purpose) {
        let call = self.fresh_id();
        // Who asks to be pinged back has `wait_timeout` for everything and should hear of a failure, too.
        let patience = match purpose {
            Purpose::PingBack { .. } => self.config.wait() * 2 / 3,
            _ => self.config.wait(),
        };
        if let Purpose::Search { standing: Standing::Prompt, .. } = purpose {
            self.slow_calls.push_back((self.now + self.config.wait() / SLOW, call));
        }
        self.calls.insert(call, Pending { peer, purpose });
        let request = Request { sender: self.sender(), ask };
        self.outputs.push_back(Output::Call { call, peer, request, patience });
    }

    fn on_answered(&mut self, call: CallId, response: Response) {
        let Some(Pending { peer, purpose }) = self.calls.remove(&call) else { return };
        self.bans.succeeded(&peer);
        self.lost.found(&peer);
        if let Some(id) = response.sender {
            self.met(Contact { id, peer });
        }
        let Response { sender, tell } = response;
        match (purpose, tell) {
            (Purpose::Search { search, contact, keys, standing }, Tell::Find(findings))
                if findings.len() == keys.len() =>
            {
                self.on_found(search, contact, standing, keys, findings);
            }
            (Purpose::Search { search, contact, keys, standing }, _) => {
                self.on_search_failed(search, contact, standing, &keys);
            }
            (Purpose::Put { ticket, contact, items }, Tell::Store(ok)) if ok.len() == items.len() => {
                self.on_put(ticket, contact, &items, &ok);
            }
            (Purpose::Put { ticket, items, .. }, _) => self.on_put_failed(ticket, &items),
            (Purpose::Bootstrap { asked_at }, Tell::Ping { available, dht_time }) => {
                self.on_bootstrap_answer(peer, asked_at, available, dht_time);
            }
            (Purpose::Bootstrap { .. }, _) => self.on_bootstrap_failed(peer, "it answers something else".to_owned()),
            (Purpose::PingBack { ticket, claimed }, _) => self.on_ping_back(ticket, sender == Some(claimed)),
            (Purpose::Handover { id }, _) => self.on_handed_over(id, true),
            (Purpose::Reunion, _) => self.on_reunion(),
            (Purpose::Check | Purpose::CacheElsewhere, _) => {}
        }
    }

    fn on_failed(&mut self, call: CallId, reason: &str, peer_at_fault: bool) {
        let Some(Pending { peer, purpose }) = self.calls.remove(&call) else { return };
        if peer_at_fault {
            self.lose(peer);
            self.table.remove_peer(&peer);
            self.bans.failed(self.now, peer);
        }
        match purpose {
            Purpose::Search { search, contact, keys, standing } => {
                self.on_search_failed(search, contact, standing, &keys);
            }
            Purpose::Put { ticket, items, .. } => self.on_put_failed(ticket, &items),
            Purpose::Bootstrap { .. } => self.on_bootstrap_failed(peer, reason.to_owned()),
            Purpose::PingBack { ticket, .. } => self.on_ping_back(ticket, false),
            Purpose::Handover { id } => self.on_handed_over(id, false),
            Purpose::Check | Purpose::Reunion | Purpose::CacheElsewhere => {}
        }
    }

    /// A node gave a sign of life.
    fn met(&mut self, contact: Contact) {
        if contact.peer == self.local_peer {
            return;
        }
        let updated = self.table.update(contact);
        if updated.is_new {
            self.start_handover(contact);
        }
        if let Some(stale) = updated.check {
            self.call(stale.peer, Ask::Ping { validate: false }, Purpose::Check);
        }
    }

    fn expire_commands(&mut self) {
        let gets = self.gets.iter().filter(|(_, get)| get.deadline <= self.now).map(|(ticket, _)| *ticket);
        let puts = self.puts.iter().filter(|(_, put)| put.deadline <= self.now).map(|(ticket, _)| *ticket);
        for ticket in gets.chain(puts).collect::<Vec<_>>() {
            self.drop_command(ticket);
            self.outputs.push_back(Output::Elapsed { ticket });
        }
    }

    fn drop_command(&mut self, ticket: Ticket) {
        if self.gets.remove(&ticket).is_some() {
            self.forget_waiter(ticket);
        }
        if self.puts.remove(&ticket).is_some() {
            self.searches.retain(|_, running| running.purpose != For::Put(ticket));
        }
    }
}

/// Upper bound of a wait for a cache refresh, in seconds; only keeps arithmetic in range.
const LONGEST_WAIT: f64 = 86_400.0;
/// A search's call without an answer after this part of `wait_timeout`, half a second by default, gives its place to
/// another one.
const SLOW: u32 = 6;
