//! A stream muxer whose substreams carry protocol names without a leading slash on the wire.
//!
//! Wraps the real muxer before boxing. During protocol negotiation its substreams rewrite names
//! ([`negotiation`]); afterwards a read or write costs one branch more.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};

mod negotiation;

pub(crate) use negotiation::PREFIX;
use negotiation::{Negotiation, Role, Violation};

/// The muxer wrapper.
pub(crate) struct Slashless<M>(pub(crate) M);

impl<M> StreamMuxer for Slashless<M>
where
    M: StreamMuxer + Unpin,
    M::Substream: Unpin,
{
    type Substream = Substream<M::Substream>;
    type Error = M::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_inbound(cx).map_ok(|stream| Substream::new(stream, Role::Listener))
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_outbound(cx).map_ok(|stream| Substream::new(stream, Role::Dialer))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Pin::new(&mut self.0).poll_close(cx)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// A substream that rewrites names until one is agreed on.
pub(crate) struct Substream<S> {
    inner: S,
    /// `None` once bytes pass by as they are.
    negotiation: Option<Box<Negotiation>>,
    /// A reader that waits for an answer of ours.
    reader: Option<Waker>,
}

impl<S> Substream<S> {
    fn new(inner: S, role: Role) -> Self {
        Self { inner, negotiation: Some(Box::new(Negotiation::new(role))), reader: None }
    }

    fn retire_finished(&mut self) {
        if self.negotiation.as_ref().is_some_and(|negotiation| negotiation.is_finished()) {
            self.negotiation = None;
        }
    }
}

impl<S: AsyncWrite + Unpin> Substream<S> {
    /// Puts on the wire what the negotiation has to say.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(negotiation) = self.negotiation.as_mut().filter(|n| !n.to_wire().is_empty()) {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, negotiation.to_wire()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => negotiation.sent(n),
            }
        }
        self.retire_finished();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Substream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            let Some(negotiation) = this.negotiation.as_mut() else {
                return Pin::new(&mut this.inner).poll_read(cx, buffer);
            };
            let n = negotiation.read(buffer);
            if n > 0 {
                this.retire_finished();
                return Poll::Ready(Ok(n));
            }
            if negotiation.is_agreed() {
                return Pin::new(&mut this.inner).poll_read(cx, buffer);
            }
            if negotiation.holds_back() {
                this.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let mut chunk = [0; 1024];
            match ready!(Pin::new(&mut this.inner).poll_read(cx, &mut chunk))? {
                0 => return Poll::Ready(Ok(0)),
                n => negotiation.receive(&chunk[..n]).map_err(invalid)?,
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Substream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        match this.negotiation.as_mut() {
            Some(negotiation) if !negotiation.is_agreed() => {
                negotiation.send(bytes).map_err(invalid)?;
                if let Some(reader) = this.reader.take() {
                    reader.wake();
                }
                // What does not go out now goes with the flush that ends every multistream message.
                if let Poll::Ready(Err(error)) = this.poll_drain(cx) {
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Ok(bytes.len()))
            }
            _ => {
                ready!(this.poll_drain(cx))?;
                Pin::new(&mut this.inner).poll_write(cx, bytes)
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

fn invalid(violation: Violation) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, violation)
}
