//! Calls of ours: on the native wire to peers that offer it (docs/wire.md §11), else on hivemind's (docs/wire.md §2, §3).
//!
//! On hivemind's wire the write side stays open until the answer is there: a half-close cancels a call. Dropping a call's
//! future resets its stream, which the peer takes as "the caller left".

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use libp2p::PeerId;
use prost::Message as _;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{Answer, Body, Call, Inbound, RpcError, Service as _, Step, TensorBody};
use skep_wire::{
    DType, Framing, Method,
    chunk::{Assembler, split_for_streaming},
    frame::{
        FrameError,
        stream::{self, Frame},
        unary::{self, UnaryMessage},
    },
    limits::MAX_UNARY_PAYLOAD,
    proto::{
        gather_request,
        runtime::{ExpertResponse, Tensor},
    },
};

use crate::{
    io::{ReadError, read_body, read_stream_header, read_unary, write_segments},
    native_link::{Link, Native},
    net::Shared,
    status::Counters,
    streams::{OpenError, Opened},
};

/// How long a call waits for a fresh connection to tell whether the peer offers the native wire, and for the link's
/// streams. Peers of hivemind answer identify, too, so none waits that long unless something is wrong.
const NATIVE_PATIENCE: Duration = Duration::from_secs(2);

/// Makes one call; it ends by its deadline.
pub(crate) async fn call(shared: Arc<Shared>, call: Call) -> Result<Answer, RpcError> {
    Counters::add(&shared.counters.calls_out);
    let (peer, method, deadline) = (call.peer, call.method, call.meta.deadline);
    let started = shared.clock.now();
    let progress = Progress::default();
    let result = before(&*shared.clock, deadline, exchange(&shared, call, &progress)).await;
    let late = |_| RpcError::Deadline { peer, step: progress.step(), waited: deadline.moment().since(started) };
    let result = result.map_err(late).and_then(|result| result);
    note(&shared, peer, method, &result);
    result
}

/// How far a call has come, for the error if its deadline passes.
struct Progress(Mutex<Step>);

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(Step::OpenStream))
    }
}

