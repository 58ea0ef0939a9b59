//! The routing table: which nodes we know, and which of them are near an id (§6.8).

use std::collections::BTreeMap;

use libp2p_identity::PeerId;

use super::bucket::{Bucket, Contact};
use crate::DhtId;

/// Buckets in the order of their ranges. A peer has one node id: a restarted node replaces its former self, and nobody
/// fills the table alone.
#[derive(Clone, Debug)]
pub(crate) struct RoutingTable {
    own: DhtId,
    depth_modulo: u32,
    buckets: Vec<Bucket>,
    ids: BTreeMap<PeerId, DhtId>,
}

/// What an update of the table brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Updated {
    /// The node was unknown before.
    pub is_new: bool,
    /// An old node that should be pinged, as its bucket is full.
    pub check: Option<Contact>,
}

impl RoutingTable {
    pub fn new(own: DhtId, bucket_size: usize, depth_modulo: u32) -> Self {
        let buckets = vec![Bucket::root(bucket_size)];
        Self { own, depth_modulo: depth_modulo.max(1), buckets, ids: BTreeMap::new() }
    }

    /// Files a node that gave a sign of life. Ourselves, and an id that another peer holds, are ignored.
    pub fn update(&mut self, node: Contact) -> Updated {
        let ignored = Updated { is_new: false, check: None };
        let known = self.bucket(&node.id).find(&node.id).copied();
        if node.id == self.own || known.is_some_and(|known| known.peer != node.peer) {
            return ignored;
        }
        if let Some(former) = self.ids.get(&node.peer).copied().filter(|former| *former != node.id) {
            self.remove(&former);
        }
        let check = self.insert(node);
        if self.bucket(&node.id).contains(&node.id) {
            self.ids.insert(node.peer, node.id);
        }
        self.forget_dropped();
        Updated { is_new: known.is_none(), check }
    }

    fn insert(&mut self, node: Contact) -> Option<Contact> {
        loop {
            let index = self.index(&node.id);
            let bucket = &mut self.buckets[index];
            if bucket.update(node) {
                return None;
            }
            let may_split = bucket.has_in_range(&self.own) || !bucket.depth().is_multiple_of(self.depth_modulo);
            if !may_split || !bucket.can_split() {
                return bucket.next_to_check();
            }
            let (left, right) = self.buckets.remove(index).split();
            self.buckets.splice(index..index, [left, right]);
        }
    }

    /// Removes a node that does not answer.
    pub fn remove(&mut self, id: &DhtId) {
        let index = self.index(id);
        if let Some(node) = self.buckets[index].find(id).copied() {
            self.ids.remove(&node.peer);
            self.buckets[index].remove(id);
        }
    }

    /// Removes a peer that does not answer.
    pub fn remove_peer(&mut self, peer: &PeerId) {
        if let Some(id) = self.ids.get(peer).copied() {
            self.remove(&id);
        }
    }

    /// Whether a peer is known.
    pub fn has_peer(&self, peer: &PeerId) -> bool {
        self.ids.contains_key(peer)
    }

    /// The `k` known nodes nearest to an id, nearest first.
    pub fn nearest(&self, query: &DhtId, k: usize, exclude: Option<DhtId>) -> Vec<Contact> {
        let nodes = self.nodes().filter(|node| Some(node.id) != exclude);
        let mut ranked: Vec<(DhtId, &Contact)> = nodes.map(|node| (node.id.distance(query), node)).collect();
        if (1..ranked.len()).contains(&k) {
            ranked.select_nth_unstable(k - 1);
        }
        ranked.truncate(k);
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, node)| *node).collect()
    }

    /// Every node with a place.
    pub fn nodes(&self) -> impl Iterator<Item = &Contact> {
        self.buckets.iter().flat_map(|bucket| bucket.nodes())
    }

    /// Nodes with a place.
    pub fn len(&self) -> usize {
        self.nodes().count()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes().next().is_none()
    }

    #[cfg(test)]
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    fn index(&self, id: &DhtId) -> usize {
        self.buckets.partition_point(|bucket| bucket.lower() <= *id) - 1
    }

    fn bucket(&self, id: &DhtId) -> &Bucket {
        &self.buckets[self.index(id)]
    }

    /// A full list of replacements drops its oldest without telling; their peers must not stay behind.
    fn forget_dropped(&mut self) {
        let held: usize = self.buckets.iter().map(|bucket| bucket.nodes().len() + bucket.replacements().len()).sum();
        if self.ids.len() > held {
            let ids = std::mem::take(&mut self.ids);
            self.ids = ids.into_iter().filter(|(_, id)| self.bucket(id).contains(id)).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u8) -> Contact {
        Contact { id: DhtId::of_bytes(&[n]), peer: PeerId::random() }
    }

    #[test]
    fn a_peer_has_one_node_id() {
        let mut table = RoutingTable::new(DhtId([0; 20]), 20, 5);
        let before = node(1);
        assert!(table.update(before).is_new);
        let after = Contact { peer: before.peer, ..node(2) };
        assert!(table.update(after).is_new);
        assert_eq!(table.nodes().collect::<Vec<_>>(), [&after]);
    }

    #[test]
    fn nobody_takes_over_the_id_of_another_peer() {
        let mut table = RoutingTable::new(DhtId([0; 20]), 20, 5);
        let honest = node(1);
        table.update(honest);
        assert!(!table.update(Contact { id: honest.id, peer: PeerId::random() }).is_new);
        assert_eq!(table.nodes().collect::<Vec<_>>(), [&honest]);
        table.remove_peer(&honest.peer);
        assert!(table.is_empty());
    }

    #[test]
    fn our_own_id_is_never_filed() {
        let own = DhtId::of_bytes(b"own");
        let mut table = RoutingTable::new(own, 20, 5);
        table.update(Contact { id: own, peer: PeerId::random() });
        assert!(table.is_empty());
    }
}
