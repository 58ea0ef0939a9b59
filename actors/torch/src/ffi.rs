//! The only unsafe code of the workspace: safe functions over `cpp/shim.h`.

mod random;
mod script;
mod stream;

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::null_mut,
};

use bytes::{Bytes, BytesMut};
use tch::{Kind, TchError, Tensor};
use torch_sys::C_tensor;

pub(crate) use random::bernoulli_;
pub(crate) use script::Script;
pub(crate) use stream::{Event, Stream, StreamGuard, cuda_devices, load_cuda};

#[cfg(target_endian = "big")]
compile_error!("tensors travel as little-endian bytes and are mapped without conversion");

type Raw = *mut C_tensor;
type RawBackward = unsafe extern "C" fn(*mut c_void, *const Raw, usize, *const u8, *mut Raw, usize) -> *mut c_char;
type RawDrop = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn skep_attach(
        name: *const c_char,
        ins: *const Raw,
        n_in: usize,
        outs: *const Raw,
        n_out: usize,
        res: *mut Raw,
        ctx: *mut c_void,
        backward: RawBackward,
        drop: RawDrop,
    ) -> *mut c_char;
    fn skep_vjp(
        outs: *const Raw,
        grads: *const Raw,
        n_out: usize,
        ins: *const Raw,
        n_in: usize,
        res: *mut Raw,
    ) -> *mut c_char;
    fn skep_sgd(
        params: *const Raw,
        grads: *const Raw,
        momenta: *const Raw,
        n: usize,
        lr: f64,
        momentum: f64,
        weight_decay: f64,
        nesterov: bool,
    ) -> *mut c_char;
    fn skep_adam(
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        decoupled: bool,
    ) -> *mut c_char;
    fn skep_norm(tensors: *const Raw, n: usize, norm: *mut f64) -> *mut c_char;
    fn skep_scaled(tensors: *const Raw, n: usize, factor: f64, res: *mut Raw) -> *mut c_char;
    fn skep_uniform(tensor: Raw, low: f64, high: f64, seed: u64) -> *mut c_char;
    fn skep_from_blob(
        data: *mut c_void,
        dims: *const i64,
        n_dims: usize,
        kind: c_int,
        ctx: *mut c_void,
        drop: RawDrop,
        res: *mut Raw,
    ) -> *mut c_char;
    fn skep_inference_enter(guard: *mut *mut c_void) -> *mut c_char;
    fn skep_inference_leave(guard: *mut c_void);
}

/// Turns the shim's answer into a result.
fn check(error: *mut c_char) -> Result<(), TchError> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a string from malloc that is ours to read and free.
    let text = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        libc::free(error.cast());
        text
    };
    Err(TchError::Torch(text))
}

/// Borrowed pointers; valid while `tensors` is.
fn raws<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<Raw> {
    tensors.into_iter().map(|t| t.as_ptr().cast_mut()).collect()
}

/// Takes ownership of tensors that the shim made.
fn owned(raws: Vec<Raw>) -> Vec<Option<Tensor>> {
    // SAFETY: every non-null pointer is an `at::Tensor*` from `new` that nobody else owns.
    raws.into_iter().map(|p| if p.is_null() { None } else { Some(unsafe { Tensor::from_ptr(p) }) }).collect()
}

fn all_owned(raws: Vec<Raw>) -> Result<Vec<Tensor>, TchError> {
    owned(raws).into_iter().map(|t| t.ok_or_else(|| TchError::Torch("undefined tensor".into()))).collect()
}

