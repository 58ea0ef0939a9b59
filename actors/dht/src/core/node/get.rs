//! Getting values: from here if that will do, else by one search per key, shared by all who want it (§6.9, §6.10).

use skep_kernel::Moment;

use super::{Ask, For, Node, Output, Purpose, Ticket};
use crate::{
    DhtId, Freshness, Stored, Timed,
    core::{
        bucket::Contact,
        message::{Finding, Record},
        search::{Search, Standing},
    },
};

/// A get command: its values in the order of its keys.
#[derive(Debug)]
pub(super) struct Get {
    values: Vec<Option<Timed<Stored>>>,
    open: usize,
    pub deadline: Moment,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    slot: usize,
    freshness: Freshness,
}

/// One key that is being looked for.
#[derive(Debug)]
pub(super) struct Lookup {
    search: u64,
    best: Option<Timed<Stored>>,
    /// Who told us more than we knew last.
    source: Option<Contact>,
    waiters: Vec<Waiter>,
    /// Searched to the end even if nobody waits: a cache refresh.
    background: bool,
}

impl Lookup {
    fn wants_more(&self) -> bool {
        self.background || self.waiters.iter().any(|waiter| waiter.freshness == Freshness::Latest)
    }
}

impl Node {
    pub(super) fn start_get(&mut self, ticket: Ticket, keys: Vec<DhtId>, freshness: Freshness, deadline: Moment) {
        let get = Get { values: vec![None; keys.len()], open: keys.len(), deadline };
        self.gets.insert(ticket, get);
        let mut unknown = Vec::new();
        for (slot, key) in keys.into_iter().enumerate() {
            let local = self.read_local(&key);
            let waiter = Waiter { ticket, slot, freshness };
            let shared = self.lookups.get(&key).and_then(|lookup| lookup.best.clone());
            let known = local.clone().or(shared).and_then(|best| best.valid_at(self.wall));
            match (freshness, known) {
                (Freshness::Valid, Some(value)) => self.fill(&key, waiter, Some(value)),
                _ => self.wait_for(key, waiter, local, &mut unknown),
            }
        }
        self.look_for(unknown);
        self.complete(ticket);
    }

    fn wait_for(&mut self, key: DhtId, waiter: Waiter, local: Option<Timed<Stored>>, unknown: &mut Vec<DhtId>) {
        let lookup = self.lookups.entry(key).or_insert_with(|| {
            unknown.push(key);
            Lookup { search: 0, best: local, source: None, waiters: Vec::new(), background: false }
        });
        lookup.waiters.push(waiter);
    }

    /// Fetches cached values that were read again before they expire.
    pub(super) fn refresh_cache(&mut self) {
        for key in self.cache.take_due(self.wall, MAX_REFRESHES) {
            self.refresh(key);
        }
    }

    /// Looks a key up again though nobody waits for it.
    pub(super) fn refresh(&mut self, key: DhtId) {
        if self.lookups.contains_key(&key) {
            return;
        }
        let best = self.peek_local(&key);
        self.lookups.insert(key, Lookup { search: 0, best, source: None, waiters: Vec::new(), background: true });
        self.look_for(vec![key]);
    }

    /// Starts one search for keys that have a lookup but no search yet.
    fn look_for(&mut self, keys: Vec<DhtId>) {
        if keys.is_empty() {
            return;
        }
        let per_call = keys.len().isqrt().min(self.config.chunk_size);
        let search = self.start_search(keys.clone(), per_call, For::Lookups);
        for key in &keys {
            self.lookups.get_mut(key).expect("the caller made a lookup for each key").search = search;
        }
        self.drive(search);
    }

    pub(super) fn on_found(
        &mut self,
        search: u64,
        contact: Contact,
        standing: Standing,
        keys: Vec<DhtId>,
        findings: Vec<Finding>,
    ) {
        let mut neighbours = Vec::with_capacity(keys.len());
        for (key, finding) in keys.into_iter().zip(findings) {
            if let Some(value) = finding.value {
                self.on_value(key, contact, value);
            }
            neighbours.push((key, finding.nearest));
        }
        if let Some(running) = self.searches.get_mut(&search) {
            running.search.on_answer(contact, standing, neighbours);
            let enough = self.lookups.iter().filter(|(_, lookup)| {
                lookup.search == search && lookup.best.is_some() && !lookup.wants_more() && lookup.waiters.is_empty()
            });
            enough.for_each(|(key, _)| running.search.finish(key));
        }
        self.drive(search);
    }