impl Progress {
    fn at(&self, step: Step) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = step;
    }

    fn step(&self) -> Step {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a call on the link that the peer has with us; gives the call back if there is none, or it is none for a link.
/// The deadline is the link's to keep, so this may be polled anywhere.
pub(crate) async fn call_on_link(shared: &Shared, call: Call) -> Result<Result<Answer, RpcError>, Call> {
    let Some(link) = call.method.is_native().then(|| shared.connections.link(call.peer)).flatten() else {
        return Err(call);
    };
    Counters::add(&shared.counters.calls_out);
    let (peer, method) = (call.peer, call.method);
    let result = ask_link(shared, link, call).await;
    note(shared, peer, method, &result);
    Ok(result)
}

async fn ask_link(shared: &Shared, link: Arc<Link>, call: Call) -> Result<Answer, RpcError> {
    Counters::add(&shared.counters.calls_out_native);
    link.call(shared.clock.now(), call)?.await
}

/// What a call's end says of the peer. A slow expert does not make a dead peer, a slow DHT node does.
fn note(shared: &Shared, peer: PeerId, method: Method, result: &Result<Answer, RpcError>) {
    let is_dht = matches!(method, Method::Ping | Method::Store | Method::Find);
    match result {
        Ok(_) | Err(RpcError::Remote { .. }) => {
            shared.book.with(|book| book.vouch(peer));
            shared.bans.succeeded(&peer);
        }
        Err(RpcError::Unreachable { .. }) => shared.bans.failed(shared.clock.now(), peer),
        Err(RpcError::Deadline { .. }) if is_dht => shared.bans.failed(shared.clock.now(), peer),
        Err(_) => {}
    }
    if result.is_err() {
        Counters::add(&shared.counters.calls_out_failed);
    }
}

async fn exchange(shared: &Shared, call: Call, progress: &Progress) -> Result<Answer, RpcError> {
    if call.peer == shared.local_peer {
        progress.at(Step::Exchange);
        return serve_ourselves(shared, call).await;
    }
    let (peer, method) = (call.peer, call.method);
    if method.is_native()
        && shared.config.native
        && let Some(link) = link(shared, peer, progress).await?
    {
        progress.at(Step::Exchange);
        return ask_link(shared, link, call).await;
    }
    // Sizes are checked before anything is dialled: an oversize request would block the writer for ever.
    let request = Request::new(call)?;
    let Opened { stream, slot } = open(shared, peer, method, request.framing(), progress).await?;
    progress.at(Step::Exchange);
    let (reader, writer) = stream.split();
    let body = match request {
        Request::Unary { call_id, segments } => {
            converse(writer, &segments, read_unary_answer(reader, method, call_id)).await
        }
        Request::Stream { segments } => {
            let max_bytes = shared.config.limits.max_body_bytes;
            converse(writer, &segments, read_stream_answer(reader, max_bytes)).await
        }
    };
    drop(slot);
    body.map(|body| Answer { body, load: None }).map_err(|failure| failure.of(peer))
}

/// A call to our own peer id: libp2p cannot dial itself, and need not.
async fn serve_ourselves(shared: &Shared, call: Call) -> Result<Answer, RpcError> {
    let Call { peer, method, body, meta } = call;
    let inbound = Inbound { peer, method, body, meta, knows_overload: true };
    shared.router.serve(inbound).await.map_err(|error| error.into_rpc(peer))
}

/// The link to a peer, connecting first if need be. A fresh connection tells by identify whether the peer offers the
/// native wire; a call waits for that, since only that wire carries its request id. `None` if the peer does not offer it,
/// or does not say so in time.
async fn link(shared: &Shared, peer: PeerId, progress: &Progress) -> Result<Option<Arc<Link>>, RpcError> {
    let (mut native, since) = match shared.connections.native(peer) {
        Some(native) => native,
        None => {
            progress.at(Step::Dial);
            shared.reach(peer).await?;
            progress.at(Step::OpenStream);
            match shared.connections.native(peer) {
                Some(native) => native,
                None => return Ok(None),
            }
        }
    };
    // A connection that has been silent for so long has been waited for by others.
    let from = if matches!(*native.borrow(), Native::Unknown) { since } else { shared.clock.now() };
    let patience = Deadline::after(from, NATIVE_PATIENCE);
    let wait = async {
        // The connection's end is an answer, too.
        let known = native.wait_for(|native| matches!(native, Native::Ready(_) | Native::Absent)).await;
        match known.as_deref() {
            Ok(Native::Ready(link)) => Some(link.clone()),
            _ => None,
        }
    };
    Ok(before(&*shared.clock, patience, wait).await.ok().flatten())
}

/// Opens a stream, connecting first if need be. A connection that closes meanwhile is replaced once.
async fn open(
    shared: &Shared,
    peer: PeerId,
    method: Method,
    framing: Framing,
    progress: &Progress,
) -> Result<Opened, RpcError> {
    let unreachable = |step, reason: String| RpcError::Unreachable { peer, step, reason };
    let mut attempts_left = 2;
    loop {
        progress.at(Step::OpenStream);
        match shared.connections.open(peer, method, framing).await {
            Ok(opened) => return Ok(opened),
            Err(OpenError::NotConnected | OpenError::Closed) if attempts_left > 0 => {
                attempts_left -= 1;
                progress.at(Step::Dial);
                shared.reach(peer).await?;
            }
            Err(error @ OpenError::Unsupported(_)) => {
                return Err(RpcError::Refused { peer, reason: error.to_string() });
            }
            Err(error) => return Err(unreachable(Step::OpenStream, error.to_string())),
        }
    }
}

/// A request as bytes.
enum Request {
    Unary { call_id: unary::CallId, segments: Vec<Bytes> },
    Stream { segments: Vec<Bytes> },
}

impl Request {
    fn new(call: Call) -> Result<Self, RpcError> {
        let Call { peer, method, body, .. } = call;
        match body {
            Body::Message(bytes) => Self::unary(peer, method, vec![bytes]),
            Body::Tensors(body) if raw_bytes(&body.tensors) > MAX_UNARY_PAYLOAD && method.stream_name().is_some() => {
                Self::stream(body)
            }
            Body::Tensors(body) => Self::unary(peer, method, gather_request(&body.uid, &body.tensors)),
        }
        .map_err(|error| Failure::Frame(error).of(peer))
    }

    fn unary(peer: PeerId, method: Method, data: Vec<Bytes>) -> Result<Self, FrameError> {
        let call_id: unary::CallId = rand::random();
        let segments = unary::encode_request(&call_id, &peer.to_bytes(), method.unary_name(), data)?;
        Ok(Self::Unary { call_id, segments })
    }

    fn stream(body: TensorBody) -> Result<Self, FrameError> {
        let mut segments = Vec::new();
        for piece in body.tensors.into_iter().flat_map(split_for_streaming) {
            segments.extend(stream::encode_message(gather_request(&body.uid, &[piece]))?);
        }
        segments.push(Bytes::from_static(&stream::END));
        Ok(Self::Stream { segments })
    }

    fn framing(&self) -> Framing {
        match self {
            Request::Unary { .. } => Framing::Unary,
            Request::Stream { .. } => Framing::Stream,
        }
    }
}

/// Uncompressed bytes of what is sent: hivemind's measure for choosing the stream form (docs/wire.md §8.1).
fn raw_bytes(tensors: &[Tensor]) -> usize {
    let raw = |tensor: &Tensor| {
        let element = DType::from_name(&tensor.dtype).map(DType::size)?;
        tensor.size.iter().try_fold(element, |bytes, size| bytes.checked_mul(usize::try_from(*size).ok()?))
    };
    tensors.iter().fold(0, |sum: usize, tensor| sum.saturating_add(raw(tensor).unwrap_or(tensor.buffer.len())))
}

/// Why an exchange on an open stream brought no answer.
#[derive(Debug)]
enum Failure {
    Remote(String),
    Frame(FrameError),
    Malformed(String),
    Broken(String),
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Frame(error) => Failure::Frame(error),
            ReadError::Ended => Failure::Broken("the peer closed the stream without an answer".to_owned()),
            ReadError::Io(error) => Failure::Broken(error.to_string()),
        }
    }
}

