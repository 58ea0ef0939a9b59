//! Driving searches: whom they ask, and how long they wait for whom.

use skep_kernel::Moment;

use super::{Ask, CallId, For, Node, Purpose};
use crate::{
    DhtId,
    core::{
        bucket::Contact,
        search::{Breadth, Search, Standing},
    },
};

#[derive(Debug)]
pub(super) struct Running {
    pub search: Search,
    pub purpose: For,
}

/// Keys that one find call names at the most.
const MAX_QUERIES_PER_CALL: usize = 64;
/// Calls at the same time to nodes that failed lately.
const MAX_ASIDE: usize = 32;

impl Node {
    fn breadth(&self, queries_per_call: usize) -> Breadth {
        Breadth {
            beam_size: self.config.bucket_size,
            num_workers: self.config.num_workers,
            queries_per_call: queries_per_call.clamp(1, MAX_QUERIES_PER_CALL),
            max_visits: self.config.max_visits,
            enough: self.config.num_replicas,
        }
    }

    pub(super) fn start_search(&mut self, keys: Vec<DhtId>, queries_per_call: usize, purpose: For) -> u64 {
        let initial: Vec<(DhtId, Vec<Contact>)> = keys
            .into_iter()
            .map(|key| {
                let nearest = self.table.nearest(&key, self.config.bucket_size, None);
                (key, nearest.into_iter().filter(|node| !self.bans.is_banned(self.now, &node.peer)).collect())
            })
            .collect();
        let id = self.fresh_id();
        let search = Search::new(self.breadth(queries_per_call), self.own, initial);
        self.searches.insert(id, Running { search, purpose });
        id
    }

    /// Makes the calls that a search wants and takes in what it has finished.
    pub(super) fn drive(&mut self, id: u64) {
        let Some(mut running) = self.searches.remove(&id) else { return };
        while let Some((contact, keys)) = running.search.next_call() {
            if contact.peer == self.local_peer || self.bans.is_banned(self.now, &contact.peer) {
                running.search.skip(contact, &keys);
            } else if !self.bans.is_suspect(&contact.peer) {
                self.ask_for(id, contact, keys, Standing::Prompt);
            } else if self.may_ask_aside(&contact) {
                running.search.set_aside(contact, &keys);
                self.ask_for(id, contact, keys, Standing::Aside);
            } else {
                running.search.skip(contact, &keys);
            }
        }
        let finished = running.search.take_finished();
        match running.purpose {
            For::Lookups => finished.iter().for_each(|key| self.conclude(key, &running.search)),
            For::Put(ticket) if running.search.is_done() => self.place(ticket, &running.search),
            For::Put(_) | For::Table => {}
        }
        if !running.search.is_done() {
            self.searches.insert(id, running);
        }
    }

    fn ask_for(&mut self, search: u64, contact: Contact, keys: Vec<DhtId>, standing: Standing) {
        let purpose = Purpose::Search { search, contact, keys: keys.clone(), standing };
        self.call(contact.peer, Ask::Find(keys), purpose);
    }

    /// Whether a node that failed lately may be asked once more: not while its last chance is open.
    fn may_ask_aside(&self, contact: &Contact) -> bool {
        let mut aside = 0;
        for pending in self.calls.values() {
            if matches!(pending.purpose, Purpose::Search { standing: Standing::Aside, .. }) {
                aside += 1;
                if pending.peer == contact.peer {
                    return false;
                }
            }
        }
        aside < MAX_ASIDE
    }

    /// When the next call of a search becomes slow.
    pub(super) fn next_slow_call(&self) -> Option<Moment> {
        self.slow_calls.front().map(|(at, _)| *at)
    }

    /// Lets searches go on where calls have not been answered for a while.
    pub(super) fn pass_over_slow_calls(&mut self) {
        while let Some((at, call)) = self.slow_calls.front().copied() {
            if self.calls.contains_key(&call) && at > self.now {
                return;
            }
            self.slow_calls.pop_front();
            self.pass_over(call);
        }
    }

    fn pass_over(&mut self, call: CallId) {
        let Some(pending) = self.calls.get_mut(&call) else { return };
        let Purpose::Search { search, contact, standing, .. } = &mut pending.purpose else { return };
        *standing = Standing::Slow;
        let (search, contact) = (*search, *contact);
        if let Some(running) = self.searches.get_mut(&search) {
            running.search.on_slow(contact);
        }
        self.drive(search);
    }

    pub(super) fn on_search_failed(&mut self, search: u64, contact: Contact, standing: Standing, keys: &[DhtId]) {
        if let Some(running) = self.searches.get_mut(&search) {
            running.search.on_failure(contact, standing, keys);
        }
        self.drive(search);
    }
}
