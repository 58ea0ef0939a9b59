//! Nodes talking to each other without actors: every call is carried out at once, or fails if its callee is down.

mod believing;
mod reunion;
mod searching;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;

use super::*;
use crate::{
    DhtError,
    core::message::{Content, Finding, Record},
};

struct World {
    now: Moment,
    wall: WallTime,
    nodes: BTreeMap<PeerId, Node>,
    down: BTreeSet<PeerId>,
    /// Peers that reach only each other, as all others do.
    apart: BTreeSet<PeerId>,
    /// Callers by their inbound ticket at a callee.
    inbound: BTreeMap<(PeerId, Ticket), (PeerId, CallId)>,
    log: Vec<(PeerId, PeerId, Ask)>,
    done: Vec<(PeerId, Output)>,
    next_ticket: Ticket,
    skew: BTreeMap<PeerId, f64>,
}

fn peer(n: u8) -> PeerId {
    PeerId::from_bytes(&[&[0x12, 0x20], &[n; 32][..]].concat()).unwrap()
}

fn config() -> DhtConfig {
    DhtConfig::default()
}

fn item(key: &str, value: &str, expiration: f64) -> StoreItem {
    let value = Bytes::copy_from_slice(value.as_bytes());
    StoreItem { key: DhtId::of_text(key), subkey: None, value, expiration: WallTime(expiration) }
}

impl World {
    fn new() -> Self {
        World {
            now: Moment::START,
            wall: WallTime(1000.0),
            nodes: BTreeMap::new(),
            down: BTreeSet::new(),
            apart: BTreeSet::new(),
            inbound: BTreeMap::new(),
            log: Vec::new(),
            done: Vec::new(),
            next_ticket: 0,
            skew: BTreeMap::new(),
        }
    }

    fn add(&mut self, n: u8, initial: &[PeerId], config: DhtConfig) -> PeerId {
        let local = peer(n);
        self.nodes.insert(local, Node::new(config, local, n.into(), Bans::new(), initial.to_vec()));
        self.tell(local, Input::Tick);
        local
    }

    fn of(count: u8) -> Self {
        let mut world = World::new();
        for n in 1..=count {
            let initial: Vec<PeerId> = (n > 1).then(|| peer(1)).into_iter().collect();
            world.add(n, &initial, config());
        }
        world
    }

    fn node(&mut self, peer: PeerId) -> &mut Node {
        self.nodes.get_mut(&peer).unwrap()
    }

    fn wall_of(&self, peer: PeerId) -> WallTime {
        self.wall + self.skew.get(&peer).copied().unwrap_or(0.0)
    }

    /// Tells a node something and carries out all that follows from it.
    fn tell(&mut self, peer: PeerId, input: Input) {
        let mut inputs = vec![(peer, input)];
        while let Some((peer, input)) = inputs.pop() {
            let (now, wall) = (self.now, self.wall_of(peer));
            let node = self.nodes.get_mut(&peer).unwrap();
            node.handle(now, wall, input);
            let mut outputs: Vec<Output> = std::iter::from_fn(|| node.poll()).collect();
            if node.poll_timeout().is_some_and(|at| at <= now) {
                inputs.push((peer, Input::Tick));
            }
            for output in outputs.drain(..) {
                self.perform(peer, output, &mut inputs);
            }
        }
    }

    fn perform(&mut self, local: PeerId, output: Output, inputs: &mut Vec<(PeerId, Input)>) {
        match output {
            Output::Call { call, peer: callee, request, .. } => {
                self.log.push((local, callee, request.ask.clone()));
                let is_apart = self.apart.contains(&local) != self.apart.contains(&callee);
                if self.down.contains(&callee) || is_apart || !self.nodes.contains_key(&callee) {
                    let input = Input::Failed { call, reason: "down".to_owned(), peer_at_fault: true };
                    return inputs.push((local, input));
                }
                self.next_ticket += 1;
                self.inbound.insert((callee, self.next_ticket), (local, call));
                inputs.push((callee, Input::Inbound { ticket: self.next_ticket, peer: local, request }));
            }
            Output::Reply { ticket, response } => {
                let (caller, call) = self.inbound.remove(&(local, ticket)).expect("an inbound call is answered once");
                inputs.push((caller, Input::Answered { call, response }));
            }
            done => self.done.push((local, done)),
        }
    }

