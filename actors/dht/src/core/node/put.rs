//! Storing values at the nodes nearest to their keys (§6.9). What goes to one node goes in one call.

use std::collections::{BTreeMap, VecDeque};

use skep_kernel::Moment;

use super::{Ask, For, Node, Output, Purpose, Ticket};
use crate::{
    DhtId, StoreItem,
    core::{bucket::Contact, message::Record, search::Search},
};

/// What became of one item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// At least one node took it; hivemind tells the last answer instead.
    pub stored: bool,
    /// A node other than this one took it.
    pub elsewhere: bool,
}

/// A store command.
#[derive(Debug)]
pub(super) struct Put {
    items: Vec<StoreItem>,
    /// Items that are worth sending: what we would not believe ourselves is not stored anywhere.
    believed: Vec<bool>,
    outcomes: Vec<Outcome>,
    /// Nodes that may still be asked, by key, nearest first.
    spares: BTreeMap<DhtId, VecDeque<Contact>>,
    /// Calls under way.
    active: usize,
    pub deadline: Moment,
}

impl Node {
    pub(super) fn start_put(&mut self, ticket: Ticket, items: Vec<StoreItem>, deadline: Moment) {
        let signed: Vec<Option<StoreItem>> = items.iter().map(|item| self.validators.sign_own(item.clone())).collect();
        let believed = signed.iter().map(Option::is_some).collect();
        let items: Vec<StoreItem> =
            items.into_iter().zip(signed).map(|(item, signed)| signed.unwrap_or(item)).collect();
        let mut keys: Vec<DhtId> = items.iter().map(|item| item.key).collect();
        keys.sort_unstable();
        keys.dedup();
        let outcomes = vec![Outcome::default(); items.len()];
        self.puts.insert(ticket, Put { items, believed, outcomes, spares: BTreeMap::new(), active: 0, deadline });
        let per_call = keys.len().isqrt();
        let search = self.start_search(keys, per_call, For::Put(ticket));
        self.drive(search);
    }

    /// The nearest nodes are known: sends each item to `num_replicas` of them, ourselves included unless we are in
    /// client mode, where nobody could ask us.
    pub(super) fn place(&mut self, ticket: Ticket, search: &Search) {
        let Some(put) = self.puts.get(&ticket) else { return };
        let mut by_key: BTreeMap<DhtId, Vec<usize>> = BTreeMap::new();
        for (index, item) in put.items.iter().enumerate().filter(|(index, _)| put.believed[*index]) {
            by_key.entry(item.key).or_default().push(index);
        }
        let mut spares = BTreeMap::new();
        let mut sends: BTreeMap<Contact, Vec<usize>> = BTreeMap::new();
        for (key, indices) in by_key {
            let mut nodes = search.nearest(&key);
            if !self.config.client_mode {
                nodes.push(Contact { id: self.own, peer: self.local_peer });
            }
            nodes.sort_unstable_by_key(|node| node.id.distance(&key));
            let rest = nodes.split_off(self.config.num_replicas.min(nodes.len()));
            for node in nodes {
                sends.entry(node).or_default().extend(&indices);
            }
            spares.insert(key, rest.into());
        }
        self.puts.get_mut(&ticket).expect("it was just seen").spares = spares;
        self.send(ticket, sends);
    }

    fn send(&mut self, ticket: Ticket, sends: BTreeMap<Contact, Vec<usize>>) {
        for (contact, indices) in sends {
            if contact.peer == self.local_peer {
                self.put_here(ticket, &indices);
                continue;
            }
            for (records, items) in self.batches(ticket, &indices) {
                let Some(put) = self.puts.get_mut(&ticket) else { return };
                put.active += 1;
                self.call(contact.peer, Ask::Store(records), Purpose::Put { ticket, contact, items });
            }
        }
        self.finish_put(ticket);
    }