    /// Takes in a value and serves those whom any valid one will do.
    fn on_value(&mut self, key: DhtId, source: Contact, value: Timed<Stored>) {
        let Some(value) = value.valid_at(self.wall) else { return };
        let Some(lookup) = self.lookups.get_mut(&key) else { return };
        let Some(value) = self.validators.believed(key, value) else { return };
        let improved = match &mut lookup.best {
            Some(best) => best.merge(value),
            none => {
                *none = Some(value);
                true
            }
        };
        if improved {
            lookup.source = Some(source);
        }
        let best = lookup.best.clone();
        let served: Vec<Waiter> =
            lookup.waiters.extract_if(.., |waiter| waiter.freshness == Freshness::Valid).collect();
        for waiter in served {
            self.fill(&key, waiter, best.clone());
            self.complete(waiter.ticket);
        }
    }

    /// The search for a key has ended: everybody gets the best there is, and what is new is cached.
    pub(super) fn conclude(&mut self, key: &DhtId, search: &Search) {
        let Some(lookup) = self.lookups.remove(key) else { return };
        let best = lookup.best.and_then(|best| best.valid_at(self.wall));
        for waiter in lookup.waiters {
            self.fill(key, waiter, best.clone());
            self.complete(waiter.ticket);
        }
        let (Some(best), Some(source)) = (best, lookup.source) else { return };
        if self.config.cache_locally {
            self.cache.records().store_any(self.wall, *key, &best, None);
        }
        let lacking: Vec<Contact> =
            search.answered(key).filter(|node| *node != source).take(self.config.cache_nearest).collect();
        for node in lacking {
            let record = Record::of_stored(*key, best.clone(), true);
            self.call(node.peer, Ask::Store(vec![record]), Purpose::CacheElsewhere);
        }
    }

    pub(super) fn forget_waiter(&mut self, ticket: Ticket) {
        let mut idle = Vec::new();
        for (key, lookup) in &mut self.lookups {
            lookup.waiters.retain(|waiter| waiter.ticket != ticket);
            if lookup.waiters.is_empty() && !lookup.background {
                idle.push((*key, lookup.search));
            }
        }
        for (key, search) in idle {
            if let Some(running) = self.searches.get_mut(&search) {
                running.search.finish(&key);
            }
            self.drive(search);
        }
    }

    fn fill(&mut self, key: &DhtId, waiter: Waiter, value: Option<Timed<Stored>>) {
        let value = value.map(|value| self.validators.stripped(*key, value));
        let Some(get) = self.gets.get_mut(&waiter.ticket) else { return };
        get.values[waiter.slot] = value;
        get.open -= 1;
    }

    fn complete(&mut self, ticket: Ticket) {
        if self.gets.get(&ticket).is_some_and(|get| get.open == 0) {
            let get = self.gets.remove(&ticket).expect("it was just seen");
            self.outputs.push_back(Output::Got { ticket, values: get.values });
        }
    }

    /// What this node holds of a key itself; in the cache it counts as read.
    fn read_local(&mut self, key: &DhtId) -> Option<Timed<Stored>> {
        let stored = self.storage.get(self.wall, key);
        let cached = self.cache.read(self.wall, key);
        later(stored, cached)
    }

    /// The same for others, whose reading does not keep a cached value alive.
    pub(super) fn peek_local(&mut self, key: &DhtId) -> Option<Timed<Stored>> {
        let stored = self.storage.get(self.wall, key);
        let cached = self.cache.records().get(self.wall, key);
        later(stored, cached)
    }
}

fn later(a: Option<Timed<Stored>>, b: Option<Timed<Stored>>) -> Option<Timed<Stored>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.expiration.0 > a.expiration.0 { b } else { a }),
        (a, b) => a.or(b),
    }
}

/// Cached values that are fetched anew at one time; the others follow at the next event.
const MAX_REFRESHES: usize = 64;