/// The backward pass of a node: gradients of the outputs (none where undefined) and which inputs need one go in, one
/// gradient or none per input comes out, or the text of the error that `backward()` shall end with.
pub(crate) type Backward = Box<dyn FnMut(&[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>, String> + Send>;

/// Makes `outputs` results of a node over `inputs`. The closure is dropped with the graph, after a backward that does not
/// keep the graph, or at once when nothing is recorded.
pub(crate) fn attach(
    name: &CStr,
    inputs: &[&Tensor],
    outputs: &[Tensor],
    backward: Backward,
) -> Result<Vec<Tensor>, TchError> {
    let (ins, outs) = (raws(inputs.iter().copied()), raws(outputs));
    let mut res = vec![null_mut(); outs.len()];
    let ctx = Box::into_raw(Box::new(backward)).cast();
    // SAFETY: pointers and lengths agree and outlive the call; the node owns `ctx`, a `Box<Backward>`, as the trampolines
    // expect, and `Backward: Send` lets the engine's threads call it; one backward runs a node at a time.
    check(unsafe {
        skep_attach(
            name.as_ptr(),
            ins.as_ptr(),
            ins.len(),
            outs.as_ptr(),
            outs.len(),
            res.as_mut_ptr(),
            ctx,
            call_backward,
            drop_box::<Backward>,
        )
    })?;
    all_owned(res)
}

unsafe extern "C" fn call_backward(
    ctx: *mut c_void,
    grads: *const Raw,
    n_out: usize,
    needs: *const u8,
    res: *mut Raw,
    n_in: usize,
) -> *mut c_char {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `attach` made `ctx` from a `Box<Backward>`; the node calls only while it owns it.
        let backward = unsafe { &mut *ctx.cast::<Backward>() };
        // SAFETY: the shim passes `n_out` pointers, null or to tensors that live during this call.
        let grads = unsafe { slice(grads, n_out) }.iter();
        // SAFETY: as above; `clone_from_ptr` takes a reference of its own.
        let grads: Vec<_> = grads.map(|&g| (!g.is_null()).then(|| unsafe { Tensor::clone_from_ptr(g) })).collect();
        // SAFETY: the shim passes `n_in` flags.
        let needs: Vec<_> = unsafe { slice(needs, n_in) }.iter().map(|&n| n != 0).collect();
        let out = backward(&grads, &needs)?;
        if out.len() != n_in {
            return Err(format!("backward gave {} gradients for {n_in} inputs", out.len()));
        }
        Ok(out)
    }));
    let text = match outcome {
        Ok(Ok(out)) => {
            for (i, grad) in out.into_iter().enumerate() {
                let raw = grad.map_or(null_mut(), |g| std::mem::ManuallyDrop::new(g).as_ptr().cast_mut());
                // SAFETY: `res` has room for `n_in` pointers, `out` has as many; the shim takes ownership.
                unsafe { res.add(i).write(raw) };
            }
            return null_mut();
        }
        Ok(Err(text)) => text,
        Err(panic) => format!("panic in backward: {}", panic_text(&*panic)),
    };
    let text = CString::new(text.replace('\0', " ")).expect("NULs are replaced");
    // SAFETY: strdup copies; the shim frees the copy.
    unsafe { libc::strdup(text.as_ptr()) }
}

/// # Safety
/// `data` points to `len` values that live as long as the result, or `len` is 0.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    // SAFETY: by contract; an empty C++ vector may have a null pointer, which a Rust slice must not.
    if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, len) } }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text")
}

unsafe extern "C" fn drop_box<T>(ctx: *mut c_void) {
    // SAFETY: `ctx` comes from `Box::into_raw` of a `Box<T>`, and the shim calls this once. Unwinding stops here.
    let _panicked = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(ctx.cast::<T>()) })));
}

/// Gradients of `Σ outputs·grads` with respect to `inputs`, none where an input is unused; `.grad` is left alone. Every
/// output and input must require grad. Frees the graph.
pub(crate) fn vjp(outputs: &[&Tensor], grads: &[&Tensor], inputs: &[&Tensor]) -> Result<Vec<Option<Tensor>>, TchError> {
    assert_eq!(outputs.len(), grads.len(), "one gradient per output");
    let (o, g, i) = (raws(outputs.iter().copied()), raws(grads.iter().copied()), raws(inputs.iter().copied()));
    let mut res = vec![null_mut(); i.len()];
    // SAFETY: pointers and lengths agree and outlive the call.
    check(unsafe { skep_vjp(o.as_ptr(), g.as_ptr(), o.len(), i.as_ptr(), i.len(), res.as_mut_ptr()) })?;
    Ok(owned(res))
}

