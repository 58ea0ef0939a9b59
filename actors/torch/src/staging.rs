//! Tensors on their way to experts and back: what [`RemoteExpert`](crate::RemoteExpert) and the mixtures share.

use skep_wire::{ExpertInfo, HostTensor};
use tch::{Device, Tensor};

use crate::{
    Error,
    convert::{kind, to_host, to_tensor},
};

/// Inputs of a call, on the CPU. The copy from another device belongs to the graph, so that a node over `tensors` never
/// blocks a device's thread.
pub(crate) struct Staged {
    pub tensors: Vec<Tensor>,
    pub hosts: Vec<HostTensor>,
    /// Where the outputs go: the first input's device.
    pub device: Device,
}

impl Staged {
    /// `name` is who gets them, for errors.
    pub(crate) fn new(name: &str, inputs: &[&Tensor]) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Inputs { expert: name.to_owned(), reason };
        let first = inputs.first().ok_or_else(|| wrong("there are none".into()))?;
        let tensors = inputs.iter().map(|t| t.f_to(Device::Cpu)).collect::<Result<Vec<_>, _>>()?;
        let hosts = tensors.iter().map(to_host).collect::<Result<Vec<_>, _>>()?;
        let rows = hosts[0].rows();
        match hosts.iter().position(|host| host.rows() != rows || rows == 0) {
            Some(i) => {
                Err(wrong(format!("input {i} has shape {:?}; all need {rows} rows, at least 1", hosts[i].shape())))
            }
            None => Ok(Self { tensors, hosts, device: first.device() }),
        }
    }

    /// Number, dtypes and ranks as the schema says. Sizes are the expert's to judge: sequences may have another length
    /// than the schema's sample (docs/wire.md §9.4).
    pub(crate) fn check(&self, name: &str, info: &ExpertInfo) -> Result<(), Error> {
        let wrong = |reason: String| Error::Inputs { expert: name.to_owned(), reason };
        let expected = info.flat_inputs();
        if expected.len() != self.hosts.len() {
            return Err(wrong(format!("it takes {} inputs, got {}", expected.len(), self.hosts.len())));
        }
        for (i, (want, got)) in expected.into_iter().zip(&self.hosts).enumerate() {
            if let Some(dtype) = want.dtype.filter(|&dtype| dtype != got.dtype()) {
                let hint = kind(dtype);
                let got = got.dtype();
                return Err(wrong(format!(
                    "input {i} is {got}, it takes {dtype}; convert with to_kind(Kind::{hint:?})"
                )));
            }
            if want.size.len() != got.shape().len() {
                let sizes: Vec<_> = want.size.iter().map(|s| s.map_or("batch".into(), |s| s.to_string())).collect();
                let sizes = sizes.join(", ");
                return Err(wrong(format!("input {i} has shape {:?}, it takes [{sizes}]", got.shape())));
            }
        }
        Ok(())
    }

    /// Gradients that came back, where the inputs are floats.
    pub(crate) fn gradients(
        name: &str,
        inputs: &[HostTensor],
        grads: Vec<HostTensor>,
    ) -> Result<Vec<Option<Tensor>>, Error> {
        let fits = grads.len() == inputs.len()
            && grads.iter().zip(inputs).all(|(g, i)| g.shape() == i.shape() && g.dtype() == i.dtype());
        if !fits {
            let reason = format!("gradients {grads:?} for inputs {inputs:?}");
            return Err(Error::Answer { expert: name.to_owned(), reason });
        }
        grads
            .into_iter()
            .map(|grad| if grad.dtype().is_float() { to_tensor(grad).map(Some) } else { Ok(None) })
            .collect()
    }
}

/// The output gradients of a node, zeros where the loss does not use an output. `like`: the outputs' empty likenesses.
pub(crate) fn output_gradients(grads: &[Option<Tensor>], like: &[Like]) -> Result<Vec<HostTensor>, Error> {
    let host = |(grad, like): (&Option<Tensor>, &Like)| match grad {
        Some(grad) => to_host(grad),
        None => Ok(HostTensor::zeros(like.0, like.1.clone())?),
    };
    grads.iter().zip(like).map(host).collect()
}

/// Dtype and shape of an output.
pub(crate) struct Like(skep_wire::DType, Vec<usize>);

impl Like {
    pub(crate) fn all(outputs: &[HostTensor]) -> Vec<Like> {
        outputs.iter().map(|output| Like(output.dtype(), output.shape().to_vec())).collect()
    }
}
