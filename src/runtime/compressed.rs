//! A backend whose inputs travel compressed.

use std::{any::Any, collections::BTreeMap};

use skep_expert::{Backend, BackendError, Batch, Snapshot};
use skep_wire::{Compression, ExpertInfo, Nested, TensorDescriptor};

/// Another backend with `compression` in the schema of its inputs; outputs stay as they are (docs/wire.md §8.2).
pub(super) struct Compressed {
    inner: Box<dyn Backend>,
    info: ExpertInfo,
}

impl Compressed {
    pub fn new(inner: Box<dyn Backend>, compression: Compression) -> Self {
        let mut info = inner.info().clone();
        for input in info.args.iter_mut().chain(info.kwargs.values_mut()) {
            compress(input, compression);
        }
        Self { inner, info }
    }
}

fn compress(input: &mut Nested<TensorDescriptor>, compression: Compression) {
    match input {
        Nested::Leaf(leaf) => {
            // As in hivemind only floats: tokens and masks stay what they are, also where a lossy codec would take them.
            if leaf.dtype.is_some_and(|dtype| dtype.is_float() && compression.encodes(dtype)) {
                leaf.compression = compression;
            }
        }
        Nested::List(items) | Nested::Tuple(items) => items.iter_mut().for_each(|item| compress(item, compression)),
        Nested::Map(items) => items.values_mut().for_each(|item| compress(item, compression)),
    }
}

impl Backend for Compressed {
    fn info(&self) -> &ExpertInfo {
        &self.info
    }

    fn free_dimensions(&self) -> &[usize] {
        self.inner.free_dimensions()
    }

    fn class(&self) -> &str {
        self.inner.class()
    }

    fn parameter_count(&self) -> u64 {
        self.inner.parameter_count()
    }

    fn steps(&self) -> u64 {
        self.inner.steps()
    }

    fn as_any_mut(&mut self) -> Option<&mut dyn Any> {
        self.inner.as_any_mut()
    }

    fn optimizer(&self) -> &str {
        self.inner.optimizer()
    }

    fn settings(&self) -> BTreeMap<String, f64> {
        self.inner.settings()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Vec<skep_wire::HostTensor>, BackendError> {
        self.inner.forward(batch)
    }

    fn backward(&mut self, batch: &Batch) -> Result<Vec<skep_wire::HostTensor>, BackendError> {
        self.inner.backward(batch)
    }

    fn save(&mut self) -> Result<Snapshot, BackendError> {
        self.inner.save()
    }

    fn load(&mut self, snapshot: &Snapshot) -> Result<(), BackendError> {
        self.inner.load(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use skep_wire::DType;

    use super::*;

    #[test]
    fn only_floats_are_compressed_although_the_codec_would_take_integers_and_masks() {
        let compressed = |dtype, compression| {
            let mut input = Nested::Tuple(vec![Nested::Leaf(TensorDescriptor::batched(dtype, &[4]))]);
            compress(&mut input, compression);
            let Nested::Tuple(items) = input else { unreachable!("it was a tuple") };
            let Nested::Leaf(leaf) = &items[0] else { unreachable!("of one leaf") };
            leaf.compression == compression
        };
        assert!(compressed(DType::F32, Compression::Blockwise8) && compressed(DType::BF16, Compression::Blockwise8));
        assert!(compressed(DType::F32, Compression::Float16) && !compressed(DType::BF16, Compression::Float16));
        assert!(!compressed(DType::I64, Compression::Blockwise8) && !compressed(DType::Bool, Compression::Blockwise8));
    }
}
