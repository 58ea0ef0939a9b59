//! Calls of others on hivemind's wire: read, served through the router, answered (docs/wire.md §2.2, §3).
//!
//! Every call ends: reading, serving and answering have their deadlines, and a caller who leaves takes the work along.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::AsyncWriteExt as _;
use libp2p::{PeerId, Stream};
use skep_kernel::{Deadline, SharedClock, time::before};
use skep_rpc::{Answer, Body, Inbound, Meta, RequestId, Router, ServeError, Service as _, TensorBody};
use skep_wire::{
    Framing, Method,
    chunk::{self, Assembler, split_for_streaming},
    error_text,
    frame::{
        FrameError,
        stream::{self, Kind},
        unary::{self, UnaryMessage},
    },
    proto::{self, gather_response, runtime::ExpertRequest},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::{
    budget::{Budget, Held, NoRoom},
    config::{NetLimits, NetTimeouts},
    io::{self, ReadError},
    peers::SharedBook,
    status::Counters,
    streams::Accepted,
};

/// Serves the substreams that peers open.
pub(crate) struct Server {
    pub(crate) router: Router,
    pub(crate) clock: SharedClock,
    pub(crate) limits: NetLimits,
    pub(crate) timeouts: NetTimeouts,
    pub(crate) book: SharedBook,
    pub(crate) counters: Arc<Counters>,
    pub(crate) door: Arc<Door>,
}

/// What lets calls in. Expert calls cannot keep out those of the DHT.
pub(crate) struct Door {
    experts: Arc<Semaphore>,
    dht: Arc<Semaphore>,
    bytes: Budget,
    max_calls: u32,
    inside: Arc<AtomicUsize>,
    is_shut: AtomicBool,
}

/// A call that was let in; dropping it makes room for another.
pub(crate) struct Visit {
    _permit: OwnedSemaphorePermit,
    inside: Arc<AtomicUsize>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.inside.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Door {
    pub(crate) fn new(limits: &NetLimits) -> Self {
        let max_calls = u32::try_from(limits.max_inbound_calls.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        Self {
            experts: Arc::new(Semaphore::new(max_calls as usize)),
            dht: Arc::new(Semaphore::new(max_calls as usize)),
            bytes: Budget::new(limits.max_inbound_bytes),
            max_calls,
            inside: Arc::default(),
            is_shut: AtomicBool::new(false),
        }
    }

    fn enter(&self, method: Method) -> Result<Visit, ServeError> {
        let calls = match method {
            Method::Ping | Method::Store | Method::Find => &self.dht,
            Method::Info | Method::Forward | Method::Backward => &self.experts,
        };
        if self.is_shut.load(Ordering::Relaxed) {
            return Err(ServeError::Stopping);
        }
        let permit = calls.clone().try_acquire_owned().map_err(|_| self.full())?;
        self.inside.fetch_add(1, Ordering::Relaxed);
        Ok(Visit { _permit: permit, inside: self.inside.clone() })
    }

    fn hold_bytes(&self, bytes: usize) -> Result<Held, ServeError> {
        self.bytes.hold(bytes).map_err(|no_room| match no_room {
            // To come again would not help.
            NoRoom::Never { limit } => over_limit(bytes as u64, limit),
            NoRoom::Now { .. } => self.full(),
        })
    }

    fn full(&self) -> ServeError {
        let waiting = u32::try_from(self.inside()).unwrap_or(u32::MAX);
        ServeError::Overloaded { waiting, limit: self.max_calls, retry_after: RETRY_AFTER }
    }

    /// Calls that are being served.
    pub(crate) fn inside(&self) -> usize {
        self.inside.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> usize {
        self.bytes.free()
    }

    /// Lets nobody in any more.
    pub(crate) fn shut(&self) {
        self.is_shut.store(true, Ordering::Relaxed);
    }

    /// Shuts the door and waits until everybody has left.
    pub(crate) async fn empty(&self) {
        self.shut();
        for calls in [&self.experts, &self.dht] {
            if let Ok(all) = calls.acquire_many(self.max_calls).await {
                all.forget();
            }
        }
    }
}

/// Why a substream ended without an answer.
#[derive(Debug, thiserror::Error)]
enum Dropped {
    #[error("the caller sent no valid request: {0}")]
    Request(#[from] ReadError),
    #[error("the caller did not send its request in time")]
    SlowRequest,
    #[error("the caller left")]
    CallerLeft,
    #[error("the answer could not be written: {0}")]
    Answer(std::io::Error),
    #[error("the caller did not take its answer in time")]
    SlowAnswer,
}

/// A request, or why it cannot be served.
struct Request {
    body: Result<Body, ServeError>,
    /// Bytes that it holds; `None` when there was no room and it was discarded.
    _bytes: Option<Held>,
}

impl Server {
    /// Serves one substream to its end.
    pub(crate) async fn serve(self: Arc<Self>, accepted: Accepted) {
        let Accepted { peer, method, framing, stream, slot } = accepted;
        let ended = match framing {
            Framing::Unary => self.unary(peer, method, stream).await,
            Framing::Stream => self.stream(peer, method, stream).await,
        };
        match ended {
            Ok(answered) => self.see_out(answered).await,
            Err(reason) => debug!(%peer, %method, %reason, "a call ended without an answer"),
        }
        drop(slot);
    }

    async fn unary(&self, peer: PeerId, method: Method, mut stream: Stream) -> Result<Stream, Dropped> {
        let visit = self.enter(method);
        let read = self.read_unary(&mut stream, method, visit.as_ref().err());
        let (call_id, request) = self.in_time(self.timeouts.read_request, read).await.ok_or(Dropped::SlowRequest)??;
        let outcome = self.answer(peer, method, request, &mut stream).await?;
        let encoded = outcome.and_then(|answer| {
            unary::encode_response(&call_id, segments(answer.body)).map_err(|error| too_large(method, error))
        });
        let frame = encoded.unwrap_or_else(|error| {
            let (kind, message) = error.as_python();
            unary::encode_error(&call_id, &error_text::repr(kind, &message))
        });
        self.write(stream, frame).await
    }

    /// Reads a unary request. One that was refused, or finds no room, is only drained.
    async fn read_unary(
        &self,
        stream: &mut Stream,
        method: Method,
        refused: Option<&ServeError>,
    ) -> Result<(unary::CallId, Request), ReadError> {
        let length = io::read_unary_length(stream).await?;
        let room = refused.map_or_else(|| self.hold_bytes(length), |refusal| Err(refusal.clone()));
        let mut bytes = match room {
            Ok(bytes) => bytes,
            Err(refusal) => {
                let call_id = drain_unary(stream, length).await?;
                return Ok((call_id, Request { body: Err(refusal), _bytes: None }));
            }
        };
        let frame = unary::Frame::decode(io::read_body(stream, length).await?)?;
        let body = match frame.message {
            UnaryMessage::Request { proto, .. } if proto != method.unary_name() => {
                Err(ServeError::Invalid(format!("the call names {proto:?} on a stream of {}", method.unary_name())))
            }
            UnaryMessage::Request { data, .. } => decode_body(method, data).and_then(|body| {
                if let Body::Tensors(body) = &body {
                    bytes.merge(self.hold_bytes(chunk::overhead(&body.tensors))?);
                }
                Ok(body)
            }),
            _ => Err(ServeError::Invalid("expected a request, got an answer".to_owned())),
        };
        Ok((frame.call_id, Request { body, _bytes: Some(bytes) }))
    }

    async fn stream(&self, peer: PeerId, method: Method, mut stream: Stream) -> Result<Stream, Dropped> {
        let visit = self.enter(method);
        let read = self.read_stream(&mut stream, visit.as_ref().err());
        let request = self.in_time(self.timeouts.read_request, read).await.ok_or(Dropped::SlowRequest)??;
        let outcome = self.answer(peer, method, request, &mut stream).await?;
        let frames = outcome
            .and_then(|answer| stream_frames(answer.body).map_err(|error| ServeError::Internal(error.to_string())));
        let frames = frames.unwrap_or_else(|error| {
            let (kind, message) = error.as_python();
            vec![stream::encode_error(&error_text::bare(kind, &message))]
        });
        self.write(stream, frames).await
    }

    /// Reads the messages of a streamed request up to the caller's end frame. Once it is refused the rest is drained.
    async fn read_stream(&self, stream: &mut Stream, refused: Option<&ServeError>) -> Result<Request, ReadError> {
        let mut uid: Option<String> = None;
        let mut pieces = Assembler::new(self.limits.max_body_bytes);
        let mut held: Option<Held> = None;
        let mut failure = refused.cloned();
        loop {
            let header = io::read_stream_header(stream).await?;
            if header.kind == Kind::Error {
                io::discard(stream, header.len).await?;
                break;
            }
            if failure.is_none() {
                failure = self.hold_more(&mut held, header.len).err();
            }
            if failure.is_some() {
                io::discard(stream, header.len).await?;
                continue;
            }
            let message = io::read_body(stream, header.len).await?;
            let taken = take_piece(&mut pieces, &mut uid, message);
            failure = taken.and_then(|overhead| self.hold_more(&mut held, overhead)).err();
        }
        let body = match failure {
            Some(failure) => Err(failure),
            None => Ok(Body::Tensors(TensorBody { uid: uid.unwrap_or_default(), tensors: pieces.finish() })),
        };
        Ok(Request { body, _bytes: held })
    }

    /// Asks the router, until the deadline and as long as the caller stays.
    async fn answer(
        &self,
        peer: PeerId,
        method: Method,
        request: Request,
        stream: &mut Stream,
    ) -> Result<Result<Answer, ServeError>, Dropped> {
        let body = match request.body {
            Ok(body) => body,
            Err(refusal) => return Ok(Err(refusal)),
        };
        Counters::add(&self.counters.calls_in);
        let deadline = Deadline::after(self.clock.now(), self.timeouts.legacy_deadline);
        let meta = Meta { deadline, request_id: RequestId(rand::random()), trace: None };
        let inbound = Inbound { peer, method, body, meta, knows_overload: false };
        let work = before(&*self.clock, deadline, self.router.serve(inbound));
        tokio::select! {
            biased;
            () = io::caller_left(stream) => {
                Counters::add(&self.counters.calls_in_left);
                Err(Dropped::CallerLeft)
            }
            done = work => {
                let outcome = done.unwrap_or(Err(ServeError::Deadline));
                if outcome.is_ok() {
                    self.book.with(|book| book.vouch(peer));
                }
                Ok(outcome)
            }
        }
    }

    /// Writes the answer and closes our half of the stream, which flushes it.
    async fn write(&self, mut stream: Stream, frame: Vec<Bytes>) -> Result<Stream, Dropped> {
        let write = async {
            io::write_segments(&mut stream, &frame).await?;
            stream.close().await
        };
        let written = self.in_time(self.timeouts.write_answer, write).await.ok_or(Dropped::SlowAnswer)?;
        written.map(|()| stream).map_err(Dropped::Answer)
    }

    /// Reads on until the caller closes its half, too: a stream that is dropped before may be reset, and a Python caller
    /// takes a reset for the end of the answer.
    async fn see_out(&self, mut answered: Stream) {
        let farewell = io::discard(&mut answered, self.limits.max_body_bytes);
        let _however_it_ended = self.in_time(self.timeouts.write_answer, farewell).await;
    }

    pub(crate) fn enter(&self, method: Method) -> Result<Visit, ServeError> {
        self.door.enter(method).inspect_err(|_| Counters::add(&self.counters.calls_in_refused))
    }

    pub(crate) fn hold_bytes(&self, bytes: usize) -> Result<Held, ServeError> {
        self.door.hold_bytes(bytes).inspect_err(|_| Counters::add(&self.counters.calls_in_refused))
    }

    fn hold_more(&self, held: &mut Option<Held>, bytes: usize) -> Result<(), ServeError> {
        let more = self.hold_bytes(bytes)?;
        match held {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }

    async fn in_time<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
        before(&*self.clock, Deadline::after(self.clock.now(), limit), work).await.ok()
    }
}

/// A request that is never taken, however long its caller waits.
pub(crate) fn over_limit(bytes: u64, limit: usize) -> ServeError {
    ServeError::Invalid(format!("a request of {bytes} bytes is over the limit of {limit}"))
}

/// When a caller that was not let in may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Tag and length of `callId`, the first field of a unary frame.
const CALL_ID_FIELD: &[u8] = &[0x0a, 16];

/// Reads a refused request to its end: a caller that is still writing would miss the answer. The call id stands first;
/// without it nobody could match the refusal to the call.
async fn drain_unary(stream: &mut Stream, length: usize) -> Result<unary::CallId, ReadError> {
    let head = io::read_body(stream, length.min(CALL_ID_FIELD.len() + 16)).await?;
    io::discard(stream, length - head.len()).await?;
    let id = head.strip_prefix(CALL_ID_FIELD).and_then(|id| unary::CallId::try_from(id).ok());
    Ok(id.ok_or(FrameError::CallId(0))?)
}

fn decode_body(method: Method, data: Bytes) -> Result<Body, ServeError> {
    if !method.carries_tensors() {
        return Ok(Body::Message(data));
    }
    let request = proto::decode::<ExpertRequest>(data).map_err(|error| ServeError::Invalid(error.to_string()))?;
    Ok(Body::Tensors(TensorBody { uid: request.uid, tensors: request.tensors }))
}

/// One message of a streamed request: its uid must be that of the others, its piece belongs to the latest tensor. Gives
/// the memory that it takes beside its bytes.
fn take_piece(pieces: &mut Assembler, uid: &mut Option<String>, message: Bytes) -> Result<usize, ServeError> {
    let frame_len = message.len();
    let request = proto::decode::<ExpertRequest>(message).map_err(|error| ServeError::Invalid(error.to_string()))?;
    let expected = uid.get_or_insert_with(|| request.uid.clone());
    if *expected != request.uid {
        let text = format!("one call names two experts: {expected:?} and {:?}", request.uid);
        return Err(ServeError::Invalid(text));
    }
    let overhead = chunk::overhead(&request.tensors);
    for piece in request.tensors {
        pieces.push(piece, frame_len).map_err(|error| ServeError::Invalid(error.to_string()))?;
    }
    Ok(overhead)
}

fn segments(body: Body) -> Vec<Bytes> {
    match body {
        Body::Message(bytes) => vec![bytes],
        Body::Tensors(body) => gather_response(&body.tensors),
    }
}

/// One frame per piece of a tensor, ended by the end of the stream.
fn stream_frames(body: Body) -> Result<Vec<Bytes>, FrameError> {
    let mut frames = Vec::new();
    match body {
        Body::Message(bytes) => frames.extend(stream::encode_message(vec![bytes])?),
        Body::Tensors(body) => {
            for piece in body.tensors.into_iter().flat_map(split_for_streaming) {
                frames.extend(stream::encode_message(gather_response(&[piece]))?);
            }
        }
    }
    Ok(frames)
}

fn too_large(method: Method, error: FrameError) -> ServeError {
    let hint = method.stream_name().map(|name| format!("; call {name} instead")).unwrap_or_default();
    ServeError::Invalid(format!("the answer is too large for a unary call: {error}{hint}"))
}
