//! Settings of the whole process. [`tune`] is called by the daemon; a program that embeds skep decides for itself.

use crate::{Error, ffi};

/// What [`tune`] sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Threads inside one torch operation. One is best where an executor thread runs on each core: more of them fight for
    /// the same cores.
    pub intra_op_threads: u32,
    /// Load this CUDA library, usually `libtorch_cuda.so`, into a process that was linked without it. Wanted before the
    /// first question about CUDA.
    pub cuda_library: Option<String>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { intra_op_threads: 1, cuda_library: None }
    }
}

/// Sets process globals: the allocator keeps big temporaries (glibc), torch's thread count, CUDA if asked. Call it once,
/// before other threads compute. Fails only when CUDA was asked for and does not load; the rest is set by then.
pub fn tune(tuning: &Tuning) -> Result<(), Error> {
    let kept = ffi::keep_big_allocations();
    tch::set_num_threads(i32::try_from(tuning.intra_op_threads.max(1)).unwrap_or(i32::MAX));
    tracing::debug!(threads = tuning.intra_op_threads, allocator = kept, "process tuned");
    match &tuning.cuda_library {
        Some(library) => ffi::load_cuda(library).map_err(|error| {
            Error::Config(format!("CUDA does not load: {}; is LIBTORCH a CUDA build?", crate::error::short(&error)))
        }),
        None => Ok(()),
    }
}