    fn advance(&mut self, by: Duration) {
        let end = self.now + by;
        loop {
            let next = self.nodes.iter().filter_map(|(peer, node)| Some((node.poll_timeout()?, *peer))).min();
            let Some((at, peer)) = next.filter(|(at, _)| *at <= end) else { break };
            self.wall = self.wall + at.since(self.now).as_secs_f64();
            self.now = self.now.max(at);
            self.tell(peer, Input::Tick);
        }
        self.wall = self.wall + end.since(self.now).as_secs_f64();
        self.now = end;
    }

    fn store(&mut self, peer: PeerId, items: Vec<StoreItem>) -> Vec<Outcome> {
        self.next_ticket += 1;
        let (ticket, deadline) = (self.next_ticket, self.now + Duration::from_secs(60));
        self.tell(peer, Input::Store { ticket, items, deadline });
        match self.done.pop() {
            Some((_, Output::Stored { outcomes, .. })) => outcomes,
            other => panic!("{other:?}"),
        }
    }

    fn get(&mut self, peer: PeerId, key: &str, freshness: Freshness) -> Option<Timed<Stored>> {
        self.next_ticket += 1;
        let (ticket, deadline) = (self.next_ticket, self.now + Duration::from_secs(60));
        self.tell(peer, Input::Get { ticket, keys: vec![DhtId::of_text(key)], freshness, deadline });
        match self.done.pop() {
            Some((_, Output::Got { mut values, .. })) => values.pop().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn calls(&self, matching: impl Fn(&Ask) -> bool) -> usize {
        self.log.iter().filter(|(_, _, ask)| matching(ask)).count()
    }
}

fn finds(ask: &Ask) -> bool {
    matches!(ask, Ask::Find(_))
}

fn regular(value: &str) -> Stored {
    Stored::Regular(Bytes::copy_from_slice(value.as_bytes()))
}

#[test]
fn a_record_goes_to_the_nearest_replicas() {
    let mut world = World::of(30);
    let outcomes = world.store(peer(9), vec![item("key", "value", 2000.0)]);
    assert_eq!(outcomes, [Outcome { stored: true, elsewhere: true }]);
    let key = DhtId::of_text("key");
    let mut nodes: Vec<(DhtId, bool)> =
        world.nodes.values().map(|node| (node.own.distance(&key), node.storage.contains(&key))).collect();
    nodes.sort_unstable();
    let holders: Vec<bool> = nodes.iter().map(|(_, holds)| *holds).collect();
    assert_eq!(holders, [vec![true; 5], vec![false; 25]].concat());
}

#[test]
fn a_dead_replica_is_replaced_by_the_next() {
    let mut world = World::of(30);
    let key = DhtId::of_text("key");
    let nearest = world.nodes.values().min_by_key(|node| node.own.distance(&key)).unwrap().local_peer;
    world.down.insert(nearest);
    let asker = if nearest == peer(2) { peer(3) } else { peer(2) };
    world.store(asker, vec![item("key", "value", 2000.0)]);
    let holders = world.nodes.values().filter(|node| node.storage.contains(&key)).count();
    assert_eq!(holders, 5);
    assert!(world.node(asker).bans.is_banned(Moment::START, &nearest));
}

#[test]
fn one_refusal_does_not_hide_that_others_took_the_record() {
    let mut world = World::of(3);
    // One replica already holds a later value.
    let later = Record::of_item(&item("key", "later", 3000.0));
    let request = Request { sender: None, ask: Ask::Store(vec![later]) };
    let holder = world.node(peer(3));
    holder.handle(Moment::START, WallTime(1000.0), Input::Inbound { ticket: 0, peer: peer(77), request });
    assert!(matches!(holder.poll(), Some(Output::Reply { .. })));
    let outcomes = world.store(peer(1), vec![item("key", "earlier", 2000.0)]);
    assert_eq!(outcomes, [Outcome { stored: true, elsewhere: true }]);
}

#[test]
fn a_client_is_no_replica_and_in_no_table() {
    let mut world = World::of(3);
    let client = world.add(50, &[peer(1)], DhtConfig::client());
    assert!(world.node(client).join.state().joined);
    let outcomes = world.store(client, vec![item("key", "value", 2000.0)]);
    assert_eq!(outcomes, [Outcome { stored: true, elsewhere: true }]);
    assert_eq!(world.node(client).storage.records(), 0);
    assert!(world.nodes.values().all(|node| node.table.nodes().all(|contact| contact.peer != client)));
    assert!(world.log.iter().all(|(_, callee, _)| *callee != client), "nobody calls a client");
}

#[test]
fn a_lone_client_cannot_store() {
    let mut world = World::new();
    let client = world.add(50, &[], DhtConfig::client());
    assert_eq!(world.store(client, vec![item("key", "value", 2000.0)]), [Outcome::default()]);
}

#[test]
fn any_value_ends_a_search_and_the_latest_needs_the_whole_one() {
    let mut world = World::of(12);
    world.store(peer(2), vec![item("key", "old", 2000.0)]);
    let newer = Record::of_item(&item("key", "new", 2500.0));
    let key = DhtId::of_text("key");
    let farther =
        world.nodes.values().filter(|node| node.storage.contains(&key)).map(|n| n.local_peer).next_back().unwrap();
    let request = Request { sender: None, ask: Ask::Store(vec![newer]) };
    let node = world.node(farther);
    node.handle(Moment::START, WallTime(1000.0), Input::Inbound { ticket: 0, peer: peer(77), request });
    node.poll();
    let outsider = world.nodes.values().find(|node| !node.storage.contains(&key)).unwrap().local_peer;
    assert!(world.get(outsider, "key", Freshness::Valid).is_some());
    let latest = world.get(outsider, "key", Freshness::Latest).unwrap();
    assert_eq!(latest, Timed { value: regular("new"), expiration: WallTime(2500.0) });
}

#[test]
fn what_was_found_is_read_from_the_cache_next_time() {
    let mut world = World::of(12);
    world.store(peer(2), vec![item("key", "value", 2000.0)]);
    let key = DhtId::of_text("key");
    let outsider = world.nodes.values().find(|node| node.peer_has_nothing(&key)).unwrap().local_peer;
    world.get(outsider, "key", Freshness::Valid).unwrap();
    let before = world.calls(finds);
    world.get(outsider, "key", Freshness::Valid).unwrap();
    assert_eq!(world.calls(finds), before);
}

impl Node {
    fn peer_has_nothing(&self, key: &DhtId) -> bool {
        !self.storage.contains(key)
    }
}

#[test]
fn a_cached_value_that_is_read_is_fetched_again_before_it_expires() {
    let mut world = World::of(12);
    world.store(peer(2), vec![item("key", "value", 1060.0)]);
    let key = DhtId::of_text("key");
    let outsider = world.nodes.values().find(|node| node.peer_has_nothing(&key)).unwrap().local_peer;
    world.get(outsider, "key", Freshness::Valid).unwrap();
    world.get(outsider, "key", Freshness::Valid).unwrap();
    world.store(peer(2), vec![item("key", "value", 1120.0)]);
    world.advance(Duration::from_secs(54));
    assert_eq!(world.node(outsider).cache.records().expiration(&key), Some(WallTime(1060.0)));
    world.advance(Duration::from_secs(2));
    assert_eq!(world.node(outsider).cache.records().expiration(&key), Some(WallTime(1120.0)));
    let before = world.calls(finds);
    world.advance(Duration::from_secs(300));
    assert_eq!(world.calls(finds), before, "what nobody reads is not refreshed");
}

#[test]
fn concurrent_gets_of_one_key_share_a_search() {
    let mut world = World::of(4);
    let node = world.node(peer(4));
    let deadline = Moment::START + Duration::from_secs(9);
    for ticket in [900, 901, 902] {
        let keys = vec![DhtId::of_text("key")];
        node.handle(
            Moment::START,
            WallTime(1000.0),
            Input::Get { ticket, keys, freshness: Freshness::Valid, deadline },
        );
    }
    assert_eq!(node.searches.len(), 1);
    node.handle(Moment::START, WallTime(1000.0), Input::Abandoned { ticket: 900 });
    assert_eq!(node.lookups.len(), 1, "others still wait");
    node.handle(deadline, WallTime(1009.0), Input::Tick);
    assert!(node.lookups.is_empty() && node.searches.is_empty() && node.gets.is_empty());
}

#[test]
fn a_newcomer_is_given_its_records_in_small_calls() {
    let mut world = World::of(1);
    let value = "x".repeat(100_000);
    let items: Vec<StoreItem> = (0..100).map(|n| item(&format!("key{n}"), &value, 2000.0)).collect();
    world.store(peer(1), items);
    world.log.clear();
    let newcomer = world.add(2, &[peer(1)], config());
    let sizes: Vec<usize> = world
        .log
        .iter()
        .filter_map(|(_, callee, ask)| match ask {
            Ask::Store(records) if *callee == newcomer => Some(records.iter().map(Record::size).sum()),
            _ => None,
        })
        .collect();
    assert!(sizes.len() > 1 && sizes.iter().all(|size| *size < 2 << 20), "{sizes:?}");
    // One peer may fill a quarter of a storage; these ten megabytes are below it.
    assert_eq!(world.node(newcomer).storage.records(), 100);
    assert!(world.node(peer(1)).handovers.is_empty());
}

#[test]
fn what_never_expires_ends_with_its_life_and_is_handed_to_nobody() {
    let mut world = World::new();
    let brief = DhtConfig { max_record_life: 100.0, ..config() };
    let holder = world.add(1, &[], brief.clone());
    let entry = |subkey: u8, expiration| StoreItem {
        subkey: Some(Bytes::from(vec![subkey])),
        ..item("dictionary", "entry", expiration)
    };
    let eternal = [item("eternal", "value", f64::INFINITY), entry(1, f64::INFINITY)];
    let brief_ones = [item("brief", "value", 1090.0), entry(2, 1090.0)];
    world.store(holder, [eternal, brief_ones].concat());
    assert_eq!(world.node(holder).storage.records(), 4);
    let newcomer = world.add(2, &[holder], brief);
    let held = world.node(newcomer).storage.keys_after(None).collect::<BTreeSet<_>>();
    assert_eq!(held, BTreeSet::from([DhtId::of_text("brief"), DhtId::of_text("dictionary")]));
    assert_eq!(world.node(newcomer).storage.records(), 2);
    world.advance(Duration::from_secs(101));
    assert_eq!(world.get(holder, "eternal", Freshness::Latest), None);
    assert_eq!(world.node(holder).storage.records(), 0);
}

#[test]
fn bans_keep_a_dead_node_out_of_searches() {
    let mut world = World::of(6);
    world.down.insert(peer(5));
    world.get(peer(2), "a", Freshness::Latest);
    world.log.clear();
    world.get(peer(2), "b", Freshness::Latest);
    assert!(world.log.iter().all(|(_, callee, _)| *callee != peer(5)));
}

#[test]
fn made_up_neighbours_do_not_keep_a_search_alive() {
    let mut world = World::of(1);
    world.add(9, &[], config());
    let node = world.node(peer(1));
    let liar = Contact { id: DhtId([9; 20]), peer: peer(9) };
    node.met(liar);
    let (keys, deadline) = (vec![DhtId([0; 20])], Moment::START + Duration::from_secs(60));
    let get = Input::Get { ticket: 1, keys, freshness: Freshness::Latest, deadline };
    node.handle(Moment::START, WallTime(1000.0), get);
    let mut asked = 0u32;
    let mut next = 0u32;
    loop {
        let (call, keys) = match node.poll() {
            Some(Output::Call { call, request: Request { ask: Ask::Find(keys), .. }, .. }) => (call, keys),
            Some(Output::Got { .. }) => break,
            Some(_) => continue,
            None => panic!("the search neither ends nor goes on"),
        };
        asked += 1;
        assert!(asked as usize <= node.config.max_visits, "the search goes on for ever");
        // Each answer names nodes nearer than all before.
        let mut nearer = || {
            next += 1;
            let mut id = [0; 20];
            id[4..8].copy_from_slice(&(u32::MAX - next).to_be_bytes());
            Contact { id: DhtId(id), peer: PeerId::random() }
        };
        let findings =
            keys.iter().map(|_| Finding { value: None, nearest: (0..20).map(|_| nearer()).collect() }).collect();
        let response = Response { sender: None, tell: Tell::Find(findings) };
        node.handle(Moment::START, WallTime(1000.0), Input::Answered { call, response });
    }
}

#[test]
fn an_answer_of_the_wrong_length_counts_as_none() {
    let mut world = World::of(2);
    let node = world.node(peer(1));
    let (keys, deadline) = (vec![DhtId([0; 20])], Moment::START + Duration::from_secs(60));
    node.handle(Moment::START, WallTime(1000.0), Input::Get { ticket: 1, keys, freshness: Freshness::Valid, deadline });
    let Some(Output::Call { call, .. }) = node.poll() else { panic!("a call") };
    let response = Response { sender: None, tell: Tell::Find(Vec::new()) };
    node.handle(Moment::START, WallTime(1000.0), Input::Answered { call, response });
    assert_eq!(node.poll(), Some(Output::Got { ticket: 1, values: vec![None] }));
}

#[test]
fn a_clock_that_is_off_is_named() {
    let mut world = World::of(1);
    world.skew.insert(peer(2), 10.0);
    let late = world.add(2, &[peer(1)], config());
    let state = world.node(late).join.state();
    let Some(DhtError::ClockSkew { skew, peer: by }) = state.problem.clone() else { panic!("{state:?}") };
    assert_eq!((skew, by, state.joined), (10.0, peer(1), false));
    world.skew.insert(peer(2), 2.0);
    world.advance(Duration::from_secs(5));
    assert!(world.node(late).join.state().joined, "3 s are tolerated");
}

#[test]
fn a_bootstrap_that_is_down_is_asked_again_until_it_answers() {
    let mut world = World::of(1);
    world.down.insert(peer(1));
    let node = world.add(2, &[peer(1)], config());
    world.advance(Duration::from_secs(600));
    let pings = world.calls(|ask| *ask == Ask::Ping { validate: true });
    assert!((15..60).contains(&pings), "{pings} pings in ten minutes");
    let problem = world.node(node).join.state().problem.as_ref().unwrap().to_string();
    assert!(problem.contains(&peer(1).to_string()) && problem.contains("down"), "{problem}");
    world.down.clear();
    world.advance(Duration::from_secs(31));
    assert!(world.node(node).join.state().joined);
    assert_eq!(world.node(node).poll_timeout(), None, "nothing is left to do");
}

#[test]
fn who_lost_everybody_joins_again() {
    let mut world = World::of(2);
    world.down.insert(peer(1));
    world.get(peer(2), "key", Freshness::Latest);
    assert!(!world.node(peer(2)).join.state().joined);
    world.down.clear();
    world.advance(Duration::from_secs(60));
    assert!(world.node(peer(2)).join.state().joined);
    assert_eq!(world.node(peer(2)).table.len(), 1);
}

#[test]
fn a_node_that_cannot_be_reached_back_is_told_so() {
    let mut world = World::of(1);
    world.down.insert(peer(2));
    let hidden = world.add(2, &[peer(1)], config());
    let problem = world.node(hidden).join.state().problem.as_ref().unwrap().to_string();
    assert!(problem.contains("cannot reach this node") && problem.contains("client mode"), "{problem}");
    let client = world.add(3, &[peer(1)], DhtConfig::client());
    assert!(world.node(client).join.state().joined, "a client need not be reached");
}

#[test]
fn subkeys_have_one_form() {
    let mut world = World::of(1);
    // The integer 5, written in one byte and in nine.
    let forms: [&'static [u8]; 2] = [&[0x05], &[0xcf, 0, 0, 0, 0, 0, 0, 0, 5]];
    let record = |subkey: &'static [u8], expiration| Record {
        key: DhtId([3; 20]),
        content: Content::Item {
            subkey: Bytes::from_static(subkey),
            value: Bytes::from_static(b"\x01"),
            expiration: WallTime(expiration),
        },
        in_cache: false,
    };
    let broken = record(&[0xc1], 2000.0);
    let request =
        Request { sender: None, ask: Ask::Store(vec![record(forms[0], 2000.0), record(forms[1], 2001.0), broken]) };
    let node = world.node(peer(1));
    node.handle(Moment::START, WallTime(1000.0), Input::Inbound { ticket: 5, peer: peer(8), request });
    let Some(Output::Reply { response: Response { tell: Tell::Store(ok), .. }, .. }) = node.poll() else { panic!() };
    assert_eq!(ok, [true, true, false]);
    assert_eq!(node.storage.records(), 1);
}
