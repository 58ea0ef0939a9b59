//! Headers and bodies to bytes, in turns.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};

use super::{AnswerHead, Header, MAX_CHUNK, MAX_HEADER, RequestHead, WINDOW};
use crate::frame::FrameError;

/// What one write carries, where there is as much.
const JOIN: usize = super::MAX_WRITE;
/// What a header has at the most besides its [`BodyHead`](super::BodyHead).
const FIXED_HEADER: usize = 128;

/// A body that is leaving, or waits to.
struct Outgoing<G> {
    id: u64,
    /// Its first header, until that has left.
    head: Option<Header>,
    segments: VecDeque<Bytes>,
    left: usize,
    guard: G,
}

/// Bytes in the order of the wire. Behind the last ones of a body stands its guard.
struct Segment<G> {
    bytes: Bytes,
    guard: Option<G>,
}

/// Writes one stream. Take [`next_bytes`](Writer::next_bytes), tell how many were written by [`wrote`](Writer::wrote).
///
/// Frames without a body pass before bodies; bodies take turns, a frame each. Small frames are joined up to
/// [`MAX_WRITE`](super::MAX_WRITE) bytes, a header with the beginning of its body; larger pieces are given from where they
/// lie. A body's guard `G` is dropped when its last byte was written, or when it is cancelled.
pub struct Writer<G> {
    controls: VecDeque<Bytes>,
    bodies: VecDeque<Outgoing<G>>,
    ordered: VecDeque<Segment<G>>,
    ordered_bytes: usize,
    joined: Vec<u8>,
    joined_start: usize,
    /// Guards of the bodies that end in `joined`.
    joined_guards: Vec<G>,
    credit: usize,
}

impl<G> Default for Writer<G> {
    fn default() -> Self {
        Self {
            controls: VecDeque::new(),
            bodies: VecDeque::new(),
            ordered: VecDeque::new(),
            ordered_bytes: 0,
            joined: Vec::new(),
            joined_start: 0,
            joined_guards: Vec::new(),
            credit: WINDOW,
        }
    }
}

impl<G> Writer<G> {
    /// A writer at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues a frame without a body. Fails when its header is too large.
    pub fn control(&mut self, header: &Header) -> Result<(), FrameError> {
        self.controls.push_back(header.encode()?);
        Ok(())
    }

    /// Queues a call or an answer, `head`, with its body. How much of it travels in the first frame is decided when its
    /// turn comes. Fails when the header is too large; nothing is queued then.
    pub fn body(&mut self, id: u64, head: Header, segments: Vec<Bytes>, guard: G) -> Result<(), FrameError> {
        if let Header::Request(RequestHead { body, .. }) | Header::Answer(AnswerHead { body, .. }) = &head
            && body.encoded_bound() > MAX_HEADER - FIXED_HEADER
        {
            return Err(FrameError::TooLarge { size: body.encoded_bound() as u64, limit: MAX_HEADER });
        }
        let left = segments.iter().map(Bytes::len).sum();
        self.bodies.push_back(Outgoing { id, head: Some(head), segments: segments.into(), left, guard });
        Ok(())
    }

    /// Forgets what has not left of a body. Whether nothing of it has.
    pub fn cancel(&mut self, id: u64) -> bool {
        let Some(at) = self.bodies.iter().position(|body| body.id == id) else { return false };
        self.bodies.remove(at).is_some_and(|body| body.head.is_some())
    }

    /// The other side allows more bytes. What a lying peer allows beyond its window's size only costs itself.
    pub fn allow(&mut self, bytes: usize) {
        self.credit = self.credit.saturating_add(bytes);
    }

    /// Frames without a body that wait.
    pub fn controls(&self) -> usize {
        self.controls.len()
    }

    /// Frames and bodies that have not left wholly.
    pub fn waiting(&self) -> usize {
        self.controls.len()
            + self.bodies.len()
            + self.ordered.len()
            + usize::from(self.joined_start < self.joined.len())
    }

    /// Whether everything was written.
    pub fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    /// What to write next; empty when there is nothing, or nothing that the other side allows.
    pub fn next_bytes(&mut self) -> &[u8] {
        if self.joined_start == self.joined.len() {
            self.joined.clear();
            self.joined_start = 0;
            while self.ordered_bytes < JOIN && self.order_frame() {}
            match self.ordered.front() {
                Some(front) if front.bytes.len() >= JOIN => return &self.ordered[0].bytes,
                _ => self.join(),
            }
        }
        &self.joined[self.joined_start..]
    }

    /// The first `n` of [`next_bytes`](Writer::next_bytes) were written.
    pub fn wrote(&mut self, n: usize) {
        if self.joined.is_empty() {
            let front = self.ordered.front_mut().expect("bytes were given from it");
            front.bytes.advance(n);
            self.ordered_bytes -= n;
            if front.bytes.is_empty() {
                self.ordered.pop_front();
            }
            return;
        }
        self.joined_start += n;
        if self.joined_start == self.joined.len() {
            self.joined_guards.clear();
        }
    }

    fn join(&mut self) {
        while self.joined.len() < JOIN
            && let Some(front) = self.ordered.front_mut()
        {
            let n = front.bytes.len().min(JOIN - self.joined.len());
            self.joined.extend_from_slice(&front.bytes[..n]);
            front.bytes.advance(n);
            self.ordered_bytes -= n;
            if front.bytes.is_empty() {
                let segment = self.ordered.pop_front().expect("it is the front");
                self.joined_guards.extend(segment.guard);
            }
        }
    }

    /// Puts the next frame in order. `false` when there is none that may go.
    fn order_frame(&mut self) -> bool {
        if let Some(bytes) = self.controls.pop_front() {
            self.put(bytes, None);
            return true;
        }
        // Whose body may not go waits, and all behind it: they began later.
        if self.bodies.front().is_none_or(|body| body.left > 0 && self.credit == 0) {
            return false;
        }
        let mut body = self.bodies.pop_front().expect("there is a front");
        let piece = body.left.min(MAX_CHUNK).min(self.credit);
        let header = match body.head.take() {
            Some(head) => with_first_piece(head, piece),
            None => Header::Chunk { id: body.id, bytes: count(piece) },
        };
        self.put(header.encode().expect("its size was checked"), None);
        self.credit -= piece;
        body.left -= piece;
        let mut missing = piece;
        while missing > 0 {
            let front = body.segments.front_mut().expect("segments hold as much as is left");
            let n = missing.min(front.len());
            missing -= n;
            let bytes = front.split_to(n);
            if front.is_empty() {
                body.segments.pop_front();
            }
            self.put(bytes, None);
        }
        match body.left {
            0 => self.ordered.back_mut().expect("its header at least").guard = Some(body.guard),
            _ => self.bodies.push_back(body),
        }
        true
    }

    fn put(&mut self, bytes: Bytes, guard: Option<G>) {
        if !bytes.is_empty() {
            self.ordered_bytes += bytes.len();
            self.ordered.push_back(Segment { bytes, guard });
        }
    }
}

fn count(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a piece of a body is at most 1 MiB")
}

fn with_first_piece(mut head: Header, piece: usize) -> Header {
    match &mut head {
        Header::Request(RequestHead { bytes, .. }) | Header::Answer(AnswerHead { bytes, .. }) => *bytes = count(piece),
        _ => {}
    }
    head
}
