//! Requests and answers on hivemind's wire (docs/wire.md §2, §3).
//!
//! The write side stays open until the answer is there: a half-close cancels a call. Dropping a call's future resets its
//! stream, which the peer takes as "the caller left".

use std::pin::pin;

use bytes::Bytes;
use futures::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use libp2p::PeerId;
use skep_rpc::{Body, Call, RpcError, Step, TensorBody};
use skep_wire::{
    DType, Framing, Method,
    chunk::{self, Assembler, split_for_streaming},
    frame::{
        FrameError,
        stream::{self, Frame},
        unary::{self, UnaryMessage},
    },
    limits::MAX_UNARY_PAYLOAD,
    proto::{
        self, gather_request,
        runtime::{ExpertResponse, Tensor},
    },
};

use crate::{
    budget::{Budget, Held, NoRoom},
    io::{ReadError, read_body, read_stream_header, read_unary_length, write_segments},
};

/// A request as bytes.
pub(super) enum Request {
    Unary { call_id: unary::CallId, segments: Vec<Bytes> },
    Stream { segments: Vec<Bytes> },
}

impl Request {
    pub(super) fn new(call: Call) -> Result<Self, RpcError> {
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

    pub(super) fn framing(&self) -> Framing {
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
pub(super) enum Failure {
    Remote(String),
    Frame(FrameError),
    Malformed(String),
    Broken(String),
    NoRoom { size: usize, why: NoRoom },
}

/// Bytes of an answer under way, counted in the budget of all.
struct Holding<'a> {
    budget: &'a Budget,
    held: Held,
}

impl<'a> Holding<'a> {
    fn begin(budget: &'a Budget) -> Result<Self, Failure> {
        Ok(Self { budget, held: hold(budget, 0)? })
    }

    fn add(&mut self, bytes: usize) -> Result<(), Failure> {
        self.held.merge(hold(self.budget, bytes)?);
        Ok(())
    }
}

fn hold(budget: &Budget, bytes: usize) -> Result<Held, Failure> {
    budget.hold(bytes).map_err(|why| Failure::NoRoom { size: bytes, why })
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        Failure::Frame(error)
    }
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
    pub(super) fn of(self, peer: PeerId) -> RpcError {
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
            Failure::NoRoom { size, why } => why.for_answer(size),
        }
    }
}

/// Writes the request while it reads the answer, for a server may refuse before it has read everything.
pub(super) async fn converse<T>(
    mut writer: impl AsyncWrite + Unpin,
    segments: &[Bytes],
    answer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
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

pub(super) async fn read_unary_answer(
    mut reader: impl AsyncRead + Unpin,
    method: Method,
    call_id: unary::CallId,
    budget: &Budget,
) -> Result<(Body, Held), Failure> {
    let length = read_unary_length(&mut reader).await?;
    let mut holding = Holding::begin(budget)?;
    holding.add(length)?;
    let frame = unary::Frame::decode(read_body(&mut reader, length).await?)?;
    if frame.call_id != call_id {
        return Err(Failure::Malformed("the answer belongs to another call".to_owned()));
    }
    let body = match frame.message {
        UnaryMessage::Response(data) if method.carries_tensors() => {
            let response =
                proto::decode::<ExpertResponse>(data).map_err(|error| Failure::Malformed(error.to_string()))?;
            holding.add(chunk::overhead(&response.tensors))?;
            Body::Tensors(TensorBody { uid: String::new(), tensors: response.tensors })
        }
        UnaryMessage::Response(data) => Body::Message(data),
        UnaryMessage::Error(text) => return Err(Failure::Remote(text)),
        UnaryMessage::Request { .. } => return Err(Failure::Malformed("the answer is a request".to_owned())),
    };
    Ok((body, holding.held))
}

/// Reads message frames until the peer closes the stream; the end of the stream ends the answer.
pub(super) async fn read_stream_answer(
    mut reader: impl AsyncRead + Unpin,
    max_bytes: usize,
    budget: &Budget,
) -> Result<(Body, Held), Failure> {
    let mut pieces = Assembler::new(max_bytes);
    let mut holding = Holding::begin(budget)?;
    let mut any = false;
    loop {
        let header = match read_stream_header(&mut reader).await {
            Err(ReadError::Ended) if any => break,
            header => header?,
        };
        holding.add(header.len)?;
        match Frame::decode(header.kind, read_body(&mut reader, header.len).await?)? {
            Frame::Message(message) => {
                any = true;
                let response =
                    proto::decode::<ExpertResponse>(message).map_err(|error| Failure::Malformed(error.to_string()))?;
                holding.add(chunk::overhead(&response.tensors))?;
                for piece in response.tensors {
                    pieces.push(piece, header.len).map_err(|error| Failure::Malformed(error.to_string()))?;
                }
            }
            Frame::Error(text) => return Err(Failure::Remote(text)),
            Frame::End => return Err(Failure::Remote(String::new())),
        }
    }
    let body = Body::Tensors(TensorBody { uid: String::new(), tensors: pieces.finish() });
    Ok((body, holding.held))
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    const ID: unary::CallId = [5; 16];

    fn unary_answer(method: Method, frame: &[Bytes]) -> Result<Body, Failure> {
        let bytes = frame.concat();
        let answer = block_on(read_unary_answer(&bytes[..], method, ID, &Budget::new(1 << 20)));
        answer.map(|(body, _held)| body)
    }

    fn stream_answer(frames: &[Vec<Bytes>]) -> Result<Body, Failure> {
        let bytes: Vec<u8> = frames.iter().flatten().flat_map(|segment| segment.to_vec()).collect();
        block_on(read_stream_answer(&bytes[..], 1000, &Budget::new(1 << 20))).map(|(body, _held)| body)
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
    fn an_answer_that_finds_no_memory_is_not_read() {
        let frame = unary::encode_response(&ID, vec![Bytes::from(vec![7; 900])]).unwrap().concat();
        let budget = Budget::new(1000);
        let read = |budget: &Budget| block_on(read_unary_answer(&frame[..], Method::Ping, ID, budget)).map(drop);
        let others = budget.hold(500).unwrap();
        let refused = read(&budget).map_err(|failure| failure.of(PeerId::random()));
        assert!(matches!(refused, Err(RpcError::NoRoom { limit: 1000, .. })), "{refused:?}");
        drop(others);
        assert!(read(&budget).is_ok());
        let refused = read(&Budget::new(800)).map_err(|failure| failure.of(PeerId::random()));
        assert!(matches!(refused, Err(RpcError::TooLarge { limit: 800, .. })), "{refused:?}");

        let pieces = [piece("float32", 400), piece("", 400)].concat().concat();
        let read = |budget: &Budget| block_on(read_stream_answer(&pieces[..], 10_000, budget)).map(drop);
        let enough = Budget::new(2000);
        assert!(read(&enough).is_ok());
        let others = enough.hold(1000).unwrap();
        assert!(matches!(read(&enough), Err(Failure::NoRoom { why: NoRoom::Now { limit: 2000 }, .. })));
        drop(others);
        assert_eq!(enough.free(), 2000);
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
