//! Safe functions over `cpp/script.h`: TorchScript modules.

use std::{
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    ptr::null_mut,
};

use tch::{Device, TchError, Tensor};

use super::{Raw, check, raws};

type Each = unsafe extern "C" fn(*mut c_void, *const c_char, Raw);

#[repr(C)]
struct RawScript {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    fn skep_script_load(path: *const c_char, device: *const c_char, res: *mut *mut RawScript) -> *mut c_char;
    fn skep_script_free(script: *mut RawScript);
    fn skep_script_state(script: *const RawScript, buffers: bool, ctx: *mut c_void, each: Each) -> *mut c_char;
    fn skep_script_forward(
        script: *mut RawScript,
        args: *const Raw,
        n_args: usize,
        names: *const *const c_char,
        kwargs: *const Raw,
        n_kwargs: usize,
        ctx: *mut c_void,
        each: Each,
    ) -> *mut c_char;
}

/// A loaded module.
pub(crate) struct Script(*mut RawScript);

// SAFETY: a module has no tie to a thread. It is not `Sync`: forward may change buffers.
unsafe impl Send for Script {}

impl Drop for Script {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `skep_script_load` and is released once.
        unsafe { skep_script_free(self.0) }
    }
}

impl Script {
    /// Reads a file that `torch.jit.save` wrote, in training mode. Whatever is in the file runs later.
    pub(crate) fn load(path: &Path, device: Device) -> Result<Self, TchError> {
        let path = CString::new(path.to_string_lossy().into_owned())?;
        let device = match device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".to_owned(),
        };
        let (device, mut script) = (CString::new(device)?, null_mut());
        // SAFETY: both texts outlive the call; the shim writes one pointer when it succeeds.
        check(unsafe { skep_script_load(path.as_ptr(), device.as_ptr(), &mut script) })?;
        Ok(Self(script))
    }

    /// Parameters or buffers by name; they share the module's storage.
    pub(crate) fn state(&self, buffers: bool) -> Result<Vec<(String, Tensor)>, TchError> {
        let mut found: Vec<(String, Tensor)> = Vec::new();
        // SAFETY: `collect` gets `found`, which outlives the call.
        check(unsafe { skep_script_state(self.0, buffers, (&raw mut found).cast(), collect) })?;
        Ok(found)
    }

    /// The tensors of forward's result, depth first.
    pub(crate) fn forward(&self, args: &[&Tensor], kwargs: &[(&CStr, &Tensor)]) -> Result<Vec<Tensor>, TchError> {
        let names: Vec<*const c_char> = kwargs.iter().map(|(name, _)| name.as_ptr()).collect();
        let (args, kwargs) = (raws(args.iter().copied()), raws(kwargs.iter().map(|(_, tensor)| *tensor)));
        let mut found: Vec<(String, Tensor)> = Vec::new();
        // SAFETY: pointers and lengths agree and outlive the call; `collect` gets `found`. `Script` is not `Sync`, so no
        // other thread runs this module now.
        let error = unsafe {
            skep_script_forward(
                self.0,
                args.as_ptr(),
                args.len(),
                names.as_ptr(),
                kwargs.as_ptr(),
                kwargs.len(),
                (&raw mut found).cast(),
                collect,
            )
        };
        check(error)?;
        Ok(found.into_iter().map(|(_, tensor)| tensor).collect())
    }
}

/// Pushes a tensor onto the `Vec<(String, Tensor)>` behind `ctx`.
unsafe extern "C" fn collect(ctx: *mut c_void, name: *const c_char, tensor: Raw) {
    // SAFETY: the callers above pass their own vector and nobody else uses it meanwhile; `name` is a C string, `tensor`
    // an owned `at::Tensor*`.
    unsafe {
        let found = &mut *ctx.cast::<Vec<(String, Tensor)>>();
        found.push((CStr::from_ptr(name).to_string_lossy().into_owned(), Tensor::from_ptr(tensor)));
    }
}