impl Failure {
    fn of(self, peer: PeerId) -> RpcError {
        match self {
            Failure::Remote(text) => RpcError::Remote { text },
            Failure::Frame(FrameError::TooLarge { size, limit }) => {
                RpcError::TooLarge { size: usize::try_from(size).unwrap_or(usize::MAX), limit }
            }
            Failure::Frame(error @ FrameError::Truncated { .. }) => {
                RpcError::Unreachable { peer, step: Step::Exchange, reason: error.to_string() }
            }
            Failure::Frame(error) => RpcError::Malformed { peer, reason: error.to_string() },
            Failure::Malformed(reason) => RpcError::Malformed { peer, reason },
            Failure::Broken(reason) => RpcError::Unreachable { peer, step: Step::Exchange, reason },
        }
    }
}

/// Writes the request while it reads the answer, for a server may refuse before it has read everything.
async fn converse(
    mut writer: impl AsyncWrite + Unpin,
    segments: &[Bytes],
    answer: impl Future<Output = Result<Body, Failure>>,
) -> Result<Body, Failure> {
    let mut answer = pin!(answer);
    let written = {
        let mut write = pin!(write_segments(&mut writer, segments));
        tokio::select! {
            biased;
            early = &mut answer => return early,
            written = &mut write => written,
        }
    };
    let answer = answer.await;
    if let (Err(Failure::Broken(_)), Err(error)) = (&answer, written) {
        return Err(Failure::Broken(format!("writing the request: {error}")));
    }
    if let Err(error) = writer.close().await {
        // The answer is complete; how the stream ends no longer matters.
        tracing::trace!(%error, "closing a stream after its answer");
    }
    answer
}

async fn read_unary_answer(
    mut reader: impl AsyncRead + Unpin,
    method: Method,
    call_id: unary::CallId,
) -> Result<Body, Failure> {
    let frame = read_unary(&mut reader).await?;
    if frame.call_id != call_id {
        return Err(Failure::Malformed("the answer belongs to another call".to_owned()));
    }
    match frame.message {
        UnaryMessage::Response(data) if method.carries_tensors() => {
            let response = ExpertResponse::decode(data).map_err(|error| Failure::Malformed(error.to_string()))?;
            Ok(Body::Tensors(TensorBody { uid: String::new(), tensors: response.tensors }))
        }
        UnaryMessage::Response(data) => Ok(Body::Message(data)),
        UnaryMessage::Error(text) => Err(Failure::Remote(text)),
        UnaryMessage::Request { .. } => Err(Failure::Malformed("the answer is a request".to_owned())),
    }
}

