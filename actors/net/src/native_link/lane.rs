//! One of a link's streams.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{AsyncRead, AsyncWrite};
use skep_kernel::{Clock, Moment};
use skep_wire::frame::native::{Event, Header, MAX_WRITE, Pool, Reader, Writer};

use super::Broken;

/// A stream with what reads and writes its frames.
pub(super) struct Lane<S, G> {
    stream: S,
    pub(super) reader: Reader,
    pub(super) writer: Writer<G>,
    /// Since when nothing could be written that should be.
    stuck_since: Option<Moment>,
}

impl<S: AsyncRead + AsyncWrite + Unpin, G> Lane<S, G> {
    pub(super) fn new(stream: S, pool: Arc<Pool>) -> Self {
        Self { stream, reader: Reader::with_pool(pool), writer: Writer::new(), stuck_since: None }
    }

    /// Writes what can be written. Whether anything was.
    pub(super) fn write(&mut self, cx: &mut Context<'_>, clock: &dyn Clock) -> Result<bool, Broken> {
        if let Some(bytes) = self.reader.take_credit() {
            self.writer.control(&Header::Credit { bytes })?;
        }
        let mut any = false;
        loop {
            let bytes = self.writer.next_bytes();
            if bytes.is_empty() {
                break;
            }
            match Pin::new(&mut self.stream).poll_write(cx, &bytes[..bytes.len().min(MAX_WRITE)]) {
                Poll::Ready(Ok(0)) => return Err(Broken::Ended),
                Poll::Ready(Ok(n)) => {
                    self.writer.wrote(n);
                    any = true;
                }
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
        }
        if any && let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx) {
            return Err(error.into());
        }
        if any || self.writer.is_empty() {
            self.stuck_since = None;
        }
        if self.stuck_since.is_none() && !self.writer.is_empty() {
            self.stuck_since = Some(clock.now());
        }
        Ok(any)
    }

    /// When a peer that takes nothing is given up.
    pub(super) fn patience_ends(&self, patience: Duration) -> Option<Moment> {
        self.stuck_since.map(|since| since + patience)
    }

    /// The next event that has arrived.
    pub(super) fn read(&mut self, cx: &mut Context<'_>) -> Result<Option<Event>, Broken> {
        loop {
            if let Some(event) = self.reader.next_event()? {
                return Ok(Some(event));
            }
            match Pin::new(&mut self.stream).poll_read(cx, self.reader.space()) {
                Poll::Pending => return Ok(None),
                Poll::Ready(Ok(0)) => {
                    self.reader.finish()?;
                    return Err(Broken::Ended);
                }
                Poll::Ready(Ok(n)) => self.reader.filled(n),
                Poll::Ready(Err(error)) => return Err(error.into()),
            }
        }
    }
}
