//! Host tensors to torch's and back. Never panics: what comes in may have come over the wire.

use bytes::{Bytes, BytesMut};
use skep_wire::{DType, HostTensor};
use tch::{Kind, TchError, Tensor};

use crate::{Error, ffi};

/// torch's name of an element type.
pub fn kind(dtype: DType) -> Kind {
    match dtype {
        DType::F32 => Kind::Float,
        DType::F64 => Kind::Double,
        DType::F16 => Kind::Half,
        DType::BF16 => Kind::BFloat16,
        DType::I64 => Kind::Int64,
        DType::I32 => Kind::Int,
        DType::I16 => Kind::Int16,
        DType::I8 => Kind::Int8,
        DType::U8 => Kind::Uint8,
        DType::Bool => Kind::Bool,
    }
}

/// The element type of a torch tensor; an error for complex and quantized ones, which do not travel.
pub fn dtype(kind: Kind) -> Result<DType, Error> {
    Ok(match kind {
        Kind::Float => DType::F32,
        Kind::Double => DType::F64,
        Kind::Half => DType::F16,
        Kind::BFloat16 => DType::BF16,
        Kind::Int64 => DType::I64,
        Kind::Int => DType::I32,
        Kind::Int16 => DType::I16,
        Kind::Int8 => DType::I8,
        Kind::Uint8 => DType::U8,
        Kind::Bool => DType::Bool,
        other => return Err(Error::Torch(format!("{other:?} tensors do not travel"))),
    })
}

/// A CPU tensor on the same bytes, copied only when they are misaligned. Nobody may write to it.
pub(crate) fn view(host: &HostTensor) -> Result<Tensor, TchError> {
    let kind = kind(host.dtype());
    if kind == Kind::Bool || !ffi::is_aligned(host.data(), kind) {
        return own(BytesMut::from(&host.data()[..]), &dims(host)?, kind);
    }
    ffi::view_bytes(host.data().clone(), &dims(host)?, kind)
}

/// A CPU tensor that may be written to; takes the bytes over where nobody else holds them, else copies.
pub fn to_tensor(host: HostTensor) -> Result<Tensor, Error> {
    let (kind, dims) = (kind(host.dtype()), dims(&host)?);
    let bytes = Bytes::clone(host.data());
    drop(host);
    let bytes = bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    Ok(own(bytes, &dims, kind)?)
}

fn own(bytes: BytesMut, dims: &[i64], kind: Kind) -> Result<Tensor, TchError> {
    // Any byte but 0 and 1 as a C++ bool is undefined behaviour.
    if kind == Kind::Bool {
        return own(bytes, dims, Kind::Uint8)?.f_ne(0);
    }
    let bytes = if ffi::is_aligned(&bytes, kind) { bytes } else { BytesMut::from(&bytes[..]) };
    ffi::own_bytes(bytes, dims, kind)
}

fn dims(host: &HostTensor) -> Result<Vec<i64>, TchError> {
    let dims = host.shape().iter().map(|&d| i64::try_from(d)).collect::<Result<_, _>>();
    dims.map_err(|_| TchError::Shape(format!("{:?} is too large", host.shape())))
}

/// Copies a tensor's elements, from whatever device, into host memory.
pub fn to_host(tensor: &Tensor) -> Result<HostTensor, Error> {
    let dtype = dtype(tensor.f_kind()?)?;
    let shape: Vec<usize> = tensor.size().iter().map(|&d| d as usize).collect();
    Ok(HostTensor::new(dtype, shape, ffi::copy_bytes(tensor)?.into())?)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn every_dtype_survives_the_round_trip() {
        for dtype in DType::ALL {
            let bytes: Vec<u8> = (0..6 * dtype.size()).map(|i| (i % 2) as u8).collect();
            let host = HostTensor::new(dtype, [3, 2], bytes.into()).unwrap();
            assert_eq!(to_host(&view(&host).unwrap()).unwrap(), host);
            assert_eq!(to_host(&to_tensor(host.clone()).unwrap()).unwrap(), host);
        }
        let scalar = HostTensor::from_f32([], &[7.0]).unwrap();
        assert_eq!(to_host(&view(&scalar).unwrap()).unwrap(), scalar);
        let empty = HostTensor::zeros(DType::F32, [0, 4]).unwrap();
        assert_eq!(to_host(&view(&empty).unwrap()).unwrap(), empty);
    }

    #[test]
    fn transposed_tensors_leave_in_c_order() {
        let t = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).reshape([2, 3]).tr();
        assert_eq!(to_host(&t).unwrap(), HostTensor::from_f32([3, 2], &[1., 4., 2., 5., 3., 6.]).unwrap());
    }

    #[test]
    fn bytes_that_are_no_bool_become_true() {
        let host = HostTensor::new(DType::Bool, [3], Bytes::from_static(&[0, 2, 255])).unwrap();
        assert_eq!(to_host(&view(&host).unwrap()).unwrap().data()[..], [0, 1, 1]);
    }

    #[test]
    fn misaligned_bytes_are_copied() {
        let bytes: Bytes = vec![0u8; 9].into();
        for start in [0, 1] {
            let host = HostTensor::new(DType::F32, [2], bytes.slice(start..start + 8)).unwrap();
            assert_eq!(Vec::<f32>::try_from(view(&host).unwrap()).unwrap(), [0., 0.]);
        }
    }

    struct Counted(Vec<u8>, Arc<AtomicUsize>);
    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_view_keeps_its_bytes_alive_until_the_last_tensor_on_them_goes() {
        let drops = Arc::new(AtomicUsize::new(0));
        let bytes = Bytes::from_owner(Counted(vec![0; 64], drops.clone()));
        let (at, host) = (bytes.as_ptr(), HostTensor::new(DType::F32, [4, 4], bytes).unwrap());
        let tensor = view(&host).unwrap();
        assert_eq!(tensor.data_ptr().cast_const().cast(), at, "no copy");
        let row = tensor.get(2);
        drop((host, tensor));
        assert_eq!(drops.load(Ordering::SeqCst), 0);
        assert_eq!(Vec::<f32>::try_from(&row).unwrap(), [0.; 4]);
        drop(row);
        assert_eq!(drops.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_writable_tensor_leaves_the_bytes_of_others_alone() {
        let host = HostTensor::from_f32([2], &[1., 2.]).unwrap();
        let mut tensor = to_tensor(host.clone()).unwrap();
        let _ = tensor.zero_();
        assert_eq!(host.to_f32().unwrap(), [1., 2.]);
        let at = host.data().as_ptr();
        assert_eq!(to_tensor(host).unwrap().data_ptr().cast_const().cast(), at, "bytes of its own are not copied");
    }
}