    fn put_here(&mut self, ticket: Ticket, indices: &[usize]) {
        let Some(put) = self.puts.get_mut(&ticket) else { return };
        for index in indices {
            let item = put.items[*index].clone();
            let stored = match item.subkey {
                Some(subkey) => self.storage.store_item(self.wall, item.key, subkey, item.value, item.expiration, None),
                None => self.storage.store(self.wall, item.key, item.value, item.expiration, None),
            };
            put.outcomes[*index].stored |= stored;
        }
    }

    /// Items cut into calls that stay well below the limit of a frame.
    fn batches(&self, ticket: Ticket, indices: &[usize]) -> Vec<(Vec<Record>, Vec<usize>)> {
        let Some(put) = self.puts.get(&ticket) else { return Vec::new() };
        let mut batches: Vec<(Vec<Record>, Vec<usize>)> = Vec::new();
        let mut size = 0;
        for index in indices {
            let record = Record::of_item(&put.items[*index]);
            let fits = size + record.size() <= BATCH_BYTES && batches.last().is_some_and(|b| b.0.len() < BATCH_RECORDS);
            if !fits {
                batches.push(Default::default());
                size = 0;
            }
            size += record.size();
            let (records, items) = batches.last_mut().expect("one was just pushed if there was none");
            records.push(record);
            items.push(*index);
        }
        batches
    }

    pub(super) fn on_put(&mut self, ticket: Ticket, _contact: Contact, indices: &[usize], ok: &[bool]) {
        let Some(put) = self.puts.get_mut(&ticket) else { return };
        put.active -= 1;
        for (index, stored) in indices.iter().zip(ok) {
            put.outcomes[*index].stored |= *stored;
            put.outcomes[*index].elsewhere |= *stored;
        }
        self.finish_put(ticket);
    }

    /// A node did not take its items: the next one gets them.
    pub(super) fn on_put_failed(&mut self, ticket: Ticket, indices: &[usize]) {
        let Some(put) = self.puts.get_mut(&ticket) else { return };
        put.active -= 1;
        let mut next: BTreeMap<DhtId, Option<Contact>> = BTreeMap::new();
        let mut sends: BTreeMap<Contact, Vec<usize>> = BTreeMap::new();
        for index in indices {
            let key = put.items[*index].key;
            let spare = next.entry(key).or_insert_with(|| {
                let spares = put.spares.get_mut(&key)?;
                std::iter::from_fn(|| spares.pop_front()).find(|node| !self.bans.is_banned(self.now, &node.peer))
            });
            if let Some(contact) = spare {
                sends.entry(*contact).or_default().push(*index);
            }
        }
        self.send(ticket, sends);
    }

    fn finish_put(&mut self, ticket: Ticket) {
        if self.puts.get(&ticket).is_none_or(|put| put.active > 0) {
            return;
        }
        let put = self.puts.remove(&ticket).expect("it was just seen");
        for (item, outcome) in put.items.iter().zip(&put.outcomes) {
            self.remember_put(item, outcome.stored);
        }
        self.outputs.push_back(Output::Stored { ticket, outcomes: put.outcomes });
    }

    /// What was stored is cached here too; what was refused is known elsewhere in a newer form (§6.10).
    fn remember_put(&mut self, item: &StoreItem, stored: bool) {
        if !self.config.cache_on_store || !self.config.cache_locally {
            return;
        }
        let (key, value, expiration) = (item.key, item.value.clone(), item.expiration);
        let cached = self.cache.records().contains(&key);
        match &item.subkey {
            _ if !stored && cached => self.refresh(key),
            _ if !stored => {}
            None => drop(self.cache.records().store(self.wall, key, value, expiration, None)),
            Some(subkey) if cached => {
                self.cache.records().store_item(self.wall, key, subkey.clone(), value, expiration, None);
            }
            // One item is not the dictionary: it would hide the others.
            Some(_) => {}
        }
    }
}

/// Bytes of records in one call; a frame takes 4 MiB.
pub(super) const BATCH_BYTES: usize = 1 << 20;
/// Records in one call.
pub(super) const BATCH_RECORDS: usize = 1024;
