//! One iterative search for the nodes nearest to several keys at once (§6.9). Values found on the way are the caller's.
//!
//! A node that does not answer must not hold the search up: where half of the network has just died, one dead node after
//! the other would cost its whole timeout. So a call that is slow gives its place to the next one while the search goes
//! on waiting for it ([`Search::on_slow`]), and nodes that failed lately are asked aside ([`Search::set_aside`]): what they
//! say is welcome, but nobody waits for it.

#[cfg(test)]
mod tests;

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
    /// So many nodes must have answered for a key before its search ends without those asked aside.
    pub enough: usize,
}

/// How much a search waits for one of its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It holds one of the `num_workers` places.
    Prompt,
    /// It lost its place, and is waited for all the same.
    Slow,
    /// It is waited for only while too few others answered.
    Aside,
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
    /// Calls that are waited for.
    active: usize,
    /// Calls to nodes that failed lately.
    aside: usize,
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

    fn learn(&mut self, key: &DhtId, contact: Contact, breadth: &Breadth, unheard: &BTreeSet<DhtId>) {
        let room = self.known.len() < breadth.beam_size * KNOWN_PER_PLACE;
        if room && self.known.insert(contact.id) && !unheard.contains(&contact.id) {
            let ranked = (contact.id.distance(key), contact);
            self.candidates.insert(ranked);
            self.nearest.insert(ranked);
        }
    }

    /// Counts a node for nothing, at least until it answers.
    fn pass_over(&mut self, key: &DhtId, contact: Contact) {
        let ranked = (contact.id.distance(key), contact);
        self.nearest.remove(&ranked);
        self.candidates.remove(&ranked);
        self.answered.remove(&ranked);
    }

    fn calls(&mut self, standing: Standing) -> &mut usize {
        if standing == Standing::Aside { &mut self.aside } else { &mut self.active }
    }

    /// Whether nobody is left to ask or to wait for.
    fn is_over(&self, breadth: &Breadth) -> bool {
        let waits = self.active > 0 || (self.aside > 0 && self.answered.len() < breadth.enough);
        !waits && self.candidate(breadth).is_none()
    }
}

/// A search; each call it makes is answered or failed exactly once.
#[derive(Debug)]
pub(crate) struct Search {
    breadth: Breadth,
    queries: BTreeMap<DhtId, Query>,
    /// Prompt calls under way.
    active: usize,
    /// Nodes that failed, or were asked and have kept us waiting since.
    unheard: BTreeSet<DhtId>,
    /// Queries that finished and were not reported yet.
    finished: Vec<DhtId>,
}

impl Search {
    /// Starts from `initial` nodes of each key; `own` is never asked.
    pub fn new(breadth: Breadth, own: DhtId, keys: impl IntoIterator<Item = (DhtId, Vec<Contact>)>) -> Self {
        let mut queries = BTreeMap::new();
        for (key, initial) in keys {
            let mut query = Query { known: BTreeSet::from([own]), ..Query::default() };
            initial.into_iter().for_each(|contact| query.learn(&key, contact, &breadth, &BTreeSet::new()));
            queries.insert(key, query);
        }
        let mut search = Self { breadth, queries, active: 0, unheard: BTreeSet::new(), finished: Vec::new() };
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
            query.learn(key, contact, &self.breadth, &self.unheard);
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
    pub fn on_answer(&mut self, contact: Contact, standing: Standing, answers: Vec<(DhtId, Vec<Contact>)>) {
        self.leave_place(standing);
        if self.unheard.remove(&contact.id) {
            // It may be asked for the other keys, too.
            for (key, query) in self.queries.iter_mut().filter(|(_, query)| !query.done) {
                if query.known.remove(&contact.id) {
                    query.learn(key, contact, &self.breadth, &self.unheard);
                }
            }
        }
        for (key, neighbours) in answers {
            let Some(query) = self.queries.get_mut(&key) else { continue };
            *query.calls(standing) -= 1;
            let ranked = (contact.id.distance(&key), contact);
            query.candidates.remove(&ranked);
            query.nearest.insert(ranked);
            query.answered.insert(ranked);
            neighbours.into_iter().for_each(|neighbour| query.learn(&key, neighbour, &self.breadth, &self.unheard));
        }
        self.settle();
    }

    /// A node did not answer: it counts for nothing any more, whatever key is looked for.
    pub fn on_failure(&mut self, contact: Contact, standing: Standing, keys: &[DhtId]) {
        self.leave_place(standing);
        self.pass_over(contact);
        for key in keys {
            self.queries.get_mut(key).into_iter().for_each(|query| *query.calls(standing) -= 1);
        }
        self.settle();
    }

    /// A prompt call takes long: others are asked meanwhile.
    pub fn on_slow(&mut self, contact: Contact) {
        self.leave_place(Standing::Prompt);
        self.pass_over(contact);
        self.settle();
    }

    /// The call that [`next_call`](Self::next_call) named last is not made. It counts as no visit.
    pub fn skip(&mut self, contact: Contact, keys: &[DhtId]) {
        self.uncount(keys);
        self.on_failure(contact, Standing::Prompt, keys);
    }

    /// The call that [`next_call`](Self::next_call) named last goes to a node that failed lately. It counts as no visit.
    pub fn set_aside(&mut self, contact: Contact, keys: &[DhtId]) {
        self.uncount(keys);
        self.leave_place(Standing::Prompt);
        self.pass_over(contact);
        for key in keys {
            let query = self.queries.get_mut(key).expect("the call was made for keys of this search");
            query.active -= 1;
            query.aside += 1;
        }
        self.settle();
    }

    fn uncount(&mut self, keys: &[DhtId]) {
        for key in keys {
            self.queries.get_mut(key).expect("the call was made for keys of this search").visits -= 1;
        }
    }

    fn leave_place(&mut self, standing: Standing) {
        self.active -= usize::from(standing == Standing::Prompt);
    }

    fn pass_over(&mut self, contact: Contact) {
        self.unheard.insert(contact.id);
        self.queries.iter_mut().for_each(|(key, query)| query.pass_over(key, contact));
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

    /// Ends the queries that are over.
    fn settle(&mut self) {
        let breadth = self.breadth;
        for (key, query) in &mut self.queries {
            if !query.done && query.is_over(&breadth) {
                query.done = true;
                self.finished.push(*key);
            }
        }
    }
}
