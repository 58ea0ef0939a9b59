//! skep's own wire, `/skep/expert/1.0.0` (docs/wire.md §13): calls with a number on two long-lived streams, answered in
//! any order.
//!
//! A frame is `u32 length of the header, little-endian | header, postcard | bytes of a body`, as many as the header says.
//! A body is cut into frames of at most 1 MiB, so that frames of several calls take turns. [`Reader`] turns bytes into
//! [`Event`]s and puts bodies together; [`Writer`] turns headers and bodies into bytes. Neither does I/O.
//!
//! The side that opened the streams calls; to call in both directions each side opens streams of its own.

mod header;
mod pool;
mod reader;
mod writer;

pub use header::{AnswerHead, BodyHead, Failure, Header, Lane, Load, RequestHead, TensorHead, Trace, micros};
pub use pool::Pool;
pub use reader::{Event, Reader};
pub use writer::Writer;

/// The protocol's name in libp2p's negotiation and in identify.
pub const PROTOCOL: &str = "/skep/expert/1.0.0";
/// Largest header, in bytes. A receiver refuses more before it allocates anything.
pub const MAX_HEADER: usize = 128 << 10;
/// Most bytes of a body in one frame.
pub const MAX_CHUNK: usize = 1 << 20;
/// Most bytes that are worth one write: with the muxer's header of 12 bytes they are one of its frames, and one record of
/// TLS, hence one encryption. One byte more makes two of each.
pub const MAX_WRITE: usize = (16 << 10) - 12;
/// Bodies above this size travel on the stream for bulk.
pub const MAX_SMALL_BODY: usize = 1 << 20;
/// Bytes of bodies that may be under way on one stream in one direction before the receiver has allowed more.
pub const WINDOW: usize = 16 << 20;
/// Longest text in an error; longer ones are cut.
pub const MAX_TEXT: usize = 64 << 10;
