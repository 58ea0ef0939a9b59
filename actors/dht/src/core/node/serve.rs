//! Answering other nodes.

use libp2p_identity::PeerId;

use super::{Ask, Contact, Node, Output, Pending, Purpose, Response, Tell, Ticket};
use crate::{
    DhtId,
    core::{
        message::{Content, Finding, Record, Request},
        record::canonical_subkey,
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
            Ask::Store(records) => Tell::Store(records.iter().map(|record| self.take(record, peer)).collect()),
        };
        self.meet_caller(sender, peer);
        self.reply(ticket, tell);
    }

    /// A caller that we failed to reach lately is not believed to be reachable because it calls: its answer to a ping
    /// tells.
    fn meet_caller(&mut self, sender: Option<DhtId>, peer: PeerId) {
        let Some(id) = sender else { return };
        if !self.bans.is_banned(self.now, &peer) {
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

    fn take(&mut self, record: &Record, peer: PeerId) -> bool {
        let (now, key) = (self.wall, record.key);
        let storage = if record.in_cache { self.cache.records() } else { &mut self.storage };
        match &record.content {
            Content::Regular { value, expiration } => storage.store(now, key, value.clone(), *expiration, Some(peer)),
            Content::Item { subkey, value, expiration } => canonical_subkey(subkey)
                .is_some_and(|subkey| storage.store_item(now, key, subkey, value.clone(), *expiration, Some(peer))),
            Content::Dictionary(items) => storage.store_dictionary(now, key, items, Some(peer)),
        }
    }

    fn reply(&mut self, ticket: Ticket, tell: Tell) {
        let response = Response { sender: self.sender(), tell };
        self.outputs.push_back(Output::Reply { ticket, response });
    }
}
