//! What a tensor of a schema looks like, without its values (wire document §8.2).

use crate::{Compression, DType, HostTensor};

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
