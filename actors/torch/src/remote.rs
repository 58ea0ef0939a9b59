//! [`RemoteExpert`]: an expert of another process as a differentiable function.

use std::{sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use skep_moe::Client;
use skep_rpc::RpcError;
use skep_wire::{ExpertInfo, ExpertUid, HostTensor};
use tch::Tensor;

use crate::{
    Error, attach,
    staging::{Like, Staged, output_gradients},
    to_tensor,
};

/// Longest wait for one call unless [`RemoteExpert::with_timeout`] says otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);

/// An expert of another process in the graph: `backward()` of a loss behind it trains the expert, whether or not its
/// inputs require grad.
///
/// Every call blocks the thread, at most for the timeout, and works on any thread but skep's own. A timeout in `backward()`
/// leaves open whether the expert made that training step.
#[derive(Clone)]
pub struct RemoteExpert {
    inner: skep_moe::RemoteExpert,
    timeout: Duration,
}

impl RemoteExpert {
    /// Finds who hosts `uid`, as in `ffn.0.12`, and fetches its schema.
    ///
    /// # Errors
    /// [`Error::NotFound`] when nobody announces it; [`Error::Rpc`] when the search or the host does not answer.
    pub fn find(client: &impl AsRef<Client>, uid: &str) -> Result<Self, Error> {
        let (client, uid): (&Client, ExpertUid) = (client.as_ref(), uid.parse()?);
        let found = skep_moe::RemoteExpert::find_wait(client, &uid, client.deadline(TIMEOUT));
        match found.map_err(|source| Error::rpc(&uid, source))? {
            Some(inner) => Ok(inner.into()),
            None => Err(Error::NotFound { uid: uid.to_string() }),
        }
    }

    /// An expert of a peer that is known to host it; its schema is fetched.
    pub fn at(client: &impl AsRef<Client>, uid: &str, peer: PeerId) -> Result<Self, Error> {
        let (client, uid): (Client, ExpertUid) = (client.as_ref().clone(), uid.parse()?);
        let (deadline, name) = (client.deadline(TIMEOUT), uid.to_string());
        let owned = client.clone();
        let found = client.wait(deadline, async move { skep_moe::RemoteExpert::at(&owned, uid, peer, deadline).await });
        found.map(Self::from).map_err(|source| Error::rpc(name, source))
    }

    /// The same expert with another limit on the wait for each call.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Its name.
    pub fn uid(&self) -> &ExpertUid {
        self.inner.uid()
    }

    /// Who hosts it.
    pub fn peer(&self) -> PeerId {
        self.inner.peer()
    }

    /// Its schema.
    pub fn info(&self) -> &Arc<ExpertInfo> {
        self.inner.info()
    }

    /// The expert over host tensors.
    pub fn host(&self) -> &skep_moe::RemoteExpert {
        &self.inner
    }

    /// Outputs for these inputs, in schema order, `[batch, …]` each, on the first input's device.
    ///
    /// # Errors
    /// [`Error::Inputs`] when number, dtypes or ranks are not the schema's, without a call; [`Error::Rpc`] with the
    /// expert's own words otherwise. Errors of the backward call end `backward()`: see
    /// [`take_backward_error`](crate::take_backward_error).
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, Error> {
        forward_through(Arc::new(self.clone()), inputs)
    }
}

impl From<skep_moe::RemoteExpert> for RemoteExpert {
    fn from(inner: skep_moe::RemoteExpert) -> Self {
        Self { inner, timeout: TIMEOUT }
    }
}

/// Whoever computes an expert's outputs and gradients.
pub(crate) trait Compute: Send + Sync {
    fn name(&self) -> String;
    fn info(&self) -> &ExpertInfo;
    fn forward(&self, inputs: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError>;
    fn backward(&self, inputs: Vec<HostTensor>, grads: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError>;
}

impl Compute for RemoteExpert {
    fn name(&self) -> String {
        self.uid().to_string()
    }

    fn info(&self) -> &ExpertInfo {
        self.inner.info()
    }

    fn forward(&self, inputs: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError> {
        self.inner.forward_wait(inputs, self.inner.client().deadline(self.timeout))
    }

    fn backward(&self, inputs: Vec<HostTensor>, grads: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError> {
        self.inner.backward_wait(inputs, grads, self.inner.client().deadline(self.timeout))
    }
}

fn forward_through(expert: Arc<dyn Compute>, inputs: &[&Tensor]) -> Result<Vec<Tensor>, Error> {
    let name = expert.name();
    let staged = Staged::new(&name, inputs)?;
    staged.check(&name, expert.info())?;
    let outputs = expert.forward(staged.hosts.clone()).map_err(|source| Error::rpc(&name, source))?;
    let like = Like::all(&outputs);
    let outputs = outputs.into_iter().map(to_tensor).collect::<Result<Vec<_>, _>>()?;
    let Staged { tensors, hosts, device } = staged;
    let backward = move |grads: &[Option<Tensor>]| {
        let name = expert.name();
        let grads = output_gradients(grads, &like)?;
        let answer = expert.backward(hosts.clone(), grads).map_err(|source| Error::rpc(&name, source))?;
        Staged::gradients(&name, &hosts, answer)
    };
    let outputs = attach("RemoteExpert", &tensors.iter().collect::<Vec<_>>(), &outputs, backward)?;
    Ok(outputs.iter().map(|output| output.f_to(device)).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use skep_expert::{Backend, Batch};
    use skep_kernel::Rows;
    use tch::{Device, Kind};

    use super::*;
    use crate::{Ffn, ModuleSpec, OptimizerSpec, Sgd, TorchBackend, take_backward_error};

    /// An expert without a network between.
    struct Near(Mutex<TorchBackend>, ExpertInfo);

    impl Near {
        fn new(spec: &ModuleSpec, optimizer: OptimizerSpec) -> Arc<Self> {
            let backend = TorchBackend::new(spec.build(Device::Cpu, 3).unwrap(), optimizer, Device::Cpu).unwrap();
            let info = backend.info().clone();
            Arc::new(Self(Mutex::new(backend), info))
        }

        fn steps(&self) -> u64 {
            self.0.lock().unwrap().steps()
        }
    }

    fn remote_error(error: impl std::fmt::Display) -> RpcError {
        RpcError::Remote { text: error.to_string() }
    }

    impl Compute for Near {
        fn name(&self) -> String {
            "ffn.3".into()
        }
        fn info(&self) -> &ExpertInfo {
            &self.1
        }
        fn forward(&self, inputs: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError> {
            let batch = Batch { rows: Rows(inputs[0].rows() as u32), inputs, grad_outputs: vec![] };
            self.0.lock().unwrap().forward(&batch).map_err(remote_error)
        }
        fn backward(
            &self,
            inputs: Vec<HostTensor>,
            grad_outputs: Vec<HostTensor>,
        ) -> Result<Vec<HostTensor>, RpcError> {
            let batch = Batch { rows: Rows(inputs[0].rows() as u32), inputs, grad_outputs };
            self.0.lock().unwrap().backward(&batch).map_err(remote_error)
        }
    }

    fn randn(shape: [i64; 2]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn gradients_through_two_experts_equal_those_of_the_same_modules_in_one_graph() {
        let expert = Near::new(&Ffn::hidden(8), OptimizerSpec::none());
        let module = Ffn::hidden(8).build(Device::Cpu, 3).unwrap();
        let x = randn([5, 8]).set_requires_grad(true);
        let near = x.detach().set_requires_grad(true);
        let remote = |x: &Tensor| forward_through(expert.clone(), &[x]).unwrap().remove(0);
        let local = |x: &Tensor| module.forward(&[x.shallow_clone()]).unwrap().remove(0);
        let (y, z) = (remote(&(remote(&(&x * 2.0)).tanh() + &x)), local(&(local(&(&near * 2.0)).tanh() + &near)));
        assert!(y.allclose(&z, 1e-5, 1e-6, false));
        y.square().sum(Kind::Float).backward();
        z.square().sum(Kind::Float).backward();
        assert!(x.grad().allclose(&near.grad(), 1e-4, 1e-5, false));
    }

    #[test]
    fn backward_trains_the_expert_though_its_input_needs_no_gradient() {
        let expert = Near::new(&Ffn::hidden(8), Sgd::lr(0.1).into());
        let (x, target) = (randn([16, 8]), randn([16, 8]));
        let mut losses = Vec::new();
        for step in 0..30 {
            let y = forward_through(expert.clone(), &[&x]).unwrap().remove(0);
            let loss = y.mse_loss(&target, tch::Reduction::Mean);
            loss.backward();
            losses.push(loss.double_value(&[]));
            assert_eq!(expert.steps(), step + 1);
        }
        assert!(losses[29] < losses[0], "{losses:?}");
        tch::no_grad(|| forward_through(expert.clone(), &[&x])).unwrap();
        assert_eq!(expert.steps(), 30);
    }

    #[test]
    fn integer_inputs_have_no_gradient() {
        let expert = Near::new(&crate::DetDropout::hidden(8), Sgd::lr(0.1).into());
        let x = randn([4, 8]).set_requires_grad(true);
        let mask = Tensor::ones([4, 8], (Kind::Int64, Device::Cpu));
        forward_through(expert.clone(), &[&x, &mask]).unwrap()[0].sum(Kind::Float).backward();
        assert!(x.grad().defined());
        assert_eq!(expert.steps(), 1);
    }

    #[test]
    fn inputs_that_do_not_fit_are_named_before_any_call() {
        let expert = Near::new(&Ffn::hidden(8), Sgd::lr(0.1).into());
        let refused = |inputs: &[&Tensor]| forward_through(expert.clone(), inputs).unwrap_err().to_string();
        let x = randn([4, 8]);
        assert!(refused(&[&x.to_kind(Kind::Double)]).contains("to_kind(Kind::Float)"));
        assert!(refused(&[&x, &x]).contains("takes 1 inputs, got 2"));
        assert!(refused(&[&x.reshape([2, 2, 8])]).contains("[batch, 8]"));
        assert!(refused(&[&randn([0, 8])]).contains("at least 1"));
        assert!(refused(&[]).contains("none"));
        assert!(refused(&[&randn([4, 9])]).starts_with("ffn.3: remote error"), "the width is the expert's to judge");
    }

    #[test]
    fn the_experts_words_come_out_of_backward() {
        let expert = Near::new(&Ffn::hidden(8), Sgd::lr(0.1).into());
        let y = forward_through(expert, &[&randn([4, 8])]).unwrap().remove(0);
        let error = (y * f64::NAN).sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("ffn.3: remote error: gradient of input 0 is not finite"), "{error}");
        assert!(matches!(take_backward_error(), Some(Error::Rpc { expert, .. }) if expert == "ffn.3"));
    }
}
