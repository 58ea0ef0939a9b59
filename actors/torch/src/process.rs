//! Settings of the whole process. [`tune`] is called by the daemon; a program that embeds skep decides for itself.

use std::sync::{Mutex, PoisonError};

use crate::{Error, error::short, ffi};

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
        Some(library) => load_cuda(library).map(drop),
        None => Ok(()),
    }
}

/// The name under which torch's CUDA half is looked for: beside the libtorch that the program was built with, then on the
/// loader's path.
pub const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// Loads torch's CUDA half, once a process; the number of devices that it finds.
pub(crate) fn load_cuda(library: &str) -> Result<usize, Error> {
    static LOADED: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(count) = ffi::cuda_devices()? {
        return Ok(count);
    }
    ffi::load_cuda(library).map_err(|error| {
        Error::Config(format!(
            "CUDA does not load: {}; fetch the CUDA build with `scripts/libtorch --cuda`, or start with a CUDA build of \
             torch 2.11.0 on LD_LIBRARY_PATH",
            short(&error)
        ))
    })?;
    let count = ffi::cuda_devices()?;
    count
        .ok_or_else(|| Error::Config(format!("{library} is loaded, but it brings no CUDA: is it one of torch 2.11.0?")))
}
