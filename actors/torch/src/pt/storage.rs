//! Tensors of a `torch.save` file: typed storages, and views of them by offset and strides.

use bytes::Bytes;
use skep_wire::{DType, HostTensor};

use super::{PtError, bad};

const NAMES: [(DType, &str); 10] = [
    (DType::F32, "FloatStorage"),
    (DType::F64, "DoubleStorage"),
    (DType::F16, "HalfStorage"),
    (DType::BF16, "BFloat16Storage"),
    (DType::I64, "LongStorage"),
    (DType::I32, "IntStorage"),
    (DType::I16, "ShortStorage"),
    (DType::I8, "CharStorage"),
    (DType::U8, "ByteStorage"),
    (DType::Bool, "BoolStorage"),
];

/// torch's name of a storage of these elements.
pub(super) fn name(dtype: DType) -> &'static str {
    NAMES.iter().find(|(known, _)| *known == dtype).expect("every dtype has a storage").1
}

/// The elements of a storage by torch's name of it.
pub(super) fn dtype(name: &str) -> Option<DType> {
    NAMES.iter().find(|(_, known)| *known == name).map(|(dtype, _)| *dtype)
}

/// Steps in elements of a tensor that lies in C order.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut step = 1usize;
    let mut strides = Vec::with_capacity(shape.len());
    for size in shape.iter().rev() {
        strides.push(step);
        step = step.saturating_mul(*size.max(&1));
    }
    strides.reverse();
    strides
}

/// The tensor at `offset` with these steps, copied into C order.
pub(super) fn view(
    bytes: &[u8],
    dtype: DType,
    offset: usize,
    shape: &[usize],
    steps: &[usize],
) -> Result<HostTensor, PtError> {
    let whole = bytes.len() / dtype.size();
    let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    let Some(elements) = elements.filter(|n| *n <= whole && shape.len() == steps.len()) else {
        return bad(format!("a tensor of shape {shape:?} in a storage of {whole} elements"));
    };
    if elements == 0 {
        return HostTensor::zeros(dtype, shape).map_err(|error| PtError(error.to_string()));
    }
    let reach =
        shape.iter().zip(steps).try_fold(offset, |last, (size, step)| last.checked_add((size - 1).checked_mul(*step)?));
    if reach.is_none_or(|last| last >= whole) {
        return bad(format!("a tensor of shape {shape:?} reaches beyond its storage"));
    }
    let data = if steps == strides(shape) {
        bytes[offset * dtype.size()..(offset + elements) * dtype.size()].to_vec()
    } else {
        let mut data = Vec::with_capacity(elements * dtype.size());
        let mut index = vec![0; shape.len()];
        for _ in 0..elements {
            let at: usize = offset + index.iter().zip(steps).map(|(i, step)| i * step).sum::<usize>();
            data.extend(&bytes[at * dtype.size()..(at + 1) * dtype.size()]);
            for dimension in (0..shape.len()).rev() {
                index[dimension] += 1;
                if index[dimension] < shape[dimension] {
                    break;
                }
                index[dimension] = 0;
            }
        }
        data
    };
    HostTensor::new(dtype, shape, Bytes::from(data)).map_err(|error| PtError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_view_is_read_in_c_order() {
        let bytes = [1u8, 2, 3, 4, 5, 6];
        let view = view(&bytes, DType::U8, 0, &[3, 2], &[1, 3]).unwrap();
        assert_eq!(view.data()[..], [1, 4, 2, 5, 3, 6]);
    }

    #[test]
    fn views_beyond_their_storage_are_refused() {
        for (offset, shape, steps) in [
            (0, vec![7], vec![1]),
            (1, vec![6], vec![1]),
            (0, vec![2, 3], vec![4, 1]),
            (0, vec![usize::MAX, 2], vec![1, 1]),
            (usize::MAX, vec![1], vec![1]),
            (0, vec![2], vec![usize::MAX]),
            (0, vec![2], vec![]),
            // An expanded tensor would be larger than its file.
            (0, vec![100, 2], vec![0, 1]),
        ] {
            assert!(view(&[0; 6], DType::U8, offset, &shape, &steps).is_err(), "{shape:?} {steps:?}");
        }
    }
}
