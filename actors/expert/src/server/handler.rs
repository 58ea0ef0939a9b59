//! Serves `rpc_info`, `rpc_forward` and `rpc_backward` for the experts of a directory.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use prost::Message;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{Answer, Body, Inbound, RequestKey, ServeError, Service, TensorBody};
use skep_wire::{
    Compression, HostTensor, Method,
    compression::{compress, decompress},
    proto::{
        self,
        runtime::{ExpertInfo, ExpertUid, Tensor},
    },
};
use tracing::debug;

use super::{directory::Directory, once::Once};
use crate::{ExpertHandle, Kind, executor::ExecutorGroup, task::InFlight};

/// Encoded bytes above which codecs run on an executor instead of the thread that carries all calls.
const INLINE_CODEC_BYTES: usize = 64 << 10;

/// The service that a server routes its methods to.
#[derive(Clone)]
pub(crate) struct RequestHandler {
    pub directory: Directory,
    pub executors: ExecutorGroup,
    pub legacy_deadline: Duration,
    /// Calls that are being served.
    pub calls: Arc<InFlight>,
    pub once: Once,
}

impl Service for RequestHandler {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        let (handler, ticket) = (self.clone(), self.calls.enter());
        Box::pin(async move {
            let (peer, method) = (inbound.peer, inbound.method);
            let limit = Deadline::after(handler.executors.now(), handler.legacy_deadline);
            let deadline = inbound.meta.deadline.min(limit);
            let clock = handler.executors.clock().clone();
            let served = before(&*clock, deadline, handler.answer(inbound, deadline)).await;
            let result = served.unwrap_or(Err(ServeError::Deadline));
            if let Err(error) = &result {
                debug!(%peer, %method, %error, "call failed");
            }
            drop(ticket);
            result
        })
    }
}

impl RequestHandler {
    async fn answer(&self, inbound: Inbound, deadline: Deadline) -> Result<Answer, ServeError> {
        match (inbound.method, &inbound.body) {
            (Method::Info, Body::Message(message)) => self.info(message),
            (Method::Forward, Body::Tensors(_)) => self.run(Kind::Forward, inbound, deadline).await,
            (Method::Backward, Body::Tensors(_)) => self.run(Kind::Backward, inbound, deadline).await,
            (method @ (Method::Info | Method::Forward | Method::Backward), _) => {
                Err(ServeError::Invalid(format!("{method} came with a body of another method")))
            }
            (method, _) => Err(ServeError::Refused(format!("{method} is not served by experts"))),
        }
    }

    fn info(&self, message: &[u8]) -> Result<Answer, ServeError> {
        let request = proto::decode::<ExpertUid>(message)
            .map_err(|error| ServeError::Invalid(format!("malformed request for expert info: {error}")))?;
        let expert = self.directory.find(&request.uid)?;
        let info = ExpertInfo { serialized_info: expert.info().encode().into() };
        Ok(Answer { body: Body::Message(info.encode_to_vec().into()), load: Some(expert.load()) })
    }

    async fn run(&self, kind: Kind, inbound: Inbound, deadline: Deadline) -> Result<Answer, ServeError> {
        let Inbound { peer, body: Body::Tensors(body), meta, knows_overload, .. } = inbound else {
            return Err(ServeError::Invalid("tensors were expected".to_owned()));
        };
        let expert = self.directory.find(&body.uid)?;
        let tensors = self.decode(body.tensors).await?;
        let accepted = match (kind, knows_overload) {
            // Who knows overload speaks a wire that carries request ids.
            (Kind::Backward, true) => {
                let key = RequestKey { peer, id: meta.request_id, uid: body.uid };
                return self.backward_once(key, expert, tensors, deadline).await;
            }
            (Kind::Forward, true) => expert.submit(kind, tensors, deadline)?,
            (_, false) => expert.submit_when_room(kind, tensors, deadline).await?,
        };
        let results = accepted.answer().await?;
        self.encode(&expert, kind, results).await
    }

    async fn decode(&self, tensors: Vec<Tensor>) -> Result<Vec<HostTensor>, ServeError> {
        let small = encoded_bytes_to_decode(&tensors) <= INLINE_CODEC_BYTES;
        let work = move || tensors.iter().enumerate().map(|(i, tensor)| decode_one(i, tensor)).collect();
        if small {
            return work();
        }
        self.on_executor(work).await?
    }

    /// The answer, compressed as the expert's schema says.
    pub(crate) async fn encode(
        &self,
        expert: &ExpertHandle,
        kind: Kind,
        results: Vec<HostTensor>,
    ) -> Result<Answer, ServeError> {
        let codecs: Vec<Compression> = expert.expert().schema.answer_compression(kind).collect();
        let bytes: usize = results.iter().zip(&codecs).map(|(t, codec)| codec_bytes(t.data().len(), *codec)).sum();
        let work = move || results.iter().zip(codecs).map(|(tensor, codec)| encode_one(tensor, codec)).collect();
        let tensors: Result<Vec<Tensor>, ServeError> =
            if bytes <= INLINE_CODEC_BYTES { work() } else { self.on_executor(work).await? };
        let body = Body::Tensors(TensorBody { uid: String::new(), tensors: tensors? });
        Ok(Answer { body, load: Some(expert.load()) })
    }

    async fn on_executor<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> Result<R, ServeError> {
        let result = self.executors.run(work).map_err(|_| ServeError::Internal("no executor takes work".to_owned()))?;
        result.await.map_err(|_| ServeError::Internal("a tensor codec panicked".to_owned()))
    }
}

fn codec_bytes(bytes: usize, codec: Compression) -> usize {
    if codec == Compression::None { 0 } else { bytes }
}

/// Bytes that decoding touches; uncompressed tensors are only wrapped, except bfloat16, which may come widened.
fn encoded_bytes_to_decode(tensors: &[Tensor]) -> usize {
    let touched = |tensor: &&Tensor| tensor.compression != Compression::None as i32 || tensor.dtype == "bfloat16";
    tensors.iter().filter(touched).map(|tensor| tensor.buffer.len()).sum()
}

fn decode_one(i: usize, tensor: &Tensor) -> Result<HostTensor, ServeError> {
    decompress(tensor).map_err(|error| ServeError::Invalid(format!("tensor {i}: {error}")))
}

/// Encodes as the schema says; what its codec does not take travels uncompressed, which every reader understands.
fn encode_one(tensor: &HostTensor, codec: Compression) -> Result<Tensor, ServeError> {
    compress(tensor, codec)
        .or_else(|_| compress(tensor, Compression::None))
        .map_err(|error| ServeError::Internal(format!("cannot encode an answer: {error}")))
}