/// One step of SGD in place; `momenta` may be empty when `momentum` is 0 and otherwise starts as zeros.
pub(crate) fn sgd_step(
    params: &[&Tensor],
    grads: &[&Tensor],
    momenta: &[&Tensor],
    lr: f64,
    momentum: f64,
    weight_decay: f64,
    nesterov: bool,
) -> Result<(), TchError> {
    assert!(grads.len() == params.len() && (momenta.is_empty() || momenta.len() == params.len()));
    let (p, g, m) = (raws(params.iter().copied()), raws(grads.iter().copied()), raws(momenta.iter().copied()));
    let momenta = if m.is_empty() { null_mut() } else { m.as_ptr().cast_mut() };
    // SAFETY: pointers and lengths agree and outlive the call.
    check(unsafe { skep_sgd(p.as_ptr(), g.as_ptr(), momenta, p.len(), lr, momentum, weight_decay, nesterov) })
}

/// The numbers of Adam.
#[derive(Clone, Copy)]
pub(crate) struct AdamNumbers {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    pub decoupled: bool,
}

/// One step of Adam or AdamW in place. `moments`: per parameter exp_avg, exp_avg_sq and a scalar float32 step count.
pub(crate) fn adam_step(
    params: &[&Tensor],
    grads: &[&Tensor],
    moments: &[&[Tensor; 3]],
    numbers: AdamNumbers,
) -> Result<(), TchError> {
    assert!(grads.len() == params.len() && moments.len() == params.len());
    let (p, g) = (raws(params.iter().copied()), raws(grads.iter().copied()));
    let [m, v, s] = [0, 1, 2].map(|i| raws(moments.iter().map(|state| &state[i])));
    let AdamNumbers { lr, betas, eps, weight_decay, decoupled } = numbers;
    // SAFETY: pointers and lengths agree and outlive the call.
    check(unsafe {
        skep_adam(
            p.as_ptr(),
            g.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            s.as_ptr(),
            p.len(),
            lr,
            betas.0,
            betas.1,
            weight_decay,
            eps,
            decoupled,
        )
    })
}

/// L2 norm of all tensors together; 0 for none.
pub(crate) fn norm(tensors: &[&Tensor]) -> Result<f64, TchError> {
    let raws = raws(tensors.iter().copied());
    let mut norm = 0.0;
    // SAFETY: pointer and length agree and outlive the call.
    check(unsafe { skep_norm(raws.as_ptr(), raws.len(), &mut norm) })?;
    Ok(norm)
}

/// Copies times a factor.
pub(crate) fn scaled(tensors: &[&Tensor], factor: f64) -> Result<Vec<Tensor>, TchError> {
    let raws = raws(tensors.iter().copied());
    let mut res = vec![null_mut(); raws.len()];
    // SAFETY: pointers and length agree and outlive the call.
    check(unsafe { skep_scaled(raws.as_ptr(), raws.len(), factor, res.as_mut_ptr()) })?;
    all_owned(res)
}

/// Fills a CPU tensor in place from a generator seeded for it alone, so that parallel initializations do not mix.
pub(crate) fn uniform_(tensor: &mut Tensor, low: f64, high: f64, seed: u64) -> Result<(), TchError> {
    // SAFETY: the tensor outlives the call.
    check(unsafe { skep_uniform(tensor.as_mut_ptr(), low, high, seed) })
}

