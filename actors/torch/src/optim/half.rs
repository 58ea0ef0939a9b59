//! SGD for 16-bit floats, operation by operation: libtorch 2.11's fused kernel steps wrongly with them on processors with
//! AVX-512, from 16 elements on.

use tch::{Kind, TchError, Tensor};

use super::Sgd;

/// Whether these are 16-bit floats.
pub(super) fn is_half(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Half | Kind::BFloat16)
}

/// One step in place with this rate; a momentum starts as zeros.
pub(super) fn sgd_step(
    rule: &Sgd,
    rate: f64,
    param: &Tensor,
    grad: &Tensor,
    momentum: Option<&Tensor>,
) -> Result<(), TchError> {
    let _guard = tch::no_grad_guard();
    let mut grad = grad.shallow_clone();
    if rule.weight_decay != 0.0 {
        grad = grad.f_add(&param.f_mul_scalar(rule.weight_decay)?)?;
    }
    if let Some(momentum) = momentum {
        momentum.shallow_clone().f_copy_(&momentum.f_mul_scalar(rule.momentum)?.f_add(&grad)?)?;
        grad =
            if rule.nesterov { grad.f_add(&momentum.f_mul_scalar(rule.momentum)?)? } else { momentum.shallow_clone() };
    }
    param.shallow_clone().f_copy_(&param.f_sub(&grad.f_mul_scalar(rate)?)?)
}
