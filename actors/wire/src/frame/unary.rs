//! Unary calls: `varint length | PersistentConnectionRequest`, one frame each way (docs/wire.md §2.2).
//!
//! The caller keeps its write side open until the answer has arrived; bytes after the request mean that it gave up.

use bytes::{Buf, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use super::FrameError;
use crate::{
    limits::MAX_UNARY_FRAME,
    proto::{
        self,
        p2pd::{CallUnaryRequest, CallUnaryResponse, Message, Outcome, PersistentConnectionRequest},
    },
};

/// The 16 bytes that tie an answer to its request.
pub type CallId = [u8; 16];

/// Longest length prefix, in bytes: a 64-bit varint.
pub const MAX_LENGTH_BYTES: usize = 10;

/// A frame as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// The caller's id of the call.
    pub call_id: CallId,
    /// Request or answer.
    pub message: UnaryMessage,
}

/// Content of a unary frame.
#[derive(Clone, Debug, PartialEq)]
pub enum UnaryMessage {
    /// A request.
    Request {
        /// A peer id that says nothing; the connection's authenticated one counts.
        peer: Bytes,
        /// The handler's name.
        proto: String,
        /// The serialized request.
        data: Bytes,
    },
    /// The serialized response; may be empty.
    Response(Bytes),
    /// `repr` of a Python exception; what is not UTF-8 was replaced.
    Error(String),
}

/// A length prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Bytes of the prefix itself.
    pub header: usize,
    /// Bytes of the body after it.
    pub body: usize,
}

impl Length {
    /// Reads the length at the beginning of a frame; `None` until all of it is there. Bodies over
    /// [`MAX_UNARY_FRAME`] are refused.
    pub fn parse(bytes: &[u8]) -> Result<Option<Length>, FrameError> {
        match unsigned_varint::decode::u64(bytes) {
            Ok((size, rest)) => match usize::try_from(size) {
                Ok(body) if body <= MAX_UNARY_FRAME => Ok(Some(Length { header: bytes.len() - rest.len(), body })),
                _ => Err(FrameError::TooLarge { size, limit: MAX_UNARY_FRAME }),
            },
            Err(unsigned_varint::decode::Error::Insufficient) => Ok(None),
            Err(_) => Err(FrameError::Length),
        }
    }
}

impl Frame {
    /// Reads a body, that is a frame without its length. Data are slices of `body`.
    pub fn decode(body: Bytes) -> Result<Frame, FrameError> {
        let PersistentConnectionRequest { call_id, message } = proto::decode(body)?;
        let call_id = CallId::try_from(call_id.as_ref()).map_err(|_| FrameError::CallId(call_id.len()))?;
        let message = match message.ok_or(FrameError::NoMessage)? {
            Message::CallUnary(CallUnaryRequest { peer, proto, data }) => UnaryMessage::Request { peer, proto, data },
            Message::UnaryResponse(CallUnaryResponse { outcome }) => match outcome.ok_or(FrameError::NoOutcome)? {
                Outcome::Response(data) => UnaryMessage::Response(data),
                Outcome::Error(text) => UnaryMessage::Error(String::from_utf8_lossy(&text).into_owned()),
            },
        };
        Ok(Frame { call_id, message })
    }
}

/// A request frame as segments to be written in order; `data` is shared, not copied. `proto` is the handler's name
/// and `peer` the callee's id. Fails when the body would exceed [`MAX_UNARY_FRAME`]: the receiver would never answer.
pub fn encode_request(call_id: &CallId, peer: &[u8], proto: &str, data: Vec<Bytes>) -> Result<Vec<Bytes>, FrameError> {
    let mut before = BytesMut::with_capacity(peer.len() + proto.len() + 16);
    put_bytes(&mut before, 1, peer);
    put_bytes(&mut before, 2, proto.as_bytes());
    encode(call_id, 3, &before, 3, data)
}

/// An answer frame as segments to be written in order; `data` is shared, not copied. Fails when the body would exceed
/// [`MAX_UNARY_FRAME`]: answer with an error instead.
pub fn encode_response(call_id: &CallId, data: Vec<Bytes>) -> Result<Vec<Bytes>, FrameError> {
    encode(call_id, 4, &[], 1, data)
}

/// An error frame. The text is `repr` of a Python exception ([`crate::error_text::repr`]); it is cut to 64 KiB.
pub fn encode_error(call_id: &CallId, text: &str) -> Vec<Bytes> {
    let text = &text[..text.floor_char_boundary(64 << 10)];
    encode(call_id, 4, &[], 2, vec![Bytes::copy_from_slice(text.as_bytes())]).expect("64 KiB fit a frame")
}

/// `callId`, then field `outer` = { `before`, field `inner` = data }, all with the length in front.
fn encode(call_id: &CallId, outer: u32, before: &[u8], inner: u32, data: Vec<Bytes>) -> Result<Vec<Bytes>, FrameError> {
    let data_len: usize = data.iter().map(Bytes::len).sum();
    let inner_len = before.len() + field_len(inner, data_len);
    let body_len = field_len(1, call_id.len()) + field_len(outer, inner_len);
    if body_len > MAX_UNARY_FRAME {
        return Err(FrameError::TooLarge { size: body_len as u64, limit: MAX_UNARY_FRAME });
    }
    let mut head = BytesMut::with_capacity(before.len() + 64);
    encode_varint(body_len as u64, &mut head);
    put_bytes(&mut head, 1, call_id);
    put_header(&mut head, outer, inner_len);
    head.extend_from_slice(before);
    put_header(&mut head, inner, data_len);
    let mut segments = vec![head.freeze()];
    segments.extend(data.into_iter().filter(|segment| !segment.is_empty()));
    Ok(segments)
}

fn field_len(tag: u32, len: usize) -> usize {
    key_len(tag) + encoded_len_varint(len as u64) + len
}

fn put_header(out: &mut BytesMut, tag: u32, len: usize) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
}

fn put_bytes(out: &mut BytesMut, tag: u32, bytes: &[u8]) {
    put_header(out, tag, bytes.len());
    out.extend_from_slice(bytes);
}

/// Takes bytes in any pieces and gives frames. After an error the stream cannot be continued.
///
/// It holds what was pushed and not yet taken: push no more than one read between calls of [`Decoder::next_frame`].
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, or `None` until more bytes arrive.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(length) = Length::parse(&self.buffer)? else { return Ok(None) };
        if self.buffer.len() < length.header + length.body {
            self.buffer.reserve(length.header + length.body - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(length.header);
        Frame::decode(self.buffer.split_to(length.body).freeze()).map(Some)
    }

    /// How many bytes are missing at least before [`Decoder::next_frame`] can give a frame or an error; reading exactly
    /// as many never reads past the frame.
    pub fn expected(&self) -> usize {
        match Length::parse(&self.buffer) {
            Ok(Some(length)) => (length.header + length.body).saturating_sub(self.buffer.len()),
            Ok(None) => 1,
            Err(_) => 0,
        }
    }

    /// Whether bytes wait that no frame has taken: after a request they mean that the caller gave up.
    pub fn has_rest(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Tells that the stream ended; an error inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.buffer.len() {
            0 => Ok(()),
            got => Err(FrameError::Truncated { got }),
        }
    }
}
