//! Bytes to events, and bodies put together.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use super::{AnswerHead, Failure, Header, Lane, MAX_CHUNK, MAX_HEADER, Pool, RequestHead, WINDOW, pool::Buffer};
use crate::frame::FrameError;

/// Where headers and short bodies arrive: what the muxer delivers at once.
const SCRATCH: usize = 16 << 10;
/// What is made for a body before that much of it has arrived: an announced length alone costs no more. Memory that is
/// kept from an earlier body is taken whole.
const FIRST_BUFFER: usize = 4 << 20;
/// Bytes taken after which the other side is allowed as many more.
const CREDIT_STEP: usize = WINDOW / 4;

/// What arrived.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The stream's opener says which of its streams this is.
    Hello(Lane),
    /// A call begins. [`Reader::refuse`] it before the next event, or its body will follow.
    Request(RequestHead),
    /// An answer begins. [`Reader::refuse`] it before the next event, or its body will follow.
    Answer(AnswerHead),
    /// A body is complete; one contiguous buffer.
    Body {
        /// The call.
        id: u64,
        /// All of it.
        bytes: Bytes,
    },
    /// A call ended without an answer; what had arrived of one is dropped.
    Error {
        /// The call.
        id: u64,
        /// Why.
        failure: Failure,
    },
    /// The other side allows so many more bytes on this stream.
    Credit(usize),
    /// The caller gave up; what had arrived of its body is dropped.
    Cancel(u64),
}

/// A body that is arriving.
struct Partial {
    total: usize,
    filled: usize,
    /// Empty until the first byte comes.
    buffer: Buffer,
}

/// The bytes of a body that the frame at hand still has.
struct Piece {
    id: u64,
    left: usize,
}

/// Reads one stream. Put bytes where [`space`](Reader::space) says, tell how many by [`filled`](Reader::filled), then
/// take events until there are none. Bodies of which more than the header's buffer holds are read where they stay.
///
/// After an error the stream cannot be continued.
pub struct Reader {
    pool: Arc<Pool>,
    scratch: Vec<u8>,
    start: usize,
    end: usize,
    piece: Option<Piece>,
    bodies: BTreeMap<u64, Partial>,
    /// Bytes that the other side may still send.
    credit: usize,
    /// Bytes taken for which the other side has not been allowed others.
    taken: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self::with_pool(Pool::new(0))
    }
}

impl Reader {
    /// A reader at the beginning of a stream; no memory is kept.
    pub fn new() -> Self {
        Self::default()
    }

