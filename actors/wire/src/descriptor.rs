//! What a tensor of a schema looks like, without its values (docs/wire.md §8.2).

use crate::{
    Compression, DType, HostTensor, SchemaError,
    msgpack::{self, EXT_DESCRIPTOR, Value},
};

/// Shape, dtype and compression that an expert expects of one input or gives one output.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDescriptor {
    /// Sizes; `None` is the batch dimension, always the first of an expert's tensors.
    pub size: Vec<Option<usize>>,
    /// Element type; Python may leave it open.
    pub dtype: Option<DType>,
    /// As Python emits it: true for float outputs of a module.
    pub requires_grad: bool,
    /// How the tensor is compressed on the way.
    pub compression: Compression,
    /// `cpu` or `cuda`; informative only.
    pub device_type: Option<String>,
    /// Device number; informative only.
    pub device_index: Option<i64>,
}

impl TensorDescriptor {
    /// A float32 tensor `[batch, sizes…]` on the CPU, uncompressed, without gradient.
    pub fn batched(dtype: DType, sizes: &[usize]) -> Self {
        let size = std::iter::once(None).chain(sizes.iter().map(|&s| Some(s))).collect();
        Self {
            size,
            dtype: Some(dtype),
            requires_grad: false,
            compression: Compression::None,
            device_type: Some("cpu".to_owned()),
            device_index: None,
        }
    }

    /// The same descriptor marked as an output that carries gradients.
    pub fn with_grad(mut self) -> Self {
        self.requires_grad = true;
        self
    }

    /// Whether a tensor has the described dtype and number of dimensions and every fixed size.
    pub fn admits(&self, tensor: &HostTensor) -> bool {
        let sizes = self.size.iter().zip(tensor.shape());
        self.dtype.is_none_or(|d| d == tensor.dtype())
            && self.size.len() == tensor.shape().len()
            && sizes.into_iter().all(|(want, got)| want.is_none_or(|w| w == *got))
    }
}

/// Only dense tensors exist; what Python calls so.
const LAYOUT: &str = "torch.strided";

impl TensorDescriptor {
    /// Extension 0x51, with the keys and their order as Python writes them.
    pub(crate) fn to_value(&self) -> Value {
        let sizes = self.size.iter().map(|s| s.map_or(Value::Nil, |s| Value::from(s as u64)));
        let text = |text: Option<String>| text.map_or(Value::Nil, Value::Str);
        let entries = [
            ("size", Value::Tuple(sizes.collect())),
            ("dtype", text(self.dtype.map(|d| format!("torch.{d}")))),
            ("layout", LAYOUT.into()),
            ("requires_grad", self.requires_grad.into()),
            ("pin_memory", false.into()),
            ("compression", Value::Int(self.compression as i64)),
            ("device_type", text(self.device_type.clone())),
            ("device_index", self.device_index.map_or(Value::Nil, Value::Int)),
        ];
        let map = Value::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect());
        Value::Ext(EXT_DESCRIPTOR, msgpack::serialize(&map))
    }

    /// Reads the payload of extension 0x51.
    pub(crate) fn from_payload(payload: &[u8]) -> Result<Self, SchemaError> {
        let value = msgpack::deserialize(payload).map_err(|e| SchemaError(e.to_string()))?;
        let entries = value.as_map().ok_or_else(|| SchemaError("tensor descriptor is not a map".to_owned()))?;
        let get = |key: &'static str| {
            let entry = entries.iter().find(|(k, _)| k.as_str() == Some(key));
            entry.map(|(_, v)| v).ok_or_else(|| SchemaError(format!("tensor descriptor lacks {key:?}")))
        };
        let wrong = |key: &str, v: &Value| SchemaError(format!("tensor descriptor has {key} = {}", v.excerpt()));

        let size = get("size")?;
        let size = size.as_tuple().and_then(|sizes| sizes.iter().map(read_size).collect());
        let dtype = match get("dtype")? {
            Value::Nil => None,
            v => Some(v.as_str().and_then(DType::from_name).ok_or_else(|| wrong("dtype", v))?),
        };
        match get("layout")? {
            v if v.as_str() == Some(LAYOUT) => {}
            v => return Err(wrong("layout", v)),
        }
        let requires_grad = get("requires_grad")?;
        let compression = get("compression")?;
        let code = compression.as_i64().and_then(|n| i32::try_from(n).ok());
        Ok(Self {
            size: size.ok_or_else(|| SchemaError("tensor descriptor has a malformed size".to_owned()))?,
            dtype,
            requires_grad: requires_grad.as_bool().ok_or_else(|| wrong("requires_grad", requires_grad))?,
            compression: code
                .and_then(|n| Compression::try_from(n).ok())
                .ok_or_else(|| wrong("compression", compression))?,
            device_type: match get("device_type")? {
                Value::Nil => None,
                v => Some(v.as_str().ok_or_else(|| wrong("device_type", v))?.to_owned()),
            },
            device_index: match get("device_index")? {
                Value::Nil => None,
                v => Some(v.as_i64().ok_or_else(|| wrong("device_index", v))?),
            },
        })
    }
}

fn read_size(value: &Value) -> Option<Option<usize>> {
    match value {
        Value::Nil => Some(None),
        Value::Int(n) => usize::try_from(*n).ok().map(Some),
        _ => None,
    }
}
