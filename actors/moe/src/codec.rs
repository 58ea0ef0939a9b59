//! Tensor codecs off the thread that carries all calls, as soon as there is much to encode or decode.

use skep_kernel::panics::contain;
use skep_wire::{Compression, HostTensor, TensorDescriptor, proto::runtime::Tensor};
use tokio::{sync::Semaphore, task::spawn_blocking};

/// Bytes up to which the caller's thread does it itself.
const INLINE_BYTES: usize = 64 << 10;
/// Threads of this process that may be at it at once.
const MAX_WORKERS: usize = 8;

static WORKERS: Semaphore = Semaphore::const_new(MAX_WORKERS);

/// Runs codec work over so many bytes: here, or on a thread for blocking work. A panic comes back as its message.
/// Dropping the future lets work that has begun run to its end, for nobody.
pub(crate) async fn run<R: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, String> {
    if bytes <= INLINE_BYTES {
        return contain(work);
    }
    let permit = WORKERS.acquire().await.map_err(|closed| closed.to_string())?;
    let worker = spawn_blocking(move || {
        let done = contain(work);
        drop(permit);
        done
    });
    worker.await.unwrap_or_else(|stopped| Err(stopped.to_string()))
}

/// Bytes that encoding touches; uncompressed tensors are only wrapped.
pub(crate) fn bytes_to_encode(tensors: &[HostTensor], descriptors: &[&TensorDescriptor]) -> usize {
    let touched = tensors.iter().zip(descriptors).filter(|(_, d)| d.compression != Compression::None);
    touched.map(|(tensor, _)| tensor.data().len()).sum()
}

/// Bytes that decoding touches; uncompressed tensors are only wrapped, except bfloat16, which may come widened.
pub(crate) fn bytes_to_decode(tensors: &[Tensor]) -> usize {
    let touched = |tensor: &&Tensor| tensor.compression != Compression::None as i32 || tensor.dtype == "bfloat16";
    tensors.iter().filter(touched).map(|tensor| tensor.buffer.len()).sum()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn much_work_runs_elsewhere_and_little_here() {
        let here = thread::current().id();
        assert_eq!(run(INLINE_BYTES, || thread::current().id()).await, Ok(here));
        assert_ne!(run(INLINE_BYTES + 1, || thread::current().id()).await, Ok(here));
    }

    #[tokio::test]
    async fn a_codec_that_panics_costs_its_own_call_only() {
        for bytes in [0, INLINE_BYTES + 1] {
            for _ in 0..=MAX_WORKERS {
                assert_eq!(run(bytes, || -> () { panic!("boom") }).await, Err("boom".to_owned()));
            }
            assert_eq!(run(bytes, || 7).await, Ok(7), "no worker is lost");
        }
    }
}
