use bytes::Bytes;
use proptest::prelude::*;
use skep_wire::{
    error_text::{PythonError, bare, repr},
    frame::{FrameError, stream, unary},
    limits::{MAX_STREAM_FRAME, MAX_UNARY_FRAME, STREAM_CHUNK},
    proto::{gather_request, runtime::Tensor},
};

use crate::support::{unhex, vectors};

const CALL: unary::CallId = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn recorded(kind: &str, name: &str) -> Bytes {
    let all = vectors("dht_messages.json");
    unhex(&all[kind].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap()["hex"])
}

fn read_unary(bytes: &[u8]) -> Result<Option<unary::Frame>, FrameError> {
    let mut decoder = unary::Decoder::new();
    decoder.push(bytes);
    decoder.next_frame()
}

fn read_stream(bytes: &[u8]) -> Result<Option<stream::Frame>, FrameError> {
    let mut decoder = stream::Decoder::new();
    decoder.push(bytes);
    decoder.next_frame()
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut out = unsigned_varint::encode::u64(body.len() as u64, &mut [0; 10]).to_vec();
    out.extend_from_slice(body);
    out
}

mod unary_calls {
    use super::*;

    #[test]
    fn a_request_is_what_python_sends() {
        let bytes = recorded("unary_frames", "call DHTProtocol.rpc_ping");
        let frame = read_unary(&bytes).unwrap().unwrap();
        assert_eq!(frame.call_id, CALL);
        let unary::UnaryMessage::Request { peer, proto, data } = frame.message else { panic!("a request") };
        assert_eq!(proto, "DHTProtocol.rpc_ping");
        assert_eq!(unary::encode_request(&CALL, &peer, &proto, vec![data]).unwrap().concat(), bytes);
    }

    #[test]
    fn an_answer_is_what_python_expects() {
        let bytes = recorded("unary_frames", "reply");
        let frame = read_unary(&bytes).unwrap().unwrap();
        let unary::UnaryMessage::Response(data) = frame.message else { panic!("a response") };
        assert_eq!(unary::encode_response(&CALL, vec![data]).unwrap().concat(), bytes);
    }

    #[test]
    fn an_empty_answer_is_still_present() {
        let bytes = unary::encode_response(&CALL, Vec::new()).unwrap().concat();
        assert_eq!(bytes, recorded("unary_frames", "reply empty payload"));
        assert!(bytes.ends_with(&[0x22, 0x02, 0x0a, 0x00]));
        let message = read_unary(&bytes).unwrap().unwrap().message;
        assert_eq!(message, unary::UnaryMessage::Response(Bytes::new()));
    }

    #[test]
    fn an_error_is_the_repr_of_a_python_exception() {
        let text = repr(PythonError::KeyError, "nope.0");
        let bytes = unary::encode_error(&CALL, &text).concat();
        assert_eq!(bytes, recorded("unary_frames", "reply error"));
        assert_eq!(read_unary(&bytes).unwrap().unwrap().message, unary::UnaryMessage::Error(text));
    }

    #[test]
    fn an_error_of_any_length_fits_a_frame() {
        let bytes = unary::encode_error(&CALL, &"é".repeat(5 << 20)).concat();
        let message = read_unary(&bytes).unwrap().unwrap().message;
        assert!(matches!(message, unary::UnaryMessage::Error(text) if text.len() == 64 << 10));
    }

    #[test]
    fn required_fields_are_written_even_when_empty() {
        let bytes = unary::encode_request(&CALL, &[], "", Vec::new()).unwrap().concat();
        assert!(bytes.ends_with(&[0x1a, 6, 0x0a, 0, 0x12, 0, 0x1a, 0]));
    }

    #[test]
    fn a_call_id_has_exactly_16_bytes() {
        for len in [0, 15, 17] {
            let mut body = vec![0x0a, len];
            body.extend(vec![1; usize::from(len)]);
            body.extend([0x22, 2, 0x0a, 0]);
            assert_eq!(read_unary(&framed(&body)), Err(FrameError::CallId(usize::from(len))));
        }
    }

    #[test]
    fn a_frame_without_request_or_answer_is_an_error() {
        let id = [&[0x0a, 16][..], &CALL].concat();
        assert_eq!(read_unary(&framed(&id)), Err(FrameError::NoMessage));
        let local_cancel = [&id[..], &[0x2a, 0]].concat();
        assert_eq!(read_unary(&framed(&local_cancel)), Err(FrameError::NoMessage));
        let nothing_inside = [&id[..], &[0x22, 0]].concat();
        assert_eq!(read_unary(&framed(&nothing_inside)), Err(FrameError::NoOutcome));
        assert!(matches!(read_unary(&framed(&[0xff, 0xff])), Err(FrameError::Protobuf(_))));
        assert!(matches!(read_unary(&[0]), Err(FrameError::CallId(0))));
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        let over = MAX_UNARY_FRAME as u64 + 1;
        for size in [over, u64::MAX] {
            let mut buffer = [0; 10];
            let prefix = unsigned_varint::encode::u64(size, &mut buffer);
            assert_eq!(read_unary(prefix), Err(FrameError::TooLarge { size, limit: MAX_UNARY_FRAME }));
        }
        let mut buffer = [0; 10];
        assert_eq!(read_unary(unsigned_varint::encode::u64(over - 1, &mut buffer)), Ok(None));
    }