/// Reads message frames until the peer closes the stream; the end of the stream ends the answer.
async fn read_stream_answer(mut reader: impl AsyncRead + Unpin, max_bytes: usize) -> Result<Body, Failure> {
    let mut pieces = Assembler::new(max_bytes);
    let mut any = false;
    loop {
        let header = match read_stream_header(&mut reader).await {
            Err(ReadError::Ended) if any => break,
            header => header?,
        };
        match Frame::decode(header.kind, read_body(&mut reader, header.len).await?).map_err(Failure::Frame)? {
            Frame::Message(message) => {
                any = true;
                let response =
                    ExpertResponse::decode(message).map_err(|error| Failure::Malformed(error.to_string()))?;
                for piece in response.tensors {
                    pieces.push(piece, header.len).map_err(|error| Failure::Malformed(error.to_string()))?;
                }
            }
            Frame::Error(text) => return Err(Failure::Remote(text)),
            Frame::End => return Err(Failure::Remote(String::new())),
        }
    }
    Ok(Body::Tensors(TensorBody { uid: String::new(), tensors: pieces.finish() }))
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    const ID: unary::CallId = [5; 16];

    fn unary_answer(method: Method, frame: &[Bytes]) -> Result<Body, Failure> {
        let bytes = frame.concat();
        block_on(read_unary_answer(&bytes[..], method, ID))
    }

    fn stream_answer(frames: &[Vec<Bytes>]) -> Result<Body, Failure> {
        let bytes: Vec<u8> = frames.iter().flatten().flat_map(|segment| segment.to_vec()).collect();
        block_on(read_stream_answer(&bytes[..], 1000))
    }

    fn piece(dtype: &str, bytes: usize) -> Vec<Bytes> {
        let tensor = Tensor { buffer: vec![1; bytes].into(), dtype: dtype.to_owned(), ..Tensor::default() };
        stream::encode_message(skep_wire::proto::gather_response(&[tensor])).unwrap()
    }

    #[test]
    fn an_answer_to_another_call_is_malformed() {
        let frame = unary::encode_response(&[6; 16], vec![]).unwrap();
        assert!(matches!(unary_answer(Method::Ping, &frame), Err(Failure::Malformed(_))));
    }

    #[test]
    fn a_request_or_nothing_instead_of_an_answer_is_malformed() {
        let request = unary::encode_request(&ID, b"p", "DHTProtocol.rpc_ping", vec![]).unwrap();
        assert!(matches!(unary_answer(Method::Ping, &request), Err(Failure::Malformed(_))));
        // `unaryResponse` with neither response nor error.
        let empty = [&[20, 0x0a, 16][..], &ID, &[0x22, 0]].concat();
        assert!(matches!(unary_answer(Method::Ping, &[empty.into()]), Err(Failure::Frame(FrameError::NoOutcome))));
    }

    #[test]
    fn tensors_that_are_no_protobuf_are_malformed() {
        let frame = unary::encode_response(&ID, vec![Bytes::from_static(&[0xff; 9])]).unwrap();
        assert!(matches!(unary_answer(Method::Forward, &frame), Err(Failure::Malformed(_))));
        assert_eq!(unary_answer(Method::Ping, &frame).unwrap(), Body::Message(Bytes::from_static(&[0xff; 9])));
    }

    #[test]
    fn an_end_without_an_answer_is_a_broken_exchange() {
        assert!(matches!(unary_answer(Method::Ping, &[]), Err(Failure::Broken(_))));
        assert!(matches!(stream_answer(&[]), Err(Failure::Broken(_))));
        let cut = stream_answer(&[vec![Bytes::from_static(&[0; 5])]]).map_err(|failure| failure.of(PeerId::random()));
        assert!(matches!(cut, Err(RpcError::Unreachable { step: Step::Exchange, .. })));
    }

    #[test]
    fn any_error_frame_of_a_stream_is_an_error_even_an_empty_one() {
        let after_data = stream_answer(&[piece("float32", 4), vec![stream::encode_error("'nope.1'")]]);
        assert!(matches!(after_data, Err(Failure::Remote(text)) if text == "'nope.1'"));
        let empty = stream_answer(&[piece("float32", 4), vec![Bytes::from_static(&stream::END)]]);
        assert!(matches!(empty, Err(Failure::Remote(_))));
    }

    #[test]
    fn pieces_of_a_streamed_answer_are_joined_within_the_limit() {
        let Ok(Body::Tensors(body)) = stream_answer(&[piece("float32", 40), piece("", 40), piece("int64", 8)]) else {
            panic!("expected tensors")
        };
        assert_eq!(body.tensors.iter().map(|tensor| tensor.buffer.len()).collect::<Vec<_>>(), [80, 8]);
        assert!(matches!(stream_answer(&[piece("float32", 1001)]), Err(Failure::Malformed(_))));
        assert!(matches!(stream_answer(&[piece("", 4)]), Err(Failure::Malformed(_))));
    }

    #[test]
    fn the_measure_for_streaming_is_the_uncompressed_size() {
        let half = Tensor { buffer: vec![0; 8].into(), size: vec![2, 2], dtype: "float32".into(), ..Tensor::default() };
        assert_eq!(raw_bytes(&[half.clone(), half]), 32);
        let foreign = Tensor { buffer: vec![0; 8].into(), size: vec![9], dtype: "qint4".into(), ..Tensor::default() };
        assert_eq!(raw_bytes(&[foreign]), 8);
        let huge = Tensor { size: vec![u32::MAX; 4], dtype: "float32".into(), ..Tensor::default() };
        assert_eq!(raw_bytes(&[huge]), 0);
    }
}
