//! One iterative search for the nodes nearest to several keys at once (§6.9). Values found on the way are the caller's.

use std::collections::{BTreeMap, BTreeSet};

use super::bucket::Contact;
use crate::DhtId;

/// How wide a search looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Breadth {
    /// A candidate is asked while it is nearer than the worst of so many best.
    pub beam_size: usize,
    /// Calls at the same time.
    pub num_workers: usize,
    /// Keys in one call.
    pub queries_per_call: usize,
    /// Nodes asked for one key, however near the next one claims to be.
    pub max_visits: usize,
}

/// A node by its distance to the key.
type Ranked = (DhtId, Contact);

/// Contacts that one query remembers, per place in its beam: bounds what made-up neighbours cost.
const KNOWN_PER_PLACE: usize = 32;

#[derive(Debug, Default)]
struct Query {
    /// Known and not yet asked.
    candidates: BTreeSet<Ranked>,
    /// The best so far that have not failed.
    nearest: BTreeSet<Ranked>,
    /// Those of them that answered.
    answered: BTreeSet<Ranked>,
    known: BTreeSet<DhtId>,
    visits: usize,
    active: usize,
    done: bool,
}

impl Query {
    /// The nearest candidate worth asking.
    fn candidate(&self, breadth: &Breadth) -> Option<Ranked> {
        if self.done || self.visits >= breadth.max_visits {
            return None;
        }
        let best = self.candidates.first().copied()?;
        let worst_kept = self.nearest.iter().nth(breadth.beam_size.saturating_sub(1));
        worst_kept.is_none_or(|worst| best.0 <= worst.0).then_some(best)
    }

    fn learn(&mut self, key: &DhtId, contact: Contact, breadth: &Breadth) {
        let room = self.known.len() < breadth.beam_size * KNOWN_PER_PLACE;
        if room && self.known.insert(contact.id) {
            let ranked = (contact.id.distance(key), contact);
            self.candidates.insert(ranked);
            self.nearest.insert(ranked);
        }
    }
}

/// A search; each call it makes is answered or failed exactly once.
#[derive(Debug)]
pub(crate) struct Search {
    breadth: Breadth,
    queries: BTreeMap<DhtId, Query>,
    active: usize,
    /// Queries that finished and were not reported yet.
    finished: Vec<DhtId>,
}

impl Search {
    /// Starts from `initial` nodes of each key; `own` is never asked.
    pub fn new(breadth: Breadth, own: DhtId, keys: impl IntoIterator<Item = (DhtId, Vec<Contact>)>) -> Self {
        let mut queries = BTreeMap::new();
        for (key, initial) in keys {
            let mut query = Query { known: BTreeSet::from([own]), ..Query::default() };
            initial.into_iter().for_each(|contact| query.learn(&key, contact, &breadth));
            queries.insert(key, query);
        }
        let mut search = Self { breadth, queries, active: 0, finished: Vec::new() };
        search.settle();
        search
    }

    /// The next call: whom to ask, and for which keys. `None` while enough calls are under way or nobody is left.
    pub fn next_call(&mut self) -> Option<(Contact, Vec<DhtId>)> {
        if self.active >= self.breadth.num_workers {
            return None;
        }
        let (_, _, chosen, contact) = self
            .queries
            .iter()
            .filter_map(|(key, query)| {
                let (distance, contact) = query.candidate(&self.breadth)?;
                Some((query.active, distance, *key, contact))
            })
            .min()?;
        let mut others: Vec<(DhtId, DhtId)> = self
            .queries
            .iter()
            .filter(|(key, query)| **key != chosen && !query.done && self.may_ask(key, &contact))
            .map(|(key, _)| (contact.id.distance(key), *key))
            .collect();
        others.sort_unstable();
        let extra = others.into_iter().map(|(_, key)| key).take(self.breadth.queries_per_call.saturating_sub(1));
        let keys: Vec<DhtId> = std::iter::once(chosen).chain(extra).collect();
        for key in &keys {
            let query = self.queries.get_mut(key).expect("the keys come from the queries");
            query.learn(key, contact, &self.breadth);
            query.candidates.remove(&(contact.id.distance(key), contact));
            query.active += 1;
            query.visits += 1;
        }
        self.active += 1;
        Some((contact, keys))
    }

    /// Whether a query has not asked this node yet.
    fn may_ask(&self, key: &DhtId, contact: &Contact) -> bool {
        let query = &self.queries[key];
        !query.known.contains(&contact.id) || query.candidates.contains(&(contact.id.distance(key), *contact))
    }

    /// Takes in the neighbours that a node named for each key it was asked for.
    pub fn on_answer(&mut self, contact: Contact, answers: Vec<(DhtId, Vec<Contact>)>) {
        self.active -= 1;
        for (key, neighbours) in answers {
            let Some(query) = self.queries.get_mut(&key) else { continue };
            query.active -= 1;
            query.answered.insert((contact.id.distance(&key), contact));
            neighbours.into_iter().for_each(|neighbour| query.learn(&key, neighbour, &self.breadth));
        }
        self.settle();
    }

    /// A node did not answer: it counts for nothing any more, whatever key is looked for.
    pub fn on_failure(&mut self, contact: Contact, keys: &[DhtId]) {
        self.active -= 1;
        for (key, query) in &mut self.queries {
            let ranked = (contact.id.distance(key), contact);
            query.nearest.remove(&ranked);
            query.candidates.remove(&ranked);
            query.answered.remove(&ranked);
            if keys.contains(key) {
                query.active -= 1;
            }
        }
        self.settle();
    }

    /// Ends the search for a key: what was found is good enough.
    pub fn finish(&mut self, key: &DhtId) {
        if let Some(query) = self.queries.get_mut(key).filter(|query| !query.done) {
            query.done = true;
            self.finished.push(*key);
        }
    }

    /// Keys whose search has ended since the last call.
    pub fn take_finished(&mut self) -> Vec<DhtId> {
        std::mem::take(&mut self.finished)
    }

    /// Whether every key's search has ended.
    pub fn is_done(&self) -> bool {
        self.queries.values().all(|query| query.done)
    }

    /// The nearest nodes that have not failed, nearest first, at most a beam.
    pub fn nearest(&self, key: &DhtId) -> Vec<Contact> {
        let ranked = self.queries.get(key).into_iter().flat_map(|query| &query.nearest);
        ranked.map(|(_, contact)| *contact).take(self.breadth.beam_size).collect()
    }

    /// The nodes that answered for a key, nearest first.
    pub fn answered(&self, key: &DhtId) -> impl Iterator<Item = Contact> {
        self.queries.get(key).into_iter().flat_map(|query| &query.answered).map(|(_, contact)| *contact)
    }

    /// A query ends when nobody is left to ask and no call is under way.
    fn settle(&mut self) {
        let breadth = self.breadth;
        for (key, query) in &mut self.queries {
            if !query.done && query.active == 0 && query.candidate(&breadth).is_none() {
                query.done = true;
                self.finished.push(*key);
            }
        }
    }
}
