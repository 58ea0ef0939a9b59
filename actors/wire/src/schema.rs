//! `ExpertInfo`: what an expert takes and gives (docs/wire.md §8.2).

use std::collections::BTreeMap;

use crate::{
    Nested, TensorDescriptor,
    msgpack::{self, EXT_DESCRIPTOR, Value},
};

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
        let args = Value::Tuple(self.args.iter().map(to_value).collect());
        // Python writes keyword inputs as declared; ones without a declared place follow by name.
        let declared = self.keyword_names.iter().filter_map(|name| self.kwargs.get_key_value(name));
        let others = self.kwargs.iter().filter(|(name, _)| !self.keyword_names.contains(name));
        let kwargs = Value::Map(declared.chain(others).map(|(k, v)| (k.as_str().into(), to_value(v))).collect());
        let names = self.keyword_names.iter().map(|name| name.as_str().into()).collect();
        let map = Value::Map(vec![
            ("forward_schema".into(), Value::Tuple(vec![args, kwargs])),
            ("outputs_schema".into(), to_value(&self.outputs)),
            ("keyword_names".into(), Value::Tuple(names)),
        ]);
        msgpack::serialize(&map).to_vec()
    }

    /// Reads `ExpertInfo.serialized_info`. Keys that skep does not know are ignored.
    pub fn decode(bytes: &[u8]) -> Result<Self, SchemaError> {
        let value = msgpack::deserialize(bytes).map_err(|e| SchemaError(e.to_string()))?;
        let entries = value.as_map().ok_or_else(|| SchemaError("expert info is not a map".to_owned()))?;
        let get = |key: &str| {
            let entry = entries.iter().find(|(k, _)| k.as_str() == Some(key));
            entry.map(|(_, v)| v).ok_or_else(|| SchemaError(format!("expert info lacks {key:?}")))
        };
        let Some([args, kwargs]) = get("forward_schema")?.as_tuple() else {
            return Err(SchemaError("forward_schema is not a tuple of two".to_owned()));
        };
        let args = args.as_tuple().ok_or_else(|| SchemaError("positional inputs are not a tuple".to_owned()))?;
        let Nested::Map(kwargs) = from_value(kwargs)? else {
            return Err(SchemaError("keyword inputs are not a map".to_owned()));
        };
        let names = get("keyword_names")?.as_tuple();
        let names = names.and_then(|names| names.iter().map(|n| n.as_str().map(str::to_owned)).collect());
        Ok(Self {
            args: args.iter().map(from_value).collect::<Result<_, _>>()?,
            kwargs,
            outputs: from_value(get("outputs_schema")?)?,
            keyword_names: names.ok_or_else(|| SchemaError("keyword_names is not a tuple of names".to_owned()))?,
        })
    }
}

fn to_value(nested: &Nested<TensorDescriptor>) -> Value {
    match nested {
        Nested::Leaf(descriptor) => descriptor.to_value(),
        Nested::List(items) => Value::List(items.iter().map(to_value).collect()),
        Nested::Tuple(items) => Value::Tuple(items.iter().map(to_value).collect()),
        Nested::Map(items) => Value::Map(items.iter().map(|(k, v)| (k.as_str().into(), to_value(v))).collect()),
    }
}

/// Recursion is as deep as the value, which `msgpack` bounds.
fn from_value(value: &Value) -> Result<Nested<TensorDescriptor>, SchemaError> {
    Ok(match value {
        Value::Ext(EXT_DESCRIPTOR, payload) => Nested::Leaf(TensorDescriptor::from_payload(payload)?),
        Value::List(items) => Nested::List(items.iter().map(from_value).collect::<Result<_, _>>()?),
        Value::Tuple(items) => Nested::Tuple(items.iter().map(from_value).collect::<Result<_, _>>()?),
        Value::Map(entries) => {
            let mut map = BTreeMap::new();
            for (key, value) in entries {
                let key = key.as_str().ok_or_else(|| SchemaError("a name in the schema is not text".to_owned()))?;
                map.insert(key.to_owned(), from_value(value)?);
            }
            Nested::Map(map)
        }
        other => return Err(SchemaError(format!("{} is no tensor descriptor", other.excerpt()))),
    })
}