    #[test]
    fn a_length_must_be_a_minimal_varint_of_64_bits() {
        assert_eq!(read_unary(&[0x80, 0x00]), Err(FrameError::Length));
        assert_eq!(read_unary(&[0xff; 11]), Err(FrameError::Length));
        assert_eq!(read_unary(&[0x80; 9]), Ok(None));
    }

    #[test]
    fn what_would_never_be_answered_is_not_sent() {
        let data = vec![Bytes::from(vec![0; MAX_UNARY_FRAME])];
        assert!(matches!(
            unary::encode_request(&CALL, &[1; 38], "DHTProtocol.rpc_store", data.clone()),
            Err(FrameError::TooLarge { limit: MAX_UNARY_FRAME, .. })
        ));
        assert!(unary::encode_response(&CALL, data).is_err());
    }

    #[test]
    fn the_largest_frame_is_sent_and_read() {
        let around = unary::encode_response(&CALL, vec![vec![0; 4_000_000].into()]).unwrap()[0].len();
        let room = MAX_UNARY_FRAME + 4 - around;
        let bytes = unary::encode_response(&CALL, vec![vec![0; room].into()]).unwrap().concat();
        assert_eq!(bytes.len(), MAX_UNARY_FRAME + 4);
        assert!(read_unary(&bytes).unwrap().is_some());
        assert!(unary::encode_response(&CALL, vec![vec![0; room + 1].into()]).is_err());
    }

    #[test]
    fn tensor_buffers_are_shared_and_not_copied() {
        let buffer = Bytes::from(vec![9; 1 << 20]);
        let data = gather_request("ffn.0", &[Tensor { buffer: buffer.clone(), ..Tensor::default() }]);
        let segments = unary::encode_request(&CALL, &[], "ConnectionHandler.rpc_forward", data).unwrap();
        assert!(segments.iter().any(|s| s.as_ptr() == buffer.as_ptr()));
        let body = segments.concat();
        let length = unary::Length::parse(&body).unwrap().unwrap();
        let body = Bytes::from(body).slice(length.header..);
        let unary::UnaryMessage::Request { data, .. } = unary::Frame::decode(body.clone()).unwrap().message else {
            panic!("a request")
        };
        assert!(body.as_ptr_range().contains(&data.as_ptr()), "data is a slice of the body");
    }

    #[test]
    fn bytes_after_a_request_are_noticed() {
        let mut decoder = unary::Decoder::new();
        decoder.push(&recorded("unary_frames", "call DHTProtocol.rpc_ping"));
        assert!(decoder.next_frame().unwrap().is_some());
        assert!(!decoder.has_rest());
        assert_eq!(decoder.finish(), Ok(()));
        decoder.push(&[1]);
        assert!(decoder.has_rest());
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { got: 1 }));
    }
}

mod streaming_calls {
    use super::*;

    #[test]
    fn frames_are_what_python_sends() {
        let message = recorded("stream_frames", "message");
        let stream::Frame::Message(payload) = read_stream(&message).unwrap().unwrap() else { panic!("a message") };
        assert_eq!(stream::encode_message(vec![payload]).unwrap().concat(), message);

        let end = recorded("stream_frames", "end of stream");
        assert_eq!(stream::END[..], end);
        assert_eq!(read_stream(&end), Ok(Some(stream::Frame::End)));

        let error = recorded("stream_frames", "error");
        assert_eq!(stream::encode_error("boom"), error);
        assert_eq!(read_stream(&error), Ok(Some(stream::Frame::Error("boom".to_owned()))));
    }

    #[test]
    fn a_missing_expert_keeps_its_quotes() {
        let bytes = stream::encode_error(&bare(PythonError::KeyError, "nope.1"));
        assert_eq!(read_stream(&bytes), Ok(Some(stream::Frame::Error("'nope.1'".to_owned()))));
    }

    #[test]
    fn an_error_without_words_is_not_the_end() {
        assert_eq!(read_stream(&stream::encode_error("")), Ok(Some(stream::Frame::Error(String::new()))));
    }

    #[test]
    fn an_unknown_marker_is_an_error() {
        assert_eq!(read_stream(&[2, 0, 0, 0, 0, 0, 0, 0, 0]), Err(FrameError::Marker(2)));
    }

    #[test]
    fn an_empty_message_is_a_message() {
        assert_eq!(read_stream(&[0; 9]), Ok(Some(stream::Frame::Message(Bytes::new()))));
        assert_eq!(stream::encode_message(Vec::new()).unwrap().concat(), [0; 9]);
    }

