//! `ExpertInfo`: what an expert takes and gives (wire document §8.2).

use crate::{Nested, TensorDescriptor};
use std::collections::BTreeMap;

/// Schemas of an expert as `rpc_info` answers them.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertInfo {
    /// Positional inputs, in order.
    pub args: Vec<Nested<TensorDescriptor>>,
    /// Keyword inputs by name.
    pub kwargs: BTreeMap<String, Nested<TensorDescriptor>>,
    /// Outputs; a single tensor is a [`Nested::Leaf`].
    pub outputs: Nested<TensorDescriptor>,
    /// Names of keyword inputs in the order in which they were declared.
    pub keyword_names: Vec<String>,
}

/// Why bytes are no expert info.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed expert info: {0}")]
pub struct SchemaError(pub String);

impl ExpertInfo {
    /// An expert with one tensor in and one tensor out.
    pub fn simple(input: TensorDescriptor, output: TensorDescriptor) -> Self {
        Self {
            args: vec![Nested::Leaf(input)],
            kwargs: BTreeMap::new(),
            outputs: Nested::Leaf(output),
            keyword_names: Vec::new(),
        }
    }

    /// Descriptors of all inputs in flattening order: positional ones, then keywords sorted by name.
    pub fn flat_inputs(&self) -> Vec<&TensorDescriptor> {
        self.args.iter().chain(self.kwargs.values()).flat_map(Nested::flatten).collect()
    }

    /// Descriptors of all outputs in flattening order.
    pub fn flat_outputs(&self) -> Vec<&TensorDescriptor> {
        self.outputs.flatten()
    }

    /// The MessagePack bytes of `ExpertInfo.serialized_info`, byte for byte as Python writes them.
    pub fn encode(&self) -> Vec<u8> {
        unimplemented!()
    }

    /// Reads `ExpertInfo.serialized_info`.
    pub fn decode(_bytes: &[u8]) -> Result<Self, SchemaError> {
        unimplemented!()
    }
}
