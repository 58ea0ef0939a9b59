//! One call to one expert: packing tensors by its schema, waiting out overload, checking the answer.

use std::{sync::Arc, time::Duration};

use libp2p_identity::PeerId;
use prost::Message;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{Body, Call, Meta, RequestId, RpcError, Step, TensorBody};
use skep_wire::{ExpertInfo, ExpertUid, HostTensor, Method, compression, limits::MAX_CALL_ROWS, proto};

use crate::{Client, codec};

/// Calls of one logical request, the first included, before overload or an unreachable peer is taken for an answer.
const MAX_ATTEMPTS: u32 = 4;
/// What a transport may take to say that a deadline has passed.
const GRACE: Duration = Duration::from_millis(10);
/// Shortest wait before a call that did not run is made again.
const MIN_RETRY: Duration = Duration::from_millis(20);

/// Fetches the schema of an expert.
pub(crate) async fn fetch_info(
    client: &Client,
    uid: &ExpertUid,
    peer: PeerId,
    deadline: Deadline,
) -> Result<ExpertInfo, RpcError> {
    let question = proto::runtime::ExpertUid { uid: uid.as_str().to_owned() };
    let body = Body::Message(question.encode_to_vec().into());
    let asking = deliver(client, peer, Method::Info, body, client.fresh_request_id(), deadline);
    let answer = in_time(client, peer, deadline, asking).await?;
    let malformed = |reason: String| RpcError::Malformed { peer, reason };
    let Body::Message(bytes) = answer else {
        return Err(malformed("tensors instead of an expert's schema".to_owned()));
    };
    let info = proto::decode::<proto::runtime::ExpertInfo>(bytes);
    let info = info.map_err(|error| malformed(error.to_string()))?;
    ExpertInfo::decode(&info.serialized_info).map_err(|error| malformed(error.to_string()))
}

/// What an expert's call carries and how its answer must look.
pub(crate) struct ExpertCall {
    pub uid: ExpertUid,
    pub peer: PeerId,
    pub info: Arc<ExpertInfo>,
    /// One tensor per flat input.
    pub inputs: Vec<HostTensor>,
    /// Backward: one gradient per flat output.
    pub grad_outputs: Option<Vec<HostTensor>>,
    /// Take answers that are not finite for failures.
    pub must_be_finite: bool,
}

impl ExpertCall {
    /// Calls, and checks the answer. A call that certainly did not run is made again, under the same request id.
    /// Ends by the deadline, whatever the peer, the network's threads and the codecs do.
    pub async fn send(self, client: &Client, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let peer = self.peer;
        in_time(client, peer, deadline, self.exchange(client, deadline)).await
    }

    async fn exchange(self, client: &Client, deadline: Deadline) -> Result<Vec<HostTensor>, RpcError> {
        let (rows, peer, call) = (self.check()?, self.peer, Arc::new(self));
        let method = if call.grad_outputs.is_some() { Method::Backward } else { Method::Forward };
        let packing = call.clone();
        let packed = codec::run(call.bytes_to_pack(), move || packing.pack()).await;
        let tensors = packed.unwrap_or_else(|panic| Err(format!("a tensor codec panicked: {panic}")));
        let tensors = tensors.map_err(|reason| RpcError::Invalid { reason })?;
        let body = Body::Tensors(TensorBody { uid: call.uid.as_str().to_owned(), tensors });
        let answer = deliver(client, peer, method, body, client.fresh_request_id(), deadline).await?;
        let unpacked = codec::run(call.bytes_to_unpack(&answer), move || call.unpack(answer, rows)).await;
        let tensors = unpacked.unwrap_or_else(|panic| Err(format!("a tensor codec panicked: {panic}")));
        tensors.map_err(|reason| RpcError::Malformed { peer, reason })
    }

    fn bytes_to_pack(&self) -> usize {
        let gradients = self.grad_outputs.as_deref().unwrap_or_default();
        let inputs = codec::bytes_to_encode(&self.inputs, &self.info.flat_inputs());
        inputs + codec::bytes_to_encode(gradients, &self.info.flat_outputs())
    }