    /// A reader at the beginning of a stream. Memory of large bodies comes from `pool`, if it has some that suits, and goes
    /// back there when the last view of a body is dropped.
    pub fn with_pool(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            scratch: vec![0; SCRATCH],
            start: 0,
            end: 0,
            piece: None,
            bodies: BTreeMap::new(),
            credit: WINDOW,
            taken: 0,
        }
    }

    /// Where the next bytes go; never empty.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Some(Piece { id, left }) = &self.piece
                && let Some(body) = self.bodies.get_mut(id)
            {
                return body.space(*left, &self.pool);
            }
        }
        if self.end == self.scratch.len() {
            self.scratch.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.scratch.len() {
            // Only a header longer than the buffer fills it: `next_event` takes everything else out.
            self.scratch.resize((2 * self.scratch.len()).min(MAX_HEADER + 4), 0);
        }
        &mut self.scratch[self.end..]
    }

    /// `n` bytes were put at the beginning of [`space`](Reader::space).
    pub fn filled(&mut self, n: usize) {
        if self.start == self.end
            && let Some(piece) = &mut self.piece
            && let Some(body) = self.bodies.get_mut(&piece.id)
        {
            body.filled += n;
            piece.left -= n;
            self.taken += n;
        } else {
            self.end += n;
        }
    }

    /// The next event, or `None` until more bytes arrive.
    pub fn next_event(&mut self) -> Result<Option<Event>, FrameError> {
        loop {
            if let Some(piece) = self.piece.take() {
                match self.take_piece(piece) {
                    (None, None) => {}
                    (None, event) => return Ok(event),
                    (unfinished, _) => {
                        self.piece = unfinished;
                        return Ok(None);
                    }
                }
            }
            let Some(header) = self.take_header()? else { return Ok(None) };
            match header {
                Header::Hello { lane } => return Ok(Some(Event::Hello(lane))),
                Header::Request(head) => {
                    self.begin(head.id, head.body.len(), head.bytes)?;
                    return Ok(Some(Event::Request(head)));
                }
                Header::Answer(head) => {
                    self.begin(head.id, head.body.len(), head.bytes)?;
                    return Ok(Some(Event::Answer(head)));
                }
                Header::Chunk { id, bytes } => self.go_on(id, bytes)?,
                Header::Credit { bytes } => return Ok(Some(Event::Credit(bytes as usize))),
                Header::Error { id, failure } => {
                    self.bodies.remove(&id);
                    return Ok(Some(Event::Error { id, failure }));
                }
                Header::Cancel { id } => {
                    self.bodies.remove(&id);
                    return Ok(Some(Event::Cancel(id)));
                }
            }
        }
    }

    /// Drops a body that has begun; the rest of it is read and forgotten.
    pub fn refuse(&mut self, id: u64) {
        self.bodies.remove(&id);
    }

    /// Bodies that have begun and are not complete.
    pub fn arriving(&self) -> usize {
        self.bodies.len()
    }

    /// Bytes that the other side shall be allowed now, by a [`Header::Credit`].
    pub fn take_credit(&mut self) -> Option<u32> {
        if self.taken < CREDIT_STEP {
            return None;
        }
        let taken = std::mem::take(&mut self.taken);
        self.credit += taken;
        Some(u32::try_from(taken).expect("no more is taken than the window"))
    }

    /// Whether the stream may end here.
    pub fn finish(&self) -> Result<(), FrameError> {
        let got = self.end - self.start;
        match got == 0 && self.piece.is_none() && self.bodies.is_empty() {
            true => Ok(()),
            false => Err(FrameError::Truncated { got }),
        }
    }

    /// A header that is complete in the buffer.
    fn take_header(&mut self) -> Result<Option<Header>, FrameError> {
        let waiting = &self.scratch[self.start..self.end];
        let Some((length, rest)) = waiting.split_first_chunk() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_HEADER {
            return Err(FrameError::TooLarge { size: length as u64, limit: MAX_HEADER });
        }
        let Some(header) = rest.get(..length) else { return Ok(None) };
        let header = Header::decode(header)?;
        self.start += 4 + length;
        Ok(Some(header))
    }

    fn begin(&mut self, id: u64, total: u64, bytes: u32) -> Result<(), FrameError> {
        let too_large = FrameError::TooLarge { size: total, limit: isize::MAX as usize };
        let total = usize::try_from(total).ok().filter(|total| isize::try_from(*total).is_ok()).ok_or(too_large)?;
        if self.bodies.contains_key(&id) {
            return Err(FrameError::Duplicate(id));
        }
        self.bodies.insert(id, Partial { total, filled: 0, buffer: Buffer::default() });
        self.go_on(id, bytes)
    }

    /// Bytes of a body follow. Those of a body that was refused or cancelled are read and forgotten.
    fn go_on(&mut self, id: u64, bytes: u32) -> Result<(), FrameError> {
        let bytes = bytes as usize;
        if bytes > MAX_CHUNK {
            return Err(FrameError::TooLarge { size: bytes as u64, limit: MAX_CHUNK });
        }
        if bytes > self.credit {
            return Err(FrameError::OverCredit { bytes, credit: self.credit });
        }
        if let Some(body) = self.bodies.get(&id)
            && bytes > body.total - body.filled
        {
            return Err(FrameError::OverBody { id, bytes, left: body.total - body.filled });
        }
        self.credit -= bytes;
        self.piece = Some(Piece { id, left: bytes });
        Ok(())
    }

    /// Moves what is in the buffer to its body: the piece if it misses bytes, else the body if it is complete.
    fn take_piece(&mut self, mut piece: Piece) -> (Option<Piece>, Option<Event>) {
        let n = piece.left.min(self.end - self.start);
        let here = &self.scratch[self.start..self.start + n];
        self.start += n;
        self.taken += n;
        piece.left -= n;
        let Some(body) = self.bodies.get_mut(&piece.id) else {
            return (Some(piece).filter(|piece| piece.left > 0), None);
        };
        body.put(here, &self.pool);
        if piece.left > 0 {
            return (Some(piece), None);
        }
        if body.filled < body.total {
            return (None, None);
        }
        let body = self.bodies.remove(&piece.id).expect("it was found just now");
        (None, Some(Event::Body { id: piece.id, bytes: body.buffer.freeze(body.total) }))
    }
}

impl Partial {
    /// The next at most `limit` bytes of the buffer.
    fn space(&mut self, limit: usize, pool: &Arc<Pool>) -> &mut [u8] {
        if self.filled == self.buffer.len() {
            self.grow(pool);
        }
        let end = self.buffer.len().min(self.filled + limit);
        &mut self.buffer.memory()[self.filled..end]
    }

    /// Kept memory for all of it; else fresh memory, at first for a part of a large body. That is zero already, so nothing
    /// is written twice.
    fn grow(&mut self, pool: &Arc<Pool>) {
        let fresh = || match self.filled == 0 && self.total > FIRST_BUFFER {
            true => Buffer::part(FIRST_BUFFER),
            false => Buffer::fresh(pool, self.total),
        };
        let mut larger = Buffer::kept(pool, self.total).unwrap_or_else(fresh);
        larger.memory()[..self.filled].copy_from_slice(&self.buffer.memory()[..self.filled]);
        self.buffer = larger;
    }

    fn put(&mut self, mut bytes: &[u8], pool: &Arc<Pool>) {
        while !bytes.is_empty() {
            let space = self.space(bytes.len(), pool);
            let (now, later) = bytes.split_at(space.len());
            space.copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
        }
    }
}
