//! Streaming calls: `marker | u64 big-endian length | payload` (docs/wire.md §3).
//!
//! A caller sends messages, then [`END`], and keeps its write side open. A callee sends messages and closes; there is no
//! end frame in that direction, and any error frame, even an empty one, is an error.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message as _;

use super::FrameError;
use crate::{
    limits::MAX_STREAM_FRAME,
    proto::{self, p2pd::RpcError},
};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 9;
/// The frame that ends a caller's messages: an error without text.
pub const END: [u8; HEADER_LEN] = [MARKER_ERROR, 0, 0, 0, 0, 0, 0, 0, 0];

const MARKER_MESSAGE: u8 = 0;
const MARKER_ERROR: u8 = 1;

/// A frame as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A serialized request or response message.
    Message(Bytes),
    /// An error frame without text: from a caller the end of its messages, from a callee an error.
    End,
    /// `str` of a Python exception.
    Error(String),
}

/// What kind of payload follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A message.
    Message,
    /// An `RPCError`.
    Error,
}

/// The beginning of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Bytes of the payload.
    pub len: usize,
}

impl Header {
    /// Reads a header; payloads over [`MAX_STREAM_FRAME`] are refused.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let [marker, length @ ..] = *bytes;
        let kind = match marker {
            MARKER_MESSAGE => Kind::Message,
            MARKER_ERROR => Kind::Error,
            other => return Err(FrameError::Marker(other)),
        };
        let size = u64::from_be_bytes(length);
        match usize::try_from(size) {
            Ok(len) if len <= MAX_STREAM_FRAME => Ok(Header { kind, len }),
            _ => Err(FrameError::TooLarge { size, limit: MAX_STREAM_FRAME }),
        }
    }

    fn write(marker: u8, len: usize) -> BytesMut {
        let mut out = BytesMut::with_capacity(HEADER_LEN);
        out.extend_from_slice(&[marker]);
        out.extend_from_slice(&(len as u64).to_be_bytes());
        out
    }
}

impl Frame {
    /// Reads the payload that a header announced. A message is `payload` itself, not a copy.
    pub fn decode(kind: Kind, payload: Bytes) -> Result<Frame, FrameError> {
        match kind {
            Kind::Message => Ok(Frame::Message(payload)),
            Kind::Error if payload.is_empty() => Ok(Frame::End),
            Kind::Error => Ok(Frame::Error(proto::decode::<RpcError>(payload)?.message.unwrap_or_default())),
        }
    }
}

/// A message frame as segments to be written in order; `payload` is shared, not copied. Fails when it exceeds
/// [`MAX_STREAM_FRAME`].
pub fn encode_message(payload: Vec<Bytes>) -> Result<Vec<Bytes>, FrameError> {
    let len = payload.iter().map(Bytes::len).sum();
    if len > MAX_STREAM_FRAME {
        return Err(FrameError::TooLarge { size: len as u64, limit: MAX_STREAM_FRAME });
    }
    let mut segments = vec![Header::write(MARKER_MESSAGE, len).freeze()];
    segments.extend(payload.into_iter().filter(|segment| !segment.is_empty()));
    Ok(segments)
}

/// An error frame. The text is `str` of a Python exception ([`crate::error_text::bare`]); it is cut to 64 KiB.
pub fn encode_error(text: &str) -> Bytes {
    let text = &text[..text.floor_char_boundary(64 << 10)];
    let error = RpcError { message: Some(text.to_owned()) };
    let mut out = Header::write(MARKER_ERROR, error.encoded_len());
    out.extend_from_slice(&error.encode_to_vec());
    out.freeze()
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

    fn header(&self) -> Result<Option<Header>, FrameError> {
        self.buffer.first_chunk().map(Header::parse).transpose()
    }

    /// The next frame, or `None` until more bytes arrive.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.header()? else { return Ok(None) };
        if self.buffer.len() < HEADER_LEN + header.len {
            self.buffer.reserve(HEADER_LEN + header.len - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER_LEN);
        Frame::decode(header.kind, self.buffer.split_to(header.len).freeze()).map(Some)
    }

    /// How many bytes are missing at least before [`Decoder::next_frame`] can give a frame or an error; reading exactly
    /// as many never reads past the frame.
    pub fn expected(&self) -> usize {
        match self.header() {
            Ok(Some(header)) => (HEADER_LEN + header.len).saturating_sub(self.buffer.len()),
            Ok(None) => HEADER_LEN - self.buffer.len(),
            Err(_) => 0,
        }
    }

    /// Tells that the stream ended; an error inside a frame. Between frames it is how a callee ends.
    pub fn finish(&self) -> Result<(), FrameError> {
        match self.buffer.len() {
            0 => Ok(()),
            got => Err(FrameError::Truncated { got }),
        }
    }
}
