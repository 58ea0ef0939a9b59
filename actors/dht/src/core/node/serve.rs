//! Answering other nodes.

use libp2p_identity::PeerId;

use super::{Ask, Contact, Node, Output, Pending, Purpose, Response, Tell, Ticket};
use crate::{
    DhtId,
    core::{
        message::{Content, Finding, Record, Request},
        record::canonical_subkey,
        validate::{DhtRecord, MAX_COSTLY_STORES},
    },
};

impl Node {
    pub(super) fn on_inbound(&mut self, ticket: Ticket, peer: PeerId, request: Request) {
        let Request { sender, ask } = request;
        let tell = match ask {
            Ask::Ping { validate } => {
                self.meet_caller(sender, peer);
                return self.on_ping(ticket, peer, sender.filter(|_| validate));
            }
            Ask::Find(keys) => Tell::Find(keys.iter().map(|key| self.find(key, sender)).collect()),
            Ask::Store(records) => {
                let mut costly = 0;
                Tell::Store(records.into_iter().map(|record| self.take(record, peer, &mut costly)).collect())
            }
        };
        self.meet_caller(sender, peer);
        self.reply(ticket, tell);
    }

    /// A caller that we failed to reach lately is not believed to be reachable because it calls: its answer to a ping
    /// tells.
    fn meet_caller(&mut self, sender: Option<DhtId>, peer: PeerId) {
        let Some(id) = sender else { return };
        if !self.bans.is_banned(self.now, &peer) {
            self.lost.found(&peer);
            return self.met(Contact { id, peer });
        }
        let is_asked = |pending: &Pending| pending.peer == peer && matches!(pending.purpose, Purpose::Check);
        if !self.calls.values().any(is_asked) {
            self.call(peer, Ask::Ping { validate: false }, Purpose::Check);
        }
    }

    /// A caller that wants to know whether it can be reached is pinged back before the answer (§6.4).
    fn on_ping(&mut self, ticket: Ticket, peer: PeerId, validate: Option<DhtId>) {
        match validate {
            Some(claimed) => self.call(peer, Ask::Ping { validate: false }, Purpose::PingBack { ticket, claimed }),
            None => self.reply_ping(ticket, false),
        }
    }

    pub(super) fn on_ping_back(&mut self, ticket: Ticket, available: bool) {
        self.reply_ping(ticket, available);
    }

    fn reply_ping(&mut self, ticket: Ticket, available: bool) {
        let dht_time = self.wall.0;
        self.reply(ticket, Tell::Ping { available, dht_time });
    }

    fn find(&mut self, key: &DhtId, caller: Option<DhtId>) -> Finding {
        Finding { value: self.peek_local(key), nearest: self.table.nearest(key, self.config.bucket_size, caller) }
    }

    /// Stores one record; `costly` counts those of the same call whose check took long.
    fn take(&mut self, record: Record, peer: PeerId, costly: &mut usize) -> bool {
        let (now, key) = (self.wall, record.key);
        let validators = &self.validators;
        let mut believes = |record: &DhtRecord| {
            *costly += usize::from(validators.is_costly(record));
            *costly <= MAX_COSTLY_STORES && validators.validate(record)
        };
        let storage = if record.in_cache { self.cache.records() } else { &mut self.storage };
        match record.content {
            Content::Regular { value, expiration } => {
                let record = DhtRecord::plain(key, value, expiration);
                believes(&record) && storage.store(now, key, record.value, expiration, Some(peer))
            }
            Content::Item { subkey, value, expiration } => {
                // What others will be told, so that a signature holds there, too.
                let Some(subkey) = canonical_subkey(&subkey) else { return false };
                let record = DhtRecord { key, subkey, value, expiration };
                believes(&record) && storage.store_item(now, key, record.subkey, record.value, expiration, Some(peer))
            }
            Content::Dictionary(mut items) => {
                let told = items.len();
                items.retain(|subkey, item| believes(&DhtRecord::of_entry(key, subkey, item)));
                // Every item that is valid is tried; hivemind refuses all for the sake of one.
                storage.store_dictionary(now, key, &items, Some(peer)) && items.len() == told
            }
        }
    }

    fn reply(&mut self, ticket: Ticket, tell: Tell) {
        let response = Response { sender: self.sender(), tell };
        self.outputs.push_back(Output::Reply { ticket, response });
    }
}
