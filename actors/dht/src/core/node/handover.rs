//! Giving a new node the records that it should hold (§6.3), in calls well below the limit of a frame. hivemind sends all
//! in one message, which is lost above 4 MiB.

use super::{
    Ask, Contact, Node, Purpose,
    put::{BATCH_BYTES, BATCH_RECORDS},
};
use crate::{DhtId, core::message::Record};

/// Records on their way to one new node.
#[derive(Debug)]
pub(super) struct Handover {
    to: Contact,
    /// The last key looked at.
    cursor: Option<DhtId>,
    is_calling: bool,
}

impl Handover {
    pub fn is_idle(&self) -> bool {
        !self.is_calling
    }
}

/// New nodes that are served at the same time; others rely on the next announcement.
const MAX_HANDOVERS: usize = 32;
/// Keys looked at before something else gets its turn.
const KEYS_PER_TURN: usize = 256;

impl Node {
    pub(super) fn start_handover(&mut self, to: Contact) {
        // A peer that shows one id after the other is served once at a time.
        let is_served = self.handovers.values().any(|handover| handover.to.peer == to.peer);
        let is_full = is_served || self.handovers.len() >= MAX_HANDOVERS;
        if self.storage.records() == 0 || self.config.client_mode || is_full {
            return;
        }
        let id = self.fresh_id();
        self.handovers.insert(id, Handover { to, cursor: None, is_calling: false });
    }

    /// Gives every hand-over that is not waiting for an answer a turn.
    pub(super) fn advance_handovers(&mut self) {
        let idle: Vec<u64> = self.handovers.iter().filter(|(_, h)| h.is_idle()).map(|(id, _)| *id).collect();
        for id in idle {
            self.advance_handover(id);
        }
    }

    fn advance_handover(&mut self, id: u64) {
        let Some(Handover { to, cursor, .. }) = self.handovers.get(&id) else { return };
        let to = *to;
        // What lives longer ends here: handed from node to node it would live for ever.
        let latest = self.wall + self.config.max_record_life;
        let keys: Vec<DhtId> = self.storage.keys_after(*cursor).take(KEYS_PER_TURN).collect();
        let Some(last) = keys.last().copied() else {
            self.handovers.remove(&id);
            return;
        };
        let mut cursor = Some(last);
        let mut records = Vec::new();
        let mut size = 0;
        for key in keys {
            if !self.should_hand_over(&key, &to) {
                continue;
            }
            let stored = self.storage.get(self.wall, &key).and_then(|stored| stored.ending_by(latest));
            let Some(stored) = stored else { continue };
            let record = Record::of_stored(key, stored, false);
            size += record.size();
            records.push(record);
            if size >= BATCH_BYTES || records.len() >= BATCH_RECORDS {
                cursor = Some(key);
                break;
            }
        }
        let is_calling = !records.is_empty();
        self.handovers.insert(id, Handover { to, cursor, is_calling });
        if is_calling {
            self.call(to.peer, Ask::Store(records), Purpose::Handover { id });
        }
    }

    pub(super) fn on_handed_over(&mut self, id: u64, answered: bool) {
        if !answered {
            self.handovers.remove(&id);
        } else if let Some(handover) = self.handovers.get_mut(&id) {
            handover.is_calling = false;
        }
    }

    /// Whether the new node belongs to the nearest ones of a key, and we are the one to tell it: the nearest of those
    /// that held it so far.
    fn should_hand_over(&self, key: &DhtId, to: &Contact) -> bool {
        let replicas = self.config.num_replicas;
        let others = self.table.nearest(key, replicas, Some(to.id));
        let is_needed = others.len() < replicas
            || others.last().is_some_and(|farthest| to.id.distance(key) < farthest.id.distance(key));
        let is_ours = others.first().is_none_or(|nearest| self.own.distance(key) < nearest.id.distance(key));
        is_needed && is_ours
    }
}
