//! Sizes that both sides of the wire agree on (docs/wire.md §2.3, §3).

/// Largest body of a unary frame, in bytes; a receiver refuses more.
pub const MAX_UNARY_FRAME: usize = 4 << 20;
/// Raw (uncompressed) tensor bytes of a request above which hivemind calls by stream.
pub const MAX_UNARY_PAYLOAD: usize = 2 << 20;
/// Size of the pieces that a streamed tensor is cut into, in bytes.
pub const STREAM_CHUNK: usize = 4 << 20;
/// Largest frame accepted on a stream: one piece and the message around it.
pub const MAX_STREAM_FRAME: usize = STREAM_CHUNK + 1024;
/// Rows that one call to a hivemind server carries at the most.
pub const MAX_CALL_ROWS: usize = 2048;
