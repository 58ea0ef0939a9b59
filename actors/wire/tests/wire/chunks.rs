use bytes::Bytes;
use proptest::prelude::*;
use prost::Message;
use skep_wire::{
    chunk::{AssembleError, Assembler, split, split_for_streaming},
    limits::STREAM_CHUNK,
    proto::{self, runtime::Tensor},
};

use crate::support::{unhex, vectors};

fn tensor(buffer: Bytes) -> Tensor {
    Tensor { size: vec![buffer.len() as u32], buffer, dtype: "uint8".to_owned(), ..Tensor::default() }
}

fn assemble(pieces: Vec<Tensor>) -> Vec<Tensor> {
    let mut assembler = Assembler::new(1 << 30);
    pieces.into_iter().for_each(|piece| assembler.push(piece, 0).unwrap());
    assembler.finish()
}

#[test]
fn pieces_are_cut_where_python_cuts_them() {
    for case in vectors("tensors.json")["split_for_streaming"].as_array().unwrap() {
        let whole = proto::decode::<Tensor>(unhex(&case["whole"])).unwrap();
        let pieces = split(whole.clone(), case["chunk_size"].as_u64().unwrap() as usize);
        let expected: Vec<_> = case["parts"].as_array().unwrap().iter().map(unhex).collect();
        assert_eq!(pieces.iter().map(Message::encode_to_vec).collect::<Vec<_>>(), expected);
        assert_eq!(assemble(pieces), [whole]);
    }
}

#[test]
fn a_tensor_is_cut_at_4_mib_and_the_pieces_share_its_bytes() {
    let whole = tensor(Bytes::from(vec![1; 2 * STREAM_CHUNK + 1]));
    let pieces = split_for_streaming(whole.clone());
    assert_eq!(pieces.iter().map(|p| p.buffer.len()).collect::<Vec<_>>(), [STREAM_CHUNK, STREAM_CHUNK, 1]);
    assert_eq!(pieces[0].chunks, 3);
    assert_eq!(pieces[2], Tensor { buffer: Bytes::from_static(&[1]), ..Tensor::default() });
    assert!(pieces.iter().all(|p| whole.buffer.as_ptr_range().contains(&p.buffer.as_ptr())));
}

#[test]
fn a_tensor_in_one_piece_is_not_copied() {
    let whole = tensor(Bytes::from(vec![1; 5000]));
    let joined = assemble(split_for_streaming(whole.clone()));
    assert_eq!(joined[0].buffer.as_ptr(), whole.buffer.as_ptr());
}

#[test]
fn a_dtype_begins_a_tensor_whatever_the_first_announced() {
    let lying = Tensor { chunks: 7, ..tensor(Bytes::from_static(b"ab")) };
    let rest = Tensor { buffer: Bytes::from_static(b"cd"), ..Tensor::default() };
    let joined = assemble(vec![lying.clone(), rest, lying]);
    assert_eq!(joined.iter().map(|t| t.buffer.as_ref()).collect::<Vec<_>>(), [&b"abcd"[..], b"ab"]);
    assert!(joined.iter().all(|t| t.chunks == 0));
}

#[test]
fn a_continuation_of_nothing_is_refused() {
    assert_eq!(Assembler::new(1000).push(Tensor::default(), 0), Err(AssembleError::NoTensor));
}

#[test]
fn the_receiver_decides_how_much_it_takes() {
    let mut assembler = Assembler::new(10_000);
    let piece = tensor(Bytes::from(vec![0; 4000]));
    assembler.push(piece.clone(), 4100).unwrap();
    assembler.push(piece.clone(), 4100).unwrap();
    assert_eq!(assembler.push(piece, 4100), Err(AssembleError::TooLarge { limit: 10_000 }));
}

#[test]
fn a_small_piece_in_a_large_frame_counts_as_the_frame() {
    let mut assembler = Assembler::new(10_000);
    let piece = tensor(Bytes::from_static(b"a"));
    assert_eq!(assembler.push(piece, 20_000), Err(AssembleError::TooLarge { limit: 10_000 }));
}

#[test]
fn endless_empty_pieces_run_into_the_limit() {
    let mut assembler = Assembler::new(1 << 20);
    let refused = (0..100_000).find(|_| assembler.push(tensor(Bytes::new()), 0).is_err());
    assert!(refused.is_some_and(|n| n < 5000));
}

proptest! {
    #[test]
    fn tensors_survive_being_cut_and_joined(
        buffers in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..4),
        chunk_size in 1usize..100,
    ) {
        let tensors: Vec<_> = buffers.into_iter().map(|b| tensor(b.into())).collect();
        let pieces = tensors.iter().flat_map(|t| split(t.clone(), chunk_size)).collect();
        prop_assert_eq!(assemble(pieces), tensors);
    }
}