    #[test]
    fn a_whole_piece_and_the_message_around_it_fit_a_frame() {
        let piece = Tensor {
            buffer: vec![0; STREAM_CHUNK].into(),
            size: vec![u32::MAX; 8],
            dtype: "bfloat16".to_owned(),
            requires_grad: true,
            compression: 5,
            chunks: i32::MAX,
        };
        let payload = gather_request(&format!("{}.0.0", "x".repeat(200)), &[piece]);
        let bytes = stream::encode_message(payload).unwrap().concat();
        assert!(read_stream(&bytes).unwrap().is_some());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        for size in [MAX_STREAM_FRAME as u64 + 1, u64::MAX] {
            let header = [&[0][..], &size.to_be_bytes()].concat();
            assert_eq!(read_stream(&header), Err(FrameError::TooLarge { size, limit: MAX_STREAM_FRAME }));
        }
        let header = [&[0][..], &(MAX_STREAM_FRAME as u64).to_be_bytes()].concat();
        assert_eq!(read_stream(&header), Ok(None));
        assert!(stream::encode_message(vec![vec![0; MAX_STREAM_FRAME + 1].into()]).is_err());
    }

    #[test]
    fn an_end_inside_a_frame_is_an_error_and_between_frames_is_not() {
        let mut decoder = stream::Decoder::new();
        let message = recorded("stream_frames", "message");
        decoder.push(&message);
        decoder.push(&message[..12]);
        assert!(decoder.next_frame().unwrap().is_some());
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { got: 12 }));
        decoder.push(&message[12..]);
        assert!(decoder.next_frame().unwrap().is_some());
        assert_eq!(decoder.finish(), Ok(()));
    }
}

fn unary_frames() -> impl Strategy<Value = Vec<(unary::Frame, Vec<u8>)>> {
    let data = || prop::collection::vec(any::<u8>(), 0..400).prop_map(Bytes::from);
    let frame = (any::<[u8; 16]>(), 0..3, data(), ".{0,30}").prop_map(|(call_id, kind, data, text)| {
        let (message, bytes) = match kind {
            0 => {
                let bytes = unary::encode_request(&call_id, b"peer", &text, vec![data.clone()]).unwrap();
                (unary::UnaryMessage::Request { peer: Bytes::from_static(b"peer"), proto: text, data }, bytes)
            }
            1 => {
                let bytes = unary::encode_response(&call_id, vec![data.clone()]).unwrap();
                (unary::UnaryMessage::Response(data), bytes)
            }
            _ => (unary::UnaryMessage::Error(text.clone()), unary::encode_error(&call_id, &text)),
        };
        (unary::Frame { call_id, message }, bytes.concat())
    });
    prop::collection::vec(frame, 1..4)
}

fn stream_frames() -> impl Strategy<Value = Vec<(stream::Frame, Vec<u8>)>> {
    let frame = (0..3, prop::collection::vec(any::<u8>(), 0..400), ".{0,30}").prop_map(|(kind, data, text)| {
        let data = Bytes::from(data);
        match kind {
            0 => (stream::Frame::End, stream::END.to_vec()),
            1 => (stream::Frame::Error(text.clone()), stream::encode_error(&text).to_vec()),
            _ => (stream::Frame::Message(data.clone()), stream::encode_message(vec![data]).unwrap().concat()),
        }
    });
    prop::collection::vec(frame, 1..4)
}

proptest! {
    #[test]
    fn unary_frames_arrive_whole_however_the_bytes_are_split(frames in unary_frames(), step in 1usize..300) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        let (mut decoder, mut read) = (unary::Decoder::new(), Vec::new());
        for piece in bytes.chunks(step) {
            decoder.push(piece);
            while let Some(frame) = decoder.next_frame().unwrap() {
                read.push(frame);
            }
        }
        prop_assert_eq!(read, frames.into_iter().map(|(frame, _)| frame).collect::<Vec<_>>());
        prop_assert_eq!(decoder.finish(), Ok(()));
    }

    #[test]
    fn stream_frames_arrive_whole_however_the_bytes_are_split(frames in stream_frames(), step in 1usize..300) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        let (mut decoder, mut read) = (stream::Decoder::new(), Vec::new());
        for piece in bytes.chunks(step) {
            decoder.push(piece);
            while let Some(frame) = decoder.next_frame().unwrap() {
                read.push(frame);
            }
        }
        prop_assert_eq!(read, frames.into_iter().map(|(frame, _)| frame).collect::<Vec<_>>());
        prop_assert_eq!(decoder.finish(), Ok(()));
    }

    #[test]
    fn reading_what_a_decoder_expects_never_reads_past_a_frame(
        unary_frames in unary_frames(),
        stream_frames in stream_frames(),
    ) {
        for (frame, bytes) in unary_frames {
            let (mut decoder, mut at) = (unary::Decoder::new(), 0);
            while decoder.expected() > 0 {
                let end = at + decoder.expected();
                prop_assert!(end <= bytes.len());
                decoder.push(&bytes[at..end]);
                at = end;
            }
            prop_assert_eq!(decoder.next_frame(), Ok(Some(frame)));
        }
        for (frame, bytes) in stream_frames {
            let (mut decoder, mut at) = (stream::Decoder::new(), 0);
            while decoder.expected() > 0 {
                let end = at + decoder.expected();
                prop_assert!(end <= bytes.len());
                decoder.push(&bytes[at..end]);
                at = end;
            }
            prop_assert_eq!(decoder.next_frame(), Ok(Some(frame)));
        }
    }
}
