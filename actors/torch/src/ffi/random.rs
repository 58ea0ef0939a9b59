//! Safe functions over `cpp/random.h`: random numbers from generators of their own.

use std::ffi::c_char;

use tch::{TchError, Tensor};

use super::{Raw, check};

unsafe extern "C" {
    fn skep_bernoulli(tensor: Raw, p: f64, seed: u64) -> *mut c_char;
}

/// Fills a tensor in place with ones, each with probability `p`, and zeros. What they are depends on the seed, the shape
/// and the kind of device only.
pub(crate) fn bernoulli_(tensor: &mut Tensor, p: f64, seed: u64) -> Result<(), TchError> {
    // SAFETY: the tensor outlives the call, and `&mut` keeps others from it.
    check(unsafe { skep_bernoulli(tensor.as_mut_ptr(), p, seed) })
}
