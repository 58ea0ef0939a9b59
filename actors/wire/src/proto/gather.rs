//! Encoding of tensor messages as a list of segments, so that buffers of many megabytes are shared and not copied.

use bytes::{Bytes, BytesMut};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};

use super::runtime::Tensor;

/// Buffers below this size in bytes are copied: a segment of their own would cost more than the copy.
const SHARE_FROM: usize = 1024;

/// The bytes of `ExpertRequest { uid, tensors }`, to be written one segment after the other.
pub fn gather_request(uid: &str, tensors: &[Tensor]) -> Vec<Bytes> {
    let mut gather = Gather::default();
    if !uid.is_empty() {
        prost::encoding::string::encode(1, &uid.to_owned(), &mut gather.head);
    }
    gather.tensors(tensors);
    gather.finish()
}

/// The bytes of `ExpertResponse { tensors }`, to be written one segment after the other.
pub fn gather_response(tensors: &[Tensor]) -> Vec<Bytes> {
    let mut gather = Gather::default();
    gather.tensors(tensors);
    gather.finish()
}

#[derive(Default)]
struct Gather {
    segments: Vec<Bytes>,
    head: BytesMut,
}

impl Gather {
    /// Field 2 of both messages.
    fn tensors(&mut self, tensors: &[Tensor]) {
        for tensor in tensors {
            let metadata = Tensor { buffer: Bytes::new(), ..tensor.clone() };
            let buffer = &tensor.buffer;
            let buffer_field = match buffer.len() {
                0 => 0,
                len => key_len(1) + encoded_len_varint(len as u64) + len,
            };
            encode_key(2, WireType::LengthDelimited, &mut self.head);
            encode_varint((buffer_field + metadata.encoded_len()) as u64, &mut self.head);
            if !buffer.is_empty() {
                encode_key(1, WireType::LengthDelimited, &mut self.head);
                encode_varint(buffer.len() as u64, &mut self.head);
                self.share(buffer);
            }
            metadata.encode_raw(&mut self.head);
        }
    }

    fn share(&mut self, bytes: &Bytes) {
        if bytes.len() < SHARE_FROM {
            self.head.extend_from_slice(bytes);
            return;
        }
        self.segments.push(self.head.split().freeze());
        self.segments.push(bytes.clone());
    }

    fn finish(mut self) -> Vec<Bytes> {
        if !self.head.is_empty() {
            self.segments.push(self.head.freeze());
        }
        self.segments
    }
}
