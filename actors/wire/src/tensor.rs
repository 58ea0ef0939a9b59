//! Tensors in host memory: a dtype, a shape and little-endian bytes in C order.

use bytes::Bytes;

use crate::DType;

/// Why bytes and a shape do not make a tensor, or two tensors do not go together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The byte length does not match dtype and shape.
    #[error("{dtype} tensor of shape {shape:?} needs {expected} bytes, got {got}")]
    Length {
        /// Element type.
        dtype: DType,
        /// The shape asked for.
        shape: Vec<usize>,
        /// Bytes that dtype and shape need.
        expected: usize,
        /// Bytes that were given.
        got: usize,
    },
    /// The number of elements overflows.
    #[error("tensor shape {0:?} is too large")]
    Overflow(Vec<usize>),
    /// Another dtype was asked for than the tensor holds.
    #[error("expected {expected}, got {got}")]
    DType {
        /// What the caller asked for.
        expected: DType,
        /// What the tensor holds.
        got: DType,
    },
    /// Tensors of one batch differ beyond their first dimension.
    #[error("cannot join rows of shape {left:?} and {right:?}")]
    Rows {
        /// Shape of the first part.
        left: Vec<usize>,
        /// Shape of the part that differs.
        right: Vec<usize>,
    },
    /// A row range outside the tensor, or a tensor without a batch dimension.
    #[error("rows {start}..{end} are outside a tensor of shape {shape:?}")]
    RowRange {
        /// First row asked for.
        start: usize,
        /// One past the last row asked for.
        end: usize,
        /// Shape of the tensor.
        shape: Vec<usize>,
    },
}

/// A dense tensor in host memory. Cloning shares the bytes.
///
/// Invariant: `data.len() == product(shape) * dtype.size()`; elements are little-endian, C order. The bytes need not be
/// aligned to the element size.
#[derive(Clone, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl std::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTensor({}, {:?})", self.dtype, self.shape)
    }
}

macro_rules! typed {
    ($from:ident, $to:ident, $t:ty, $dtype:expr) => {
        /// Copies values in C order into a new tensor; fails when their number does not fit `shape`.
        pub fn $from(shape: impl Into<Vec<usize>>, values: &[$t]) -> Result<Self, TensorError> {
            let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            Self::new($dtype, shape, data.into())
        }

        /// Copies the values out in C order; fails when the dtype is another.
        pub fn $to(&self) -> Result<Vec<$t>, TensorError> {
            if self.dtype != $dtype {
                return Err(TensorError::DType { expected: $dtype, got: self.dtype });
            }
            let chunks = self.data.chunks_exact(size_of::<$t>());
            Ok(chunks.map(|c| <$t>::from_le_bytes(c.try_into().expect("chunks have the element's size"))).collect())
        }
    };
}

impl HostTensor {
    /// Wraps bytes without copying them.
    pub fn new(dtype: DType, shape: impl Into<Vec<usize>>, data: Bytes) -> Result<Self, TensorError> {
        let shape = shape.into();
        let expected = byte_len(dtype, &shape)?;
        if data.len() != expected {
            return Err(TensorError::Length { dtype, shape, expected, got: data.len() });
        }
        Ok(Self { dtype, shape, data })
    }

    typed!(from_f32, to_f32, f32, DType::F32);
    typed!(from_f64, to_f64, f64, DType::F64);
    typed!(from_i64, to_i64, i64, DType::I64);

    /// A tensor of zeros.
    pub fn zeros(dtype: DType, shape: impl Into<Vec<usize>>) -> Result<Self, TensorError> {
        let shape = shape.into();
        let len = byte_len(dtype, &shape)?;
        Self::new(dtype, shape, vec![0; len].into())
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of all dimensions; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    /// Size of the first (batch) dimension; 0 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Bytes of one row; 0 when there are no rows.
    pub fn row_bytes(&self) -> usize {
        self.data.len().checked_div(self.rows()).unwrap_or(0)
    }

    /// Rows `start..end` as a view on the same bytes.
    pub fn slice_rows(&self, start: usize, end: usize) -> Result<Self, TensorError> {
        if self.shape.is_empty() || start > end || end > self.rows() {
            return Err(TensorError::RowRange { start, end, shape: self.shape.clone() });
        }
        let row = self.row_bytes();
        let mut shape = self.shape.clone();
        shape[0] = end - start;
        Ok(Self { dtype: self.dtype, shape, data: self.data.slice(start * row..end * row) })
    }

    /// The rows with these indices, in this order, copied into a new tensor.
    pub fn gather_rows(&self, indices: &[usize]) -> Result<Self, TensorError> {
        let row = self.row_bytes();
        let mut data = Vec::with_capacity(row * indices.len());
        for &i in indices {
            if i >= self.rows() {
                return Err(TensorError::RowRange { start: i, end: i + 1, shape: self.shape.clone() });
            }
            data.extend_from_slice(&self.data[i * row..(i + 1) * row]);
        }
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = indices.len();
        }
        Self::new(self.dtype, shape, data.into())
    }

