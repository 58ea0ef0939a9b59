//! yamux as the muxer of a connection, with frames of four TLS records. libp2p's own wrapper allows 16 KiB a frame, and
//! yamux flushes each: four times the records, system calls and turns of the connection's task for a large body. It also
//! drops streams that arrive faster than they are taken; here they wait, as many as a connection may carry.

use std::{
    collections::VecDeque,
    future::{Ready, ready},
    io, iter,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::{
    muxing::{StreamMuxer, StreamMuxerEvent},
    upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
};
use yamux::{Connection, ConnectionError, Mode, Stream};

use crate::security::FRAME;

/// Streams that a connection may carry at once. A Python mixture opens one per sample and expert, and yamux ends a
/// connection at the limit; 4096 is the most that yamux allows.
pub(crate) const MAX_STREAMS: usize = 4096;
/// What yamux writes before the body of a frame.
const HEADER: usize = 12;

/// The upgrade of a secured connection.
#[derive(Clone)]
pub(crate) struct Yamux(yamux::Config);

impl Yamux {
    pub(crate) fn new() -> Self {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(MAX_STREAMS).set_split_send_size(FRAME - HEADER);
        Self(config)
    }

    fn start<C: AsyncRead + AsyncWrite + Unpin>(self, socket: C, mode: Mode) -> Ready<io::Result<Muxer<C>>> {
        let connection = Connection::new(socket, self.0, mode);
        ready(Ok(Muxer { connection, opened: VecDeque::new(), taker: None }))
    }
}

impl UpgradeInfo for Yamux {
    type Info = &'static str;
    type InfoIter = iter::Once<&'static str>;

    fn protocol_info(&self) -> Self::InfoIter {
        iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_inbound(self, socket: C, _: &'static str) -> Self::Future {
        self.start(socket, Mode::Server)
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, socket: C, _: &'static str) -> Self::Future {
        self.start(socket, Mode::Client)
    }
}

/// A connection and the streams that the peer opened and nobody has taken yet, at most [`MAX_STREAMS`].
pub(crate) struct Muxer<C> {
    connection: Connection<C>,
    opened: VecDeque<Stream>,
    /// Who waits for one of them.
    taker: Option<Waker>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    /// Sends and receives for all streams until nothing can be done or the peer opens one.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        self.connection.poll_next_inbound(cx).map(|next| next.unwrap_or(Err(ConnectionError::Closed)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Stream;
    type Error = ConnectionError;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        if let Some(stream) = self.opened.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        let next = self.poll_next(cx);
        if next.is_pending() {
            self.taker = Some(cx.waker().clone());
        }
        next
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Stream, ConnectionError>> {
        self.connection.poll_new_outbound(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        self.connection.poll_close(cx)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, ConnectionError>> {
        while let Poll::Ready(stream) = self.poll_next(cx)? {
            self.opened.push_back(stream);
            if let Some(taker) = self.taker.take() {
                taker.wake();
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _};

    use super::*;
    use crate::pipe::Pipe;

    fn dialler(socket: Pipe) -> Muxer<Pipe> {
        Yamux::new().upgrade_outbound(socket, "").into_inner().unwrap()
    }

    async fn open(muxer: &mut Muxer<Pipe>) -> Stream {
        poll_fn(|cx| Pin::new(&mut *muxer).poll_outbound(cx)).await.unwrap()
    }

    /// Sends and receives until nothing can be done.
    async fn settle(muxer: &mut Muxer<Pipe>) {
        poll_fn(|cx| {
            assert!(Pin::new(&mut *muxer).poll(cx).is_pending(), "yamux has no events");
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_large_body_leaves_in_frames_of_four_records() {
        let (near, mut far) = Pipe::pair(1 << 20);
        let mut muxer = dialler(near);
        let mut stream = open(&mut muxer).await;
        assert_eq!(stream.write(&[7; 200 << 10]).await.unwrap(), FRAME - HEADER);
        settle(&mut muxer).await;
        // What goes before the data: a ping and the stream's opening.
        let mut header = [0; HEADER];
        loop {
            far.read_exact(&mut header).await.unwrap();
            let (kind, length) = (header[1], u32::from_be_bytes(header[8..].try_into().unwrap()));
            if kind == 0 && length > 0 {
                assert_eq!(length as usize + HEADER, FRAME);
                return;
            }
        }
    }

    #[tokio::test]
    async fn streams_that_nobody_takes_yet_wait() {
        let (near, far) = Pipe::pair(1 << 20);
        let mut dialler = dialler(near);
        let mut listener = Yamux::new().upgrade_inbound(far, "").into_inner().unwrap();
        // As many as yamux opens before the first is acknowledged.
        let mut streams = Vec::new();
        for _ in 0..256 {
            let mut stream = open(&mut dialler).await;
            assert_eq!(stream.write(b"hello").await.unwrap(), 5);
            streams.push(stream);
        }
        // Several times, as a pipe of tokio's pauses now and then.
        for _ in 0..100 {
            settle(&mut dialler).await;
            settle(&mut listener).await;
            tokio::task::yield_now().await;
        }
        let mut taken = 0;
        while let Some(stream) = poll_fn(|cx| Pin::new(&mut listener).poll_inbound(cx)).now_or_never() {
            stream.unwrap();
            taken += 1;
        }
        assert_eq!(taken, 256);
    }
}