    fn pack(&self) -> Result<Vec<proto::runtime::Tensor>, String> {
        let inputs = self.inputs.iter().zip(self.info.flat_inputs());
        let gradients = self.grad_outputs.iter().flatten().zip(self.info.flat_outputs());
        let packed = inputs.chain(gradients).map(|(tensor, d)| compression::compress(tensor, d.compression));
        packed.collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    fn bytes_to_unpack(&self, answer: &Body) -> usize {
        match answer {
            Body::Tensors(_) if self.must_be_finite => answer.len(),
            Body::Tensors(body) => codec::bytes_to_decode(&body.tensors),
            Body::Message(_) => 0,
        }
    }

    /// The structure must fit; whether sizes and dtypes do is the expert's to say (docs/wire.md §10.1).
    fn check(&self) -> Result<usize, RpcError> {
        let invalid = |reason: String| RpcError::Invalid { reason: format!("expert {}: {reason}", self.uid) };
        let (inputs, outputs) = (self.info.flat_inputs().len(), self.info.flat_outputs().len());
        if self.inputs.len() != inputs {
            return Err(invalid(format!("takes {inputs} inputs, got {}", self.inputs.len())));
        }
        if let Some(gradients) = self.grad_outputs.as_ref().filter(|gradients| gradients.len() != outputs) {
            return Err(invalid(format!("takes {outputs} output gradients, got {}", gradients.len())));
        }
        let rows = self.inputs.first().map_or(0, HostTensor::rows);
        let mut all = self.inputs.iter().chain(self.grad_outputs.iter().flatten());
        if let Some(odd) = all.find(|tensor| tensor.rows() != rows) {
            return Err(invalid(format!("every tensor needs {rows} rows, got shape {:?}", odd.shape())));
        }
        if rows == 0 || rows > MAX_CALL_ROWS {
            return Err(invalid(format!("takes 1 to {MAX_CALL_ROWS} rows a call, got {rows}")));
        }
        Ok(rows)
    }

    fn unpack(&self, answer: Body, rows: usize) -> Result<Vec<HostTensor>, String> {
        let Body::Tensors(body) = answer else {
            return Err("a message instead of tensors".to_owned());
        };
        let decoded: Result<Vec<HostTensor>, _> = body.tensors.iter().map(compression::decompress).collect();
        let tensors = decoded.map_err(|error| error.to_string())?;
        match &self.grad_outputs {
            Some(_) => self.check_gradients(&tensors)?,
            None => self.check_outputs(&tensors, rows)?,
        }
        match tensors.iter().position(|tensor| self.must_be_finite && !tensor.is_finite()) {
            Some(index) => Err(format!("tensor {index} is not finite")),
            None => Ok(tensors),
        }
    }

    fn check_gradients(&self, gradients: &[HostTensor]) -> Result<(), String> {
        if gradients.len() != self.inputs.len() {
            return Err(format!("{} input gradients instead of {}", gradients.len(), self.inputs.len()));
        }
        let pairs = gradients.iter().zip(&self.inputs);
        for (index, (got, input)) in pairs.enumerate() {
            if got.dtype() != input.dtype() || got.shape() != input.shape() {
                return Err(format!("gradient {index} is {got:?}, its input {input:?}"));
            }
        }
        Ok(())
    }

    /// Inputs of the schema's sizes give outputs of the schema's sizes. With others, as with longer sequences than the
    /// schema's sample, only rows, dtype and rank are known.
    fn check_outputs(&self, outputs: &[HostTensor], rows: usize) -> Result<(), String> {
        let descriptors = self.info.flat_outputs();
        if outputs.len() != descriptors.len() {
            return Err(format!("{} outputs instead of {}", outputs.len(), descriptors.len()));
        }
        let as_described = self.inputs.iter().zip(self.info.flat_inputs()).all(|(input, d)| d.admits(input));
        for (index, (output, descriptor)) in outputs.iter().zip(descriptors).enumerate() {
            let alike = descriptor.dtype.is_none_or(|d| d == output.dtype())
                && descriptor.size.len() == output.shape().len()
                && output.rows() == rows;
            if !alike || (as_described && !descriptor.admits(output)) {
                return Err(format!("output {index} is {output:?}, expected {rows} rows of {:?}", descriptor.size));
            }
        }
        Ok(())
    }
}

/// Ends a call to a peer by its deadline. The transport keeps deadlines and says more of the peer; it gets a little longer
/// to say so, but its threads may be busy.
async fn in_time<R>(
    client: &Client,
    peer: PeerId,
    deadline: Deadline,
    call: impl Future<Output = Result<R, RpcError>>,
) -> Result<R, RpcError> {
    let started = client.clock.now();
    let latest = Deadline::at(deadline.moment() + GRACE);
    let late = |_| RpcError::Deadline { peer, step: Step::Schedule, waited: deadline.moment().since(started) };
    before(&*client.clock, latest, call).await.map_err(late)?
}

/// Whether the peer cannot have begun the call.
fn did_not_run(error: &RpcError) -> bool {
    match error {
        RpcError::Overloaded { .. } => true,
        RpcError::Unreachable { step, .. } => *step == Step::OpenStream,
        _ => false,
    }
}

async fn deliver(
    client: &Client,
    peer: PeerId,
    method: Method,
    body: Body,
    request_id: RequestId,
    deadline: Deadline,
) -> Result<Body, RpcError> {
    let mut attempt = 1;
    loop {
        let meta = Meta { deadline, request_id, trace: None };
        let failure = match client.transport.call(Call { peer, method, body: body.clone(), meta }).await {
            Ok(answer) => return Ok(answer.body),
            Err(failure) => failure,
        };
        let wait = match &failure {
            RpcError::Overloaded { retry_after, .. } => (*retry_after).max(MIN_RETRY),
            _ => MIN_RETRY,
        };
        let again = client.clock.now() + wait;
        if attempt == MAX_ATTEMPTS || !did_not_run(&failure) || deadline.has_passed(again) {
            return Err(failure);
        }
        client.clock.sleep_until(again).await;
        attempt += 1;
    }
}