    /// Joins tensors along the first dimension. One part is returned as it is, without a copy.
    ///
    /// # Panics
    /// When `parts` is empty: a batch has at least one task.
    pub fn concat_rows(parts: &[HostTensor]) -> Result<Self, TensorError> {
        let first = parts.first().expect("a batch has at least one part");
        if let [only] = parts {
            return Ok(only.clone());
        }
        let (mut rows, mut data) = (0, Vec::with_capacity(parts.iter().map(|p| p.data.len()).sum()));
        for part in parts {
            let same = part.dtype == first.dtype && !part.shape.is_empty() && part.shape[1..] == first.shape[1..];
            if !same {
                return Err(TensorError::Rows { left: first.shape.clone(), right: part.shape.clone() });
            }
            rows += part.rows();
            data.extend_from_slice(&part.data);
        }
        let mut shape = first.shape.clone();
        shape[0] = rows;
        Self::new(first.dtype, shape, data.into())
    }

    /// Whether no element is NaN or infinite; true for integers.
    pub fn is_finite(&self) -> bool {
        // A float is finite unless all its exponent bits are set.
        fn check<const N: usize>(data: &[u8], exponent: u64) -> bool {
            data.chunks_exact(N).all(|c| {
                let mut wide = [0; 8];
                wide[..N].copy_from_slice(c);
                u64::from_le_bytes(wide) & exponent != exponent
            })
        }
        match self.dtype {
            DType::F32 => check::<4>(&self.data, 0x7f80_0000),
            DType::F64 => check::<8>(&self.data, 0x7ff0_0000_0000_0000),
            DType::F16 => check::<2>(&self.data, 0x7c00),
            DType::BF16 => check::<2>(&self.data, 0x7f80),
            _ => true,
        }
    }
}

fn byte_len(dtype: DType, shape: &[usize]) -> Result<usize, TensorError> {
    let numel = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    numel.and_then(|n| n.checked_mul(dtype.size())).ok_or_else(|| TensorError::Overflow(shape.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_needs_exactly_the_bytes_of_its_shape() {
        assert!(HostTensor::new(DType::F32, [2, 2], vec![0; 16].into()).is_ok());
        assert!(HostTensor::new(DType::F32, [2, 2], vec![0; 15].into()).is_err());
        assert!(HostTensor::zeros(DType::F32, [usize::MAX, 2]).is_err());
    }

    #[test]
    fn rows_split_and_join_back_to_the_same_tensor() {
        let t = HostTensor::from_f32([4, 2], &[0., 1., 2., 3., 4., 5., 6., 7.]).unwrap();
        let parts = [t.slice_rows(0, 1).unwrap(), t.slice_rows(1, 4).unwrap()];
        assert_eq!(HostTensor::concat_rows(&parts).unwrap(), t);
        assert_eq!(t.gather_rows(&[3, 0]).unwrap().to_f32().unwrap(), [6., 7., 0., 1.]);
        assert!(t.slice_rows(2, 5).is_err());
    }

    #[test]
    fn rows_of_another_width_do_not_join() {
        let a = HostTensor::zeros(DType::F32, [1, 2]).unwrap();
        let b = HostTensor::zeros(DType::F32, [1, 3]).unwrap();
        assert!(matches!(HostTensor::concat_rows(&[a, b]), Err(TensorError::Rows { .. })));
    }

    #[test]
    fn one_bad_value_makes_a_tensor_not_finite() {
        assert!(HostTensor::from_f32([2], &[1., -1e38]).unwrap().is_finite());
        assert!(!HostTensor::from_f32([2], &[1., f32::NAN]).unwrap().is_finite());
        assert!(!HostTensor::from_f64([1], &[f64::NEG_INFINITY]).unwrap().is_finite());
    }
}
