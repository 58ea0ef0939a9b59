//! Functions that torch's autograd does not know: results from elsewhere, gradients by a closure.

use std::{cell::RefCell, ffi::CString};

use tch::{Device, Kind, Tensor};

use crate::{Error, ffi};

thread_local! {
    static FAILURE: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// The error that a closure of [`attach`] gave during the last `backward()` of this thread, once. The engine itself carries
/// only its text.
pub fn take_backward_error() -> Option<Error> {
    FAILURE.take()
}

/// Makes `outputs` results of a function of `inputs`: their storage is shared, gradients come from `backward`.
///
/// `backward` gets one gradient per output, none for outputs that the loss does not use, and gives one per input, none
/// where there is none to give. It runs once per `backward()` that reaches the outputs, even when no input requires grad:
/// what is behind the function trains. For CPU tensors that is on the thread that called `backward()`. It is dropped with
/// the graph, or at once when this thread records no gradients.
///
/// # Errors
/// An error or a panic of `backward` ends `backward()` with its text; see [`take_backward_error`] for the value. So do
/// gradients of a wrong number, shape or device, and `create_graph`: there is no second derivative.
pub fn attach(
    name: &str,
    inputs: &[&Tensor],
    outputs: &[Tensor],
    mut backward: impl FnMut(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Error> + Send + 'static,
) -> Result<Vec<Tensor>, Error> {
    let name = CString::new(name.replace('\0', " ")).expect("NULs are replaced");
    // A node is only made when some input requires grad: this one does.
    let leaf = Tensor::f_zeros([0], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
    let inputs: Vec<&Tensor> = inputs.iter().copied().chain([&leaf]).collect();
    let given = inputs.len() - 1;
    let node = move |grads: &[Option<Tensor>], _needs: &[bool]| {
        FAILURE.set(None);
        let mut found = backward(grads).map_err(|error| {
            let text = error.to_string();
            FAILURE.set(Some(error));
            text
        })?;
        if found.len() != given {
            return Err(format!("backward gave {} gradients for {given} inputs", found.len()));
        }
        found.push(None);
        Ok(found)
    };
    Ok(ffi::attach(&name, &inputs, outputs, Box::new(node))?)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    };

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    struct CountDrops(Arc<AtomicUsize>);
    impl Drop for CountDrops {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    fn leaf(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, CPU).set_requires_grad(true)
    }

    fn sum(t: &Tensor) -> Tensor {
        t.sum(Kind::Float)
    }

    /// `relu(x w)` computed elsewhere, its gradient by a graph of its own.
    fn elsewhere(x: &Tensor, w: &Tensor) -> Tensor {
        let (at, weight) = (x.detach(), w.detach());
        let y = at.matmul(&weight).relu();
        let backward = move |grads: &[Option<Tensor>]| {
            let inner = at.detach().set_requires_grad(true);
            let y = tch::with_grad(|| inner.matmul(&weight).relu());
            ffi::vjp(&[&y], &[grads[0].as_ref().unwrap()], &[&inner]).map_err(Error::from)
        };
        attach("elsewhere", &[x], &[y], backward).unwrap().remove(0)
    }

    fn failing(x: &Tensor, fail: impl Fn() -> Result<Vec<Option<Tensor>>, Error> + Send + 'static) -> String {
        let y = attach("failing", &[x], &[x.detach()], move |_| fail()).unwrap();
        sum(&y[0]).f_backward().unwrap_err().to_string()
    }

    #[test]
    fn gradients_in_a_bigger_graph_equal_native_ones() {
        let w = Tensor::randn([8, 8], CPU);
        let (x, native) = (leaf(&[4, 8]), Tensor::zeros([4, 8], CPU));
        let native = (native + &x).detach().set_requires_grad(true);
        sum(&(elsewhere(&(&x * 2.0), &w).tanh() * 3.0 + &x)).backward();
        sum(&((&native * 2.0).matmul(&w).relu().tanh() * 3.0 + &native)).backward();
        assert!(x.grad().allclose(&native.grad(), 1e-5, 1e-6, false));
    }

    #[test]
    fn the_closure_runs_even_when_no_input_requires_grad() {
        let runs = Arc::new(AtomicUsize::new(0));
        let seen = runs.clone();
        let x = Tensor::randn([2, 4], CPU);
        let y = attach("frozen", &[&x], &[x.detach()], move |_| {
            seen.fetch_add(1, SeqCst);
            Ok(vec![None])
        })
        .unwrap();
        sum(&y[0]).backward();
        assert_eq!(runs.load(SeqCst), 1);
    }

    #[test]
    fn the_closure_runs_inside_the_closure_of_another_node() {
        let runs = Arc::new(AtomicUsize::new(0));
        let seen = runs.clone();
        let x = Tensor::randn([2, 4], CPU);
        let outer = attach("outer", &[&x], &[x.detach()], move |grads| {
            let (seen, inner) = (seen.clone(), Tensor::randn([2, 4], CPU));
            let loss = tch::with_grad(|| {
                let backward = move |_: &[Option<Tensor>]| {
                    seen.fetch_add(1, SeqCst);
                    Ok(vec![None])
                };
                let y = attach("inner", &[&inner], &[inner.detach()], backward)?;
                Ok::<_, Error>(sum(&(&y[0] * grads[0].as_ref().unwrap())))
            })?;
            loss.f_backward()?;
            Ok(vec![None])
        })
        .unwrap();
        sum(&outer[0]).backward();
        assert_eq!(runs.load(SeqCst), 1);
    }

    #[test]
    fn an_unused_output_has_no_gradient_and_integer_outputs_are_plain() {
        let x = leaf(&[3]);
        let outputs = [x.detach(), x.detach() * 2.0, Tensor::from_slice(&[1i64, 2])];
        let y = attach("three", &[&x], &outputs, |grads| {
            assert!(grads[0].is_none() && grads[2].is_none());
            Ok(vec![grads[1].as_ref().map(|g| g * 2.0)])
        })
        .unwrap();
        assert!(y[0].requires_grad() && !y[2].requires_grad());
        sum(&y[1]).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0; 3]);
    }

    #[test]
    fn the_closure_is_freed_with_the_graph_after_backward_or_at_once() {
        let (drops, x) = (Arc::new(AtomicUsize::new(0)), leaf(&[2]));
        let attached = || {
            let guard = CountDrops(drops.clone());
            let backward = move |grads: &[Option<Tensor>]| {
                let _held = &guard;
                Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)])
            };
            attach("counted", &[&x], &[x.detach()], backward).unwrap().remove(0)
        };
        let unrecorded = tch::no_grad(attached);
        assert!(!unrecorded.requires_grad());
        assert_eq!(drops.load(SeqCst), 1, "nothing recorded");
        drop(attached());
        assert_eq!(drops.load(SeqCst), 2, "with the graph");
        let kept = attached();
        Tensor::run_backward(&[sum(&kept)], &[&x], true, false);
        Tensor::run_backward(&[sum(&kept)], &[&x], true, false);
        assert_eq!(drops.load(SeqCst), 2, "the graph was kept");
        sum(&kept).backward();
        assert_eq!(drops.load(SeqCst), 3, "after backward, while the output lives");
        let error = sum(&kept).f_backward().unwrap_err();
        assert!(error.to_string().contains("second time"), "{error}");
    }

    #[test]
    fn what_goes_wrong_in_backward_reaches_its_caller() {
        let x = leaf(&[2, 4]);
        let gone = || Err(Error::NotFound { uid: "ffn.7".into() });
        let text = failing(&x, gone);
        assert!(text.contains("no expert ffn.7 is announced") && !text.contains("frame #"), "{text}");
        assert!(matches!(take_backward_error(), Some(Error::NotFound { uid }) if uid == "ffn.7"));
        assert!(take_backward_error().is_none());
        assert!(failing(&x, || panic!("boom {}", 7)).contains("panic in backward: boom 7"));
        assert!(failing(&x, || Ok(vec![])).contains("0 gradients for 1 inputs"));
        assert!(failing(&x, || Ok(vec![Some(Tensor::zeros([5, 7], CPU))])).contains("shape"));
        sum(&(&x * 2.0)).backward();
        assert_eq!(x.grad().double_value(&[0, 0]), 2.0, "torch goes on");
    }

    #[test]
    fn second_derivatives_are_an_error() {
        let x = leaf(&[2]);
        let y = attach("once", &[&x], &[x.detach()], |_| unreachable!("not called")).unwrap();
        let error = Tensor::f_run_backward(&[sum(&y[0])], &[&x], false, true).unwrap_err();
        assert!(error.to_string().contains("create_graph is not supported"), "{error}");
    }

    #[test]
    fn long_chains_are_freed_without_deep_recursion() {
        let x = leaf(&[4]);
        let mut y = x.shallow_clone();
        for _ in 0..20_000 {
            let pass = |grads: &[Option<Tensor>]| Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone)]);
            y = attach("link", &[&y], &[y.detach()], pass).unwrap().remove(0);
        }
        sum(&y).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [1.0; 4]);
    }
}
