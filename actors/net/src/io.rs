//! Frames on a stream: reads exactly one, so that nothing behind it is lost; writes segments without joining them.

use std::io;

use bytes::{Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use skep_wire::frame::{FrameError, stream, unary};

/// What one write carries at least where there is as much: one record of TLS, one system call.
const JOIN: usize = 16 << 10;
/// Memory set aside before the first byte of a body has arrived. It doubles as bytes arrive, so that an announced length
/// alone costs nothing.
const FIRST_BUFFER: usize = 64 << 10;

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The stream ended where a frame could have begun.
    #[error("the stream ended")]
    Ended,
    /// The connection or the stream broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The bytes are no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
}

/// Reads the length of a unary frame.
pub(crate) async fn read_unary_length(stream: &mut (impl AsyncRead + Unpin)) -> Result<usize, ReadError> {
    let mut prefix = [0; unary::MAX_LENGTH_BYTES];
    for filled in 0..prefix.len() {
        if stream.read(&mut prefix[filled..=filled]).await? == 0 {
            return Err(if filled == 0 { ReadError::Ended } else { FrameError::Truncated { got: filled }.into() });
        }
        if let Some(length) = unary::Length::parse(&prefix[..=filled])? {
            return Ok(length.body);
        }
    }
    Err(FrameError::Length.into())
}

/// Reads a unary frame.
#[cfg(test)]
pub(crate) async fn read_unary(stream: &mut (impl AsyncRead + Unpin)) -> Result<unary::Frame, ReadError> {
    let length = read_unary_length(stream).await?;
    let body = read_body(stream, length).await?;
    Ok(unary::Frame::decode(body)?)
}

/// Reads the header of a stream frame; [`ReadError::Ended`] between two frames.
pub(crate) async fn read_stream_header(stream: &mut (impl AsyncRead + Unpin)) -> Result<stream::Header, ReadError> {
    let mut header = [0; stream::HEADER_LEN];
    let mut filled = 0;
    while filled < header.len() {
        match stream.read(&mut header[filled..]).await? {
            0 if filled == 0 => return Err(ReadError::Ended),
            0 => return Err(FrameError::Truncated { got: filled }.into()),
            n => filled += n,
        }
    }
    Ok(stream::Header::parse(&header)?)
}

/// Reads a body of known length into one buffer.
pub(crate) async fn read_body(stream: &mut (impl AsyncRead + Unpin), length: usize) -> Result<Bytes, ReadError> {
    let (mut body, mut filled) = (BytesMut::new(), 0);
    while filled < length {
        if filled == body.len() {
            body.resize(length.min(FIRST_BUFFER.max(2 * filled)), 0);
        }
        match stream.read(&mut body[filled..]).await? {
            0 => return Err(FrameError::Truncated { got: filled }.into()),
            n => filled += n,
        }
    }
    Ok(body.freeze())
}

/// Reads and forgets.
pub(crate) async fn discard(stream: &mut (impl AsyncRead + Unpin), mut length: usize) -> Result<(), ReadError> {
    let mut buffer = [0; 4096];
    while length > 0 {
        let want = length.min(buffer.len());
        match stream.read(&mut buffer[..want]).await? {
            0 => return Err(ReadError::Ended),
            n => length -= n,
        }
    }
    Ok(())
}

/// Completes when the peer ends the stream, resets it, or sends anything: on hivemind's wire each means that the caller
/// gave up (docs/wire.md §2.2).
pub(crate) async fn caller_left(stream: &mut (impl AsyncRead + Unpin)) {
    let mut byte = [0];
    let _how_it_left = stream.read(&mut byte).await;
}

/// Writes segments in order and flushes. Small neighbours are joined up to 16 KiB; what is larger is written from where
/// it lies.
pub(crate) async fn write_segments(stream: &mut (impl AsyncWrite + Unpin), segments: &[Bytes]) -> io::Result<()> {
    let mut joined = Vec::with_capacity(JOIN);
    for segment in segments {
        let mut rest = &segment[..];
        if !joined.is_empty() || rest.len() < JOIN {
            let (head, tail) = rest.split_at(rest.len().min(JOIN - joined.len()));
            joined.extend_from_slice(head);
            rest = tail;
        }
        if joined.len() == JOIN {
            stream.write_all(&joined).await?;
            joined.clear();
        }
        match rest.len() >= JOIN {
            true => stream.write_all(rest).await?,
            false => joined.extend_from_slice(rest),
        }
    }
    stream.write_all(&joined).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use futures::executor::block_on;

    use super::*;

    /// Remembers what every write carried.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl AsyncWrite for Writes {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.0.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_header_travels_with_the_beginning_of_its_body() {
        let segments = [Bytes::from(vec![1; 30]), Bytes::from(vec![2; 100_000]), Bytes::from(vec![3; 5])];
        let mut writes = Writes::default();
        block_on(write_segments(&mut writes, &segments)).unwrap();
        let sizes: Vec<usize> = writes.0.iter().map(Vec::len).collect();
        assert_eq!(sizes, [JOIN, 100_030 - JOIN, 5]);
        assert_eq!(writes.0.concat(), segments.concat());
    }

    #[test]
    fn many_small_segments_become_few_writes() {
        let segments = vec![Bytes::from(vec![7; 1000]); 50];
        let mut writes = Writes::default();
        block_on(write_segments(&mut writes, &segments)).unwrap();
        assert_eq!(writes.0.len(), 4);
        assert_eq!(writes.0.concat().len(), 50_000);
    }

    #[test]
    fn reading_a_frame_takes_nothing_behind_it() {
        let id = [7; 16];
        let frame =
            unary::encode_request(&id, b"peer", "DHTProtocol.rpc_ping", vec![Bytes::from_static(b"data")]).unwrap();
        let wire = [frame.concat(), b"rest".to_vec()].concat();
        let mut reader = &wire[..];
        assert_eq!(block_on(read_unary(&mut reader)).unwrap().call_id, id);
        assert_eq!(reader, b"rest");
    }

    #[test]
    fn a_frame_cut_short_is_an_error_and_no_frame_is_an_end() {
        let frame = unary::encode_error(&[7; 16], "ValueError('x')").concat();
        for cut in 1..frame.len() {
            assert!(matches!(block_on(read_unary(&mut &frame[..cut])), Err(ReadError::Frame(_))), "cut at {cut}");
        }
        assert!(matches!(block_on(read_unary(&mut &b""[..])), Err(ReadError::Ended)));
    }
}
