//! Safe functions over `cpp/stream.h`: streams and events of a device.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    ptr::null_mut,
};

use tch::{Device, TchError, Tensor};

use super::{Raw, check, raws};

#[repr(C)]
struct RawStream {
    _opaque: [u8; 0],
}

#[repr(C)]
struct RawEvent {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn skep_load_cuda(path: *const c_char) -> *mut c_char;
    fn skep_cuda_devices(loaded: *mut bool, count: *mut c_int) -> *mut c_char;
    fn skep_stream_new(index: c_int, res: *mut *mut RawStream) -> *mut c_char;
    fn skep_stream_free(stream: *mut RawStream);
    fn skep_stream_enter(stream: *const RawStream, guard: *mut *mut c_void) -> *mut c_char;
    fn skep_stream_leave(guard: *mut c_void);
    fn skep_stream_uses(stream: *const RawStream, tensors: *const Raw, n: usize) -> *mut c_char;
    fn skep_event_record(stream: *const RawStream, res: *mut *mut RawEvent) -> *mut c_char;
    fn skep_event_free(event: *mut RawEvent);
    fn skep_event_query(event: *const RawEvent, reached: *mut bool) -> *mut c_char;
    fn skep_event_block(event: *const RawEvent, stream: *const RawStream) -> *mut c_char;
    #[cfg(test)]
    fn skep_event_elapsed(from: *const RawEvent, to: *const RawEvent, millis: *mut f64) -> *mut c_char;
}

/// Loads libtorch_cuda into the process, for which it was not linked.
pub(crate) fn load_cuda(library: &str) -> Result<(), TchError> {
    let path = CString::new(library)?;
    // SAFETY: the path outlives the call; the library's initializers are torch's own.
    check(unsafe { skep_load_cuda(path.as_ptr()) })
}

/// How many CUDA devices there are; `None` while libtorch_cuda is not loaded.
pub(crate) fn cuda_devices() -> Result<Option<usize>, TchError> {
    let (mut loaded, mut count) = (false, 0);
    // SAFETY: the shim writes both.
    check(unsafe { skep_cuda_devices(&mut loaded, &mut count) })?;
    Ok(loaded.then(|| usize::try_from(count).unwrap_or(0)))
}

/// A stream of a CUDA device, or the only one of the CPU. The raw pointer ties it to its thread.
pub(crate) struct Stream(*mut RawStream);

impl Stream {
    /// A stream from torch's pool.
    pub(crate) fn new(device: Device) -> Result<Self, TchError> {
        let index = match device {
            Device::Cpu => -1,
            Device::Cuda(n) => c_int::try_from(n).map_err(|_| TchError::Torch(format!("no device {device:?}")))?,
            other => return Err(TchError::Torch(format!("{other:?} has no streams here"))),
        };
        let mut stream = null_mut();
        // SAFETY: the shim writes one pointer, which is ours to free.
        check(unsafe { skep_stream_new(index, &mut stream) })?;
        Ok(Self(stream))
    }

    /// Gives to this stream what this thread computes while the guard lives.
    pub(crate) fn enter(&self) -> Result<StreamGuard, TchError> {
        let mut guard = null_mut();
        // SAFETY: the stream lives; the guard copies it.
        check(unsafe { skep_stream_enter(self.0, &mut guard) })?;
        Ok(StreamGuard(guard))
    }

    /// Tensors that another stream made are used by this one: their memory is not reused before it is done with them.
    pub(crate) fn uses<'a>(&self, tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<(), TchError> {
        let raws = raws(tensors);
        // SAFETY: pointer and length agree; tensors and stream outlive the call.
        check(unsafe { skep_stream_uses(self.0, raws.as_ptr(), raws.len()) })
    }

    /// Marks the place behind all that was given to it.
    pub(crate) fn record(&self) -> Result<Event, TchError> {
        let mut event = null_mut();
        // SAFETY: the stream lives; the shim writes one pointer, which is ours to free.
        check(unsafe { skep_event_record(self.0, &mut event) })?;
        Ok(Event(event))
    }

    /// Lets it go on only behind an event of another one. Nobody waits for that here.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), TchError> {
        // SAFETY: both live.
        check(unsafe { skep_event_block(event.0, self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `skep_stream_new`, freed once.
        unsafe { skep_stream_free(self.0) }
    }
}

/// See [`Stream::enter`]. Guards end in the opposite order of their beginnings, which scopes see to.
pub(crate) struct StreamGuard(*mut c_void);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // SAFETY: made by `skep_stream_enter` on this thread, since the raw pointer is `!Send`; left once.
        unsafe { skep_stream_leave(self.0) }
    }
}

/// A place in a stream.
pub(crate) struct Event(*mut RawEvent);

impl Event {
    /// Whether the stream has come to it. Does not wait; fails when the device does.
    pub(crate) fn is_reached(&self) -> Result<bool, TchError> {
        let mut reached = false;
        // SAFETY: the event lives; the shim writes one flag.
        check(unsafe { skep_event_query(self.0, &mut reached) })?;
        Ok(reached)
    }

    /// Milliseconds of the device's time up to a later event that was reached, too.
    #[cfg(test)]
    pub(crate) fn millis_until(&self, later: &Event) -> Result<f64, TchError> {
        let mut millis = 0.0;
        // SAFETY: both live; the shim writes one number.
        check(unsafe { skep_event_elapsed(self.0, later.0, &mut millis) })?;
        Ok(millis)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `skep_event_record`, freed once.
        unsafe { skep_event_free(self.0) }
    }
}
