//! Parts of the protocol alone, without calls: for benchmarks that ask what each costs.

use bytes::Bytes;
use libp2p_identity::PeerId;
use skep_kernel::WallTime;

use crate::{
    DhtConfig, DhtId,
    core::{
        bucket::Contact,
        search::{Breadth, Search, Standing},
        storage::{Limits, Storage, WhenFull},
    },
};

/// A made-up network whose nodes know each other and answer at once.
pub struct Network {
    breadth: Breadth,
    nodes: Vec<Contact>,
}

impl Network {
    /// So many nodes, all at one peer, searched as the defaults say.
    pub fn of(peer: PeerId, nodes: usize) -> Self {
        let config = DhtConfig::default();
        let breadth = Breadth {
            beam_size: config.bucket_size,
            num_workers: config.num_workers,
            queries_per_call: 1,
            max_visits: config.max_visits,
            enough: config.num_replicas,
        };
        let contact = |number: usize| Contact { id: DhtId::of_text(&format!("node {number}")), peer };
        Self { breadth, nodes: (0..nodes).map(contact).collect() }
    }

    /// The nodes nearest to a key, as many as an answer names.
    pub fn nearest(&self, key: &DhtId) -> Near {
        let mut nodes = self.nodes.clone();
        nodes.sort_by_key(|node| node.id.distance(key));
        nodes.truncate(self.breadth.beam_size);
        Near(nodes)
    }

    /// Searches for a key from any one node, each of those asked naming the same ones. Gives the number of calls.
    ///
    /// # Panics
    /// When the search does not end with the last answer.
    pub fn lookup(&self, key: DhtId, near: &Near) -> usize {
        let mut search = Search::new(self.breadth, key, [(key, self.nodes[..1].to_vec())]);
        let mut calls = 0;
        while let Some((contact, keys)) = search.next_call() {
            let answers = keys.into_iter().map(|key| (key, near.0.clone())).collect();
            search.on_answer(contact, Standing::Prompt, answers);
            calls += 1;
        }
        assert!(search.is_done(), "every call was answered");
        calls
    }
}

/// Nodes that an answer names.
pub struct Near(Vec<Contact>);

/// Records of a node, within the default limits.
pub struct Records(Storage);

impl Records {
    /// None.
    pub fn none() -> Self {
        let config = DhtConfig::default();
        let limits = Limits {
            records: config.max_records,
            bytes: config.max_record_bytes,
            bytes_per_key: config.max_bytes_per_key,
            life: config.max_record_life,
        };
        Self(Storage::new(WhenFull::Refuse, limits))
    }

    /// Stores an item of a dictionary, as an announcement does, that is valid for a minute from `now`, in seconds. Whether
    /// it was taken: the same place takes a later one only.
    pub fn store(&mut self, now: f64, key: DhtId, subkey: Bytes, value: Bytes) -> bool {
        self.0.store_item(WallTime(now), key, subkey, value, WallTime(now + 60.0), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_asks_the_first_node_and_then_the_nearest() {
        let network = Network::of(PeerId::random(), 1000);
        let key = DhtId::of_text("expert.0");
        let near = network.nearest(&key);
        assert_eq!(network.lookup(key, &near), 1 + near.0.len());
    }

    #[test]
    fn a_later_announcement_replaces_the_earlier_one() {
        let (mut records, key) = (Records::none(), DhtId::of_text("expert.0"));
        let mut store = |now: f64| records.store(now, key, Bytes::from_static(b"uid"), Bytes::from_static(b"peer"));
        assert_eq!([store(1000.0), store(1000.0), store(1030.0)], [true, false, true]);
    }
}
