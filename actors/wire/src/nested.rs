//! Nested structures of tensors as hivemind flattens them (docs/wire.md §8.1).

use std::collections::BTreeMap;

/// A value, or lists, tuples and string-keyed maps of values.
///
/// Lists and tuples differ on the wire. Flattening walks depth first, lists and tuples in order, maps in sorted key
/// order, which is the order of [`BTreeMap`].
#[derive(Clone, Debug, PartialEq)]
pub enum Nested<T> {
    /// One value.
    Leaf(T),
    /// A Python list.
    List(Vec<Nested<T>>),
    /// A Python tuple.
    Tuple(Vec<Nested<T>>),
    /// A Python dict with string keys.
    Map(BTreeMap<String, Nested<T>>),
}

impl<T> Nested<T> {
    /// The leaves in flattening order.
    pub fn flatten(&self) -> Vec<&T> {
        let mut leaves = Vec::new();
        self.visit(&mut |leaf| leaves.push(leaf));
        leaves
    }

    fn visit<'a>(&'a self, see: &mut impl FnMut(&'a T)) {
        match self {
            Nested::Leaf(leaf) => see(leaf),
            Nested::List(items) | Nested::Tuple(items) => items.iter().for_each(|item| item.visit(see)),
            Nested::Map(items) => items.values().for_each(|item| item.visit(see)),
        }
    }
}