/// A tensor on bytes that others may read too. Nobody may write through it or through a view of it.
pub(crate) fn view_bytes(bytes: Bytes, dims: &[i64], kind: Kind) -> Result<Tensor, TchError> {
    let data = bytes.as_ptr().cast_mut();
    blob(bytes, data, dims, kind)
}

/// A tensor that owns its bytes and may be written to.
pub(crate) fn own_bytes(mut bytes: BytesMut, dims: &[i64], kind: Kind) -> Result<Tensor, TchError> {
    let data = bytes.as_mut_ptr();
    blob(bytes, data, dims, kind)
}

/// Whether elements may lie at the beginning of these bytes.
pub(crate) fn is_aligned(bytes: &[u8], kind: Kind) -> bool {
    bytes.is_empty() || (bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes())
}

/// `data` is the beginning of `owner`'s bytes, which do not move with `owner`.
fn blob<T: AsRef<[u8]> + Send + 'static>(
    owner: T,
    data: *mut u8,
    dims: &[i64],
    kind: Kind,
) -> Result<Tensor, TchError> {
    let (len, size) = (owner.as_ref().len(), kind.elt_size_in_bytes());
    let numel = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
    if numel.and_then(|n| n.checked_mul(size)) != Some(len) || !is_aligned(owner.as_ref(), kind) {
        return Err(TchError::Shape(format!("{len} bytes do not make a {kind:?} tensor of shape {dims:?}")));
    }
    let mut res = null_mut();
    let ctx = Box::into_raw(Box::new(owner)).cast();
    // SAFETY: `data` is aligned and holds exactly the tensor's bytes, which live until `drop_box::<T>` frees the owner;
    // the shim does that once, with the last tensor on them. `T: Send`, since any thread may drop that tensor.
    check(unsafe {
        skep_from_blob(data.cast(), dims.as_ptr(), dims.len(), kind_code(kind)?, ctx, drop_box::<T>, &mut res)
    })?;
    all_owned(vec![res]).map(|mut made| made.remove(0))
}

/// The elements of a tensor in C order, copied.
pub(crate) fn copy_bytes(tensor: &Tensor) -> Result<Vec<u8>, TchError> {
    if tensor.is_sparse() {
        return Err(TchError::Kind("sparse tensors do not travel".into()));
    }
    let tensor = tensor.f_detach()?.f_to(tch::Device::Cpu)?.f_contiguous()?;
    let len = tensor.numel() * tensor.f_kind()?.elt_size_in_bytes();
    // SAFETY: a contiguous CPU tensor holds `len` initialized bytes from `data_ptr` on; `tensor` keeps them alive.
    Ok(unsafe { slice(tensor.data_ptr().cast::<u8>(), len) }.to_vec())
}

/// torch's number of an element type (`c10/core/ScalarType.h`).
fn kind_code(kind: Kind) -> Result<c_int, TchError> {
    Ok(match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => return Err(TchError::Kind(format!("{other:?} tensors do not travel"))),
    })
}

/// While it lives, this thread records no gradients and no version counters. Tensors made under it never take part in
/// autograd.
pub(crate) struct InferenceMode(*mut c_void);

impl InferenceMode {
    pub(crate) fn enter() -> Result<Self, TchError> {
        let mut guard = null_mut();
        // SAFETY: the shim writes one pointer. The raw pointer makes the guard `!Send`: it ends on this thread.
        check(unsafe { skep_inference_enter(&mut guard) })?;
        Ok(Self(guard))
    }
}

impl Drop for InferenceMode {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `skep_inference_enter` on this thread and is released once.
        unsafe { skep_inference_leave(self.0) }
    }
}

/// Keeps big temporaries on glibc's heap instead of mapping and faulting them anew each step.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_big_allocations() -> bool {
    // SAFETY: mallopt only sets the allocator's parameters.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) == 1 && libc::mallopt(libc::M_TRIM_THRESHOLD, c_int::MAX) == 1
    }
}

/// Only glibc needs it.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_big_allocations() -> bool {
    false
}
