//! One bucket of the routing table: nodes of a range of ids, oldest first, and those who wait for a place (§6.8).

use std::collections::BTreeSet;

use libp2p_identity::PeerId;

use super::id::BITS;
use crate::DhtId;

/// A node and the peer it speaks through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Contact {
    pub id: DhtId,
    pub peer: PeerId,
}

/// Newcomers that wait for a place, per place. hivemind keeps all of them.
const REPLACEMENTS_PER_PLACE: usize = 8;

/// The ids that share `depth` leading bits with `lower`.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    lower: DhtId,
    depth: u32,
    size: usize,
    nodes: Vec<Contact>,
    replacements: Vec<Contact>,
    checking: BTreeSet<DhtId>,
}

impl Bucket {
    /// The whole space.
    pub fn root(size: usize) -> Self {
        Self::new(DhtId([0; 20]), 0, size.max(1))
    }

    fn new(lower: DhtId, depth: u32, size: usize) -> Self {
        Self { lower, depth, size, nodes: Vec::new(), replacements: Vec::new(), checking: BTreeSet::new() }
    }

    pub fn lower(&self) -> DhtId {
        self.lower
    }

    pub fn depth(&self) -> u32 {
        self.depth
    }

    pub fn nodes(&self) -> &[Contact] {
        &self.nodes
    }

    pub fn replacements(&self) -> &[Contact] {
        &self.replacements
    }

    pub fn has_in_range(&self, id: &DhtId) -> bool {
        self.lower.common_prefix_bits(id) >= self.depth
    }

    pub fn contains(&self, id: &DhtId) -> bool {
        self.find(id).is_some()
    }

    pub fn find(&self, id: &DhtId) -> Option<&Contact> {
        self.nodes.iter().chain(&self.replacements).find(|known| known.id == *id)
    }

    /// Puts a node at the fresh end; `false` when the bucket is full and the node waits for a place instead.
    pub fn update(&mut self, node: Contact) -> bool {
        self.checking.remove(&node.id);
        let known = self.nodes.iter().position(|known| known.id == node.id);
        if let Some(place) = known {
            self.nodes.remove(place);
        }
        if known.is_some() || self.nodes.len() < self.size {
            self.nodes.push(node);
            return true;
        }
        self.replacements.retain(|waiting| waiting.id != node.id);
        if self.replacements.len() >= self.size * REPLACEMENTS_PER_PLACE {
            self.replacements.remove(0);
        }
        self.replacements.push(node);
        false
    }

    /// Removes a node; the newest replacement takes its place.
    pub fn remove(&mut self, id: &DhtId) {
        self.checking.remove(id);
        self.replacements.retain(|waiting| waiting.id != *id);
        let Some(place) = self.nodes.iter().position(|known| known.id == *id) else { return };
        self.nodes.remove(place);
        self.nodes.extend(self.replacements.pop());
    }

    /// The least recently seen node that is not being checked yet; from now on it is.
    pub fn next_to_check(&mut self) -> Option<Contact> {
        let stale = self.nodes.iter().find(|node| !self.checking.contains(&node.id)).copied()?;
        self.checking.insert(stale.id);
        Some(stale)
    }

    /// Whether the range can be halved.
    pub fn can_split(&self) -> bool {
        self.depth < BITS
    }

    /// Halves the range. The midpoint belongs to the right half; hivemind files a node at exactly the midpoint left.
    pub fn split(self) -> (Bucket, Bucket) {
        let mut left = Bucket::new(self.lower, self.depth + 1, self.size);
        let mut right = Bucket::new(self.lower.with_bit(self.depth), self.depth + 1, self.size);
        for node in self.nodes.into_iter().chain(self.replacements) {
            let half = if node.id.bit(self.depth) { &mut right } else { &mut left };
            half.update(node);
        }
        (left, right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_at_the_exact_midpoint_goes_right() {
        let mut bucket = Bucket::root(4);
        let midpoint = Contact { id: DhtId([0; 20]).with_bit(0), peer: PeerId::random() };
        bucket.update(midpoint);
        let (left, right) = bucket.split();
        assert!(left.nodes().is_empty());
        assert_eq!(right.nodes(), [midpoint]);
        assert!(right.has_in_range(&midpoint.id));
    }

    #[test]
    fn replacements_are_bounded_and_the_newest_takes_the_place() {
        let mut bucket = Bucket::root(1);
        let node = |n: u8| Contact { id: DhtId([n; 20]), peer: PeerId::random() };
        let nodes: Vec<Contact> = (0..20).map(node).collect();
        for node in &nodes {
            bucket.update(*node);
        }
        assert_eq!(bucket.replacements().len(), REPLACEMENTS_PER_PLACE);
        bucket.remove(&nodes[0].id);
        assert_eq!(bucket.nodes(), [nodes[19]]);
    }
}
