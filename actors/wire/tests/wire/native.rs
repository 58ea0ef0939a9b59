use bytes::Bytes;
use proptest::prelude::*;
use skep_wire::{
    Method,
    frame::{
        FrameError,
        native::{
            AnswerHead, BodyHead, Event, Failure, Header, Lane, Load, MAX_CHUNK, MAX_HEADER, MAX_TEXT, MAX_WRITE, Pool,
            Reader, RequestHead, TensorHead, Trace, WINDOW, Writer,
        },
    },
    proto::runtime::Tensor,
};

fn message(bytes: usize) -> BodyHead {
    BodyHead::Message { bytes: bytes as u64 }
}

fn request(id: u64, body: BodyHead) -> Header {
    let trace = Some(Trace { trace_id: 7, span_id: 8 });
    Header::Request(RequestHead {
        id,
        method: Method::Forward,
        wait_us: 30_000_000,
        request_id: u128::MAX,
        trace,
        body,
        bytes: 0,
    })
}

fn answer(id: u64, body: BodyHead) -> Header {
    let load = Some(Load { waiting_rows: 3, oldest_wait_us: 1500 });
    Header::Answer(AnswerHead { id, load, body, bytes: 0 })
}

/// Bytes in which a displaced one shows.
fn bytes(n: usize) -> Bytes {
    (0..n).map(|i| (i * 31 % 251) as u8).collect::<Vec<_>>().into()
}

/// One write as the writer joins it, at most `limit` bytes of it taken.
fn write<G>(writer: &mut Writer<G>, limit: usize) -> Vec<u8> {
    let next = writer.next_bytes();
    let next = next[..next.len().min(limit)].to_vec();
    if !next.is_empty() {
        writer.wrote(next.len());
    }
    next
}

fn write_all<G>(writer: &mut Writer<G>) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match write(writer, usize::MAX) {
            next if next.is_empty() => return all,
            next => all.extend(next),
        }
    }
}

/// Feeds a reader pieces of at most `step` bytes.
fn read(reader: &mut Reader, mut wire: &[u8], step: usize) -> Result<Vec<Event>, FrameError> {
    let mut events = Vec::new();
    while !wire.is_empty() {
        let space = reader.space();
        assert!(!space.is_empty());
        let n = space.len().min(step).min(wire.len());
        space[..n].copy_from_slice(&wire[..n]);
        reader.filled(n);
        wire = &wire[n..];
        while let Some(event) = reader.next_event()? {
            events.push(event);
        }
    }
    Ok(events)
}

fn read_all(wire: &[u8]) -> Result<Vec<Event>, FrameError> {
    read(&mut Reader::new(), wire, usize::MAX)
}

fn raw_frame(header: &Header, body: &[u8]) -> Vec<u8> {
    [&header.encode().unwrap()[..], body].concat()
}

mod headers {
    use super::*;

    #[test]
    fn the_bytes_of_a_request_are_those_of_the_document() {
        let body = BodyHead::Tensors {
            uid: "e.1".into(),
            tensors: vec![TensorHead {
                dtype: "float32".into(),
                size: vec![2, 300],
                requires_grad: true,
                compression: 0,
                bytes: 2400,
            }],
        };
        let head = RequestHead {
            id: 5,
            method: Method::Backward,
            wait_us: 128,
            request_id: 1,
            trace: None,
            body,
            bytes: 2400,
        };
        let expected = [
            &[31, 0, 0, 0][..],
            &[1],
            &[5, 5, 0x80, 1, 1, 0],
            &[1, 3],
            b"e.1",
            &[1, 7],
            b"float32",
            &[2, 2, 0xac, 2, 1, 0, 0xe0, 0x12],
            &[0xe0, 0x12],
        ]
        .concat();
        assert_eq!(Header::Request(head).encode().unwrap(), expected);
    }

    #[test]
    fn the_numbers_of_kinds_lanes_and_failures_are_fixed() {
        let first_bytes = |header: &Header, n: usize| header.encode().unwrap()[4..4 + n].to_vec();
        assert_eq!(first_bytes(&Header::Hello { lane: Lane::Bulk }, 2), [0, 1]);
        assert_eq!(first_bytes(&answer(9, message(0)), 2), [2, 9]);
        assert_eq!(first_bytes(&Header::Chunk { id: 1, bytes: 2 }, 3), [4, 1, 2]);
        assert_eq!(first_bytes(&Header::Credit { bytes: 3 }, 2), [5, 3]);
        assert_eq!(first_bytes(&Header::Cancel { id: 4 }, 2), [6, 4]);
        let text = || String::new();
        let failures = [
            Failure::UnknownExpert { uid: text() },
            Failure::Invalid(text()),
            Failure::Overloaded { waiting: 1, limit: 2, retry_after_us: 3 },
            Failure::Deadline,
            Failure::Refused(text()),
            Failure::AlreadyApplied,
            Failure::Poisoned { uid: text(), reason: text() },
            Failure::Internal(text()),
            Failure::Stopping,
        ];
        for (number, failure) in failures.into_iter().enumerate() {
            let header = Header::Error { id: 6, failure };
            assert_eq!(first_bytes(&header, 3), [3, 6, number as u8]);
            assert_eq!(Header::decode(&header.encode().unwrap()[4..]).unwrap(), header);
        }
    }

    #[test]
    fn tensors_are_cut_from_the_body_without_a_copy() {
        let tensor = |n: usize, dtype: &str| Tensor {
            buffer: bytes(n),
            size: vec![n as u32],
            dtype: dtype.into(),
            compression: 4,
            requires_grad: true,
            chunks: 0,
        };
        let tensors = [tensor(40, "float32"), tensor(0, "int64"), tensor(7, "bool")];
        let (BodyHead::Tensors { uid, tensors: heads }, buffers) = BodyHead::of_tensors("e.0".into(), tensors.to_vec())
        else {
            panic!("tensors")
        };
        assert_eq!(buffers, tensors.each_ref().map(|tensor| tensor.buffer.clone()));
        assert_eq!(uid, "e.0");
        let body: Bytes = tensors.iter().flat_map(|tensor| tensor.buffer.to_vec()).collect::<Vec<_>>().into();
        let mut rest = body.clone();
        let back: Vec<Tensor> = heads.into_iter().map(|head| head.cut_from(&mut rest).unwrap()).collect();
        assert_eq!(back, tensors);
        assert_eq!(back[2].buffer.as_ptr(), body[40..].as_ptr());
        let long = TensorHead { dtype: String::new(), size: vec![], requires_grad: false, compression: 0, bytes: 1 };
        assert_eq!(long.cut_from(&mut rest), None);
    }

    #[test]
    fn a_text_of_any_length_fits_a_header() {
        let long = || "é".repeat(MAX_HEADER);
        for failure in [Failure::Internal(long()), Failure::Poisoned { uid: long(), reason: long() }] {
            let frame = Header::Error { id: u64::MAX, failure: failure.cut() }.encode().unwrap();
            assert!(frame.len() > MAX_TEXT - 4 && frame.len() < MAX_HEADER);
        }
    }

    #[test]
    fn a_header_over_the_limit_is_not_sent() {
        let tensor = Tensor { dtype: "float32".into(), size: vec![1; 4], ..Tensor::default() };
        let (body, _) = BodyHead::of_tensors("e.0".into(), vec![tensor; 5000]);
        let mut writer = Writer::new();
        let refused = writer.body(1, request(1, body), vec![], ());
        assert!(matches!(refused, Err(FrameError::TooLarge { limit: MAX_HEADER, .. })), "{refused:?}");
        assert!(writer.is_empty());
    }
}

mod writing {
    use super::*;

    #[test]
    fn small_frames_share_one_write_and_a_header_travels_with_its_body() {
        let mut writer = Writer::new();
        for id in 0..20 {
            writer.body(id, request(id, message(500)), vec![bytes(500)], ()).unwrap();
        }
        writer.body(20, request(20, message(100_000)), vec![bytes(100_000)], ()).unwrap();
        let first = write(&mut writer, usize::MAX);
        assert_eq!(first.len(), MAX_WRITE);
        let second = write(&mut writer, usize::MAX);
        assert!(second.len() > 90_000, "the rest is given from where it lies: {}", second.len());
        assert!(write(&mut writer, usize::MAX).is_empty() && writer.is_empty());
        assert_eq!(read_all(&[first, second].concat()).unwrap().len(), 42);
    }

    #[test]
    fn large_bodies_take_turns_and_controls_pass_them() {
        let mut writer = Writer::new();
        for id in [1, 2] {
            writer.body(id, answer(id, message(3 << 20)), vec![bytes(3 << 20)], ()).unwrap();
        }
        let mut wire = write(&mut writer, usize::MAX);
        writer.control(&Header::Credit { bytes: 9 }).unwrap();
        wire.extend(write_all(&mut writer));
        let mut at = 0;
        let mut order = Vec::new();
        while at < wire.len() {
            let length = u32::from_le_bytes(wire[at..at + 4].try_into().unwrap()) as usize;
            let header = Header::decode(&wire[at + 4..at + 4 + length]).unwrap();
            let (kind, body) = match header {
                Header::Answer(AnswerHead { id, bytes, .. }) => (id as i64, bytes),
                Header::Chunk { id, bytes } => (10 + id as i64, bytes),
                Header::Credit { .. } => (0, 0),
                other => panic!("{other:?}"),
            };
            assert!(body as usize <= MAX_CHUNK);
            order.push(kind);
            at += 4 + length + body as usize;
        }
        assert_eq!(order, [1, 0, 2, 11, 12, 11, 12]);
    }

    #[test]
    fn no_more_leaves_than_is_allowed() {
        let mut writer = Writer::new();
        writer.body(1, request(1, message(WINDOW)), vec![bytes(WINDOW)], ()).unwrap();
        writer.body(2, request(2, message(100)), vec![bytes(100)], ()).unwrap();
        let mut wire = write_all(&mut writer);
        assert!(!writer.is_empty());
        // Controls go on.
        writer.control(&Header::Cancel { id: 9 }).unwrap();
        wire.extend(write_all(&mut writer));
        let mut reader = Reader::new();
        let events = read(&mut reader, &wire, usize::MAX).unwrap();
        assert_eq!(events.last(), Some(&Event::Cancel(9)));
        let allowed = reader.take_credit().unwrap();
        assert_eq!((allowed as usize, reader.take_credit()), (WINDOW, None));
        writer.allow(allowed as usize);
        let rest = read(&mut reader, &write_all(&mut writer), usize::MAX).unwrap();
        assert!(matches!(&rest[..], [Event::Body { id: 1, bytes: all }] if *all == bytes(WINDOW)));
        assert!(writer.is_empty());
    }

    #[test]
    fn a_cancelled_body_stops_between_two_frames() {
        let mut writer = Writer::new();
        writer.body(1, request(1, message(4 << 20)), vec![bytes(4 << 20)], ()).unwrap();
        writer.body(2, request(2, message(5)), vec![bytes(5)], ()).unwrap();
        writer.body(3, request(3, message(5)), vec![bytes(5)], ()).unwrap();
        let mut wire = write(&mut writer, 20_000);
        assert!(!writer.cancel(1), "it has begun");
        assert!(writer.cancel(2), "nothing of it has left");
        assert!(!writer.cancel(2));
        writer.control(&Header::Cancel { id: 1 }).unwrap();
        wire.extend(write_all(&mut writer));
        assert!(wire.len() < (1 << 20) + 1000);
        let events = read_all(&wire).unwrap();
        assert!(
            matches!(
                &events[..],
                [
                    Event::Request(RequestHead { id: 1, .. }),
                    Event::Cancel(1),
                    Event::Request(RequestHead { id: 3, .. }),
                    Event::Body { id: 3, .. }
                ]
            ),
            "{events:?}"
        );
    }

    #[test]
    fn a_guard_is_dropped_when_the_last_byte_was_written_and_not_before() {
        let guard = std::rc::Rc::new(());
        let alive = || std::rc::Rc::strong_count(&guard) - 1;
        let mut writer = Writer::new();
        writer.body(1, answer(1, message(10)), vec![bytes(10)], guard.clone()).unwrap();
        writer.body(2, answer(2, message(100_000)), vec![bytes(60_000), bytes(40_000)], guard.clone()).unwrap();
        writer.body(3, answer(3, message(2 << 20)), vec![bytes(2 << 20)], guard.clone()).unwrap();
        write(&mut writer, 100);
        assert_eq!(alive(), 3);
        while alive() == 3 {
            assert!(!write(&mut writer, 1000).is_empty());
        }
        assert_eq!(alive(), 2, "the first is out with the first write");
        writer.cancel(3);
        assert_eq!(alive(), 1);
        write_all(&mut writer);
        assert_eq!(alive(), 0);
    }
}

mod hostile {
    use super::*;

    fn oversize(length: u32) -> Vec<u8> {
        [&length.to_le_bytes()[..], &[0; 64]].concat()
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_allocated() {
        for length in [MAX_HEADER as u32 + 1, u32::MAX] {
            let error = read_all(&oversize(length)).unwrap_err();
            assert_eq!(error, FrameError::TooLarge { size: length.into(), limit: MAX_HEADER });
        }
        let mut reader = Reader::new();
        read(&mut reader, &(MAX_HEADER as u32).to_le_bytes(), 4).unwrap();
        assert!(reader.space().len() <= 16 << 10);
    }

    #[test]
    fn an_announced_body_costs_nothing_until_it_comes() {
        let mut reader = Reader::new();
        let mut head = request(1, message(1 << 40));
        if let Header::Request(head) = &mut head {
            head.bytes = 100_000;
        }
        read(&mut reader, &raw_frame(&head, &[]), usize::MAX).unwrap();
        assert_eq!(reader.arriving(), 1);
        assert!(reader.space().len() <= 100_000);
        let absurd = read_all(&raw_frame(&request(1, message(usize::MAX)), &[]));
        assert!(matches!(absurd, Err(FrameError::TooLarge { .. })), "{absurd:?}");
    }

    #[test]
    fn a_large_body_is_read_into_the_memory_of_an_earlier_one() {
        let pool = Pool::new(64 << 20);
        let mut reader = Reader::with_pool(pool.clone());
        let send = |reader: &mut Reader, id: u64, size: usize, byte: u8| {
            let mut writer = Writer::new();
            writer.body(id, request(id, message(size)), vec![vec![byte; size].into()], ()).unwrap();
            let mut events = read(reader, &write_all(&mut writer), usize::MAX).unwrap();
            reader.take_credit();
            let Some(Event::Body { bytes, .. }) = events.pop() else { panic!("a body: {events:?}") };
            bytes
        };
        let first = send(&mut reader, 1, 6 << 20, 1);
        let (at, size) = (first.as_ptr(), first.len());
        let while_it_is_held = send(&mut reader, 2, size, 2);
        assert!(first.iter().all(|byte| *byte == 1) && while_it_is_held.iter().all(|byte| *byte == 2));
        drop(first);
        let shorter = send(&mut reader, 3, size - 7, 3);
        assert_eq!((shorter.as_ptr(), shorter.len()), (at, size - 7));
        assert!(shorter.iter().all(|byte| *byte == 3), "nothing of the earlier body is left");
    }

    #[test]
    fn a_body_that_never_ends_gives_its_memory_back() {
        let pool = Pool::new(64 << 20);
        let mut reader = Reader::with_pool(pool.clone());
        let begin = |id: u64| {
            let mut head = request(id, message(1 << 20));
            if let Header::Request(head) = &mut head {
                head.bytes = 100;
            }
            raw_frame(&head, &[0; 100])
        };
        read(&mut reader, &begin(1), usize::MAX).unwrap();
        assert_eq!(pool.kept(), 0);
        read(&mut reader, &raw_frame(&Header::Cancel { id: 1 }, &[]), usize::MAX).unwrap();
        assert_eq!(pool.kept(), 1 << 20);
        read(&mut reader, &begin(2), usize::MAX).unwrap();
        assert_eq!(pool.kept(), 0);
        drop(reader);
        assert_eq!(pool.kept(), 1 << 20);
    }

    #[test]
    fn sizes_that_overflow_together_are_refused() {
        let tensor =
            TensorHead { dtype: "bool".into(), size: vec![], requires_grad: false, compression: 0, bytes: u64::MAX };
        let body = BodyHead::Tensors { uid: "e.0".into(), tensors: vec![tensor; 3] };
        assert!(matches!(read_all(&raw_frame(&request(1, body), &[])), Err(FrameError::TooLarge { .. })));
    }

    #[test]
    fn more_bytes_than_announced_or_allowed_are_refused() {
        let begin = raw_frame(&request(1, message(10)), &[]);
        let over = [begin.clone(), raw_frame(&Header::Chunk { id: 1, bytes: 11 }, &[0; 11])].concat();
        assert_eq!(read_all(&over).unwrap_err(), FrameError::OverBody { id: 1, bytes: 11, left: 10 });
        let long = Header::Chunk { id: 1, bytes: MAX_CHUNK as u32 + 1 };
        assert!(matches!(read_all(&raw_frame(&long, &[])), Err(FrameError::TooLarge { limit: MAX_CHUNK, .. })));
        // Bytes of no body count too.
        let chunk = raw_frame(&Header::Chunk { id: 8, bytes: MAX_CHUNK as u32 }, &vec![0; MAX_CHUNK]);
        let mut reader = Reader::new();
        for _ in 0..WINDOW / MAX_CHUNK {
            read(&mut reader, &chunk, usize::MAX).unwrap();
        }
        let error = read(&mut reader, &chunk, usize::MAX).unwrap_err();
        assert_eq!(error, FrameError::OverCredit { bytes: MAX_CHUNK, credit: 0 });
    }

    #[test]
    fn a_number_in_use_is_refused() {
        let begin = raw_frame(&request(1, message(10)), &[]);
        assert_eq!(read_all(&[begin.clone(), begin].concat()).unwrap_err(), FrameError::Duplicate(1));
    }

    #[test]
    fn an_unknown_kind_or_bytes_behind_the_header_are_refused() {
        for header in [&[99, 0][..], &[6, 1, 0], &[], &[1, 1, 77]] {
            let wire = [&(header.len() as u32).to_le_bytes()[..], header].concat();
            assert!(matches!(read_all(&wire), Err(FrameError::Header(_))), "{header:?}");
        }
    }

    #[test]
    fn a_refused_body_is_read_and_forgotten() {
        let mut reader = Reader::new();
        let mut writer = Writer::new();
        writer.body(1, request(1, message(3 << 20)), vec![bytes(3 << 20)], ()).unwrap();
        writer.body(2, request(2, message(4)), vec![bytes(4)], ()).unwrap();
        let wire = write_all(&mut writer);
        let mut events = read(&mut reader, &wire[..100], 100).unwrap();
        reader.refuse(1);
        events.extend(read(&mut reader, &wire[100..], 9999).unwrap());
        assert!(
            matches!(
                &events[..],
                [
                    Event::Request(RequestHead { id: 1, .. }),
                    Event::Request(RequestHead { id: 2, .. }),
                    Event::Body { id: 2, .. }
                ]
            ),
            "{events:?}"
        );
        assert_eq!(reader.arriving(), 0);
        reader.finish().unwrap();
    }

    #[test]
    fn an_end_inside_a_frame_or_a_body_is_an_error() {
        let mut writer = Writer::new();
        writer.body(1, request(1, message(40_000)), vec![bytes(40_000)], ()).unwrap();
        let wire = write_all(&mut writer);
        for cut in [1, 3, 10, 100, 20_000, wire.len() - 1] {
            let mut reader = Reader::new();
            read(&mut reader, &wire[..cut], usize::MAX).unwrap();
            assert!(matches!(reader.finish(), Err(FrameError::Truncated { .. })), "cut at {cut}");
        }
    }
}

fn any_body() -> impl Strategy<Value = (usize, bool)> {
    (prop_oneof![0usize..40, 0usize..30_000, Just(MAX_CHUNK + 5)], any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_in_any_pieces_is_read_in_any_pieces(
        bodies in prop::collection::vec(any_body(), 0..12),
        write_step in prop_oneof![1usize..200, Just(usize::MAX)],
        read_step in prop_oneof![1usize..200, Just(usize::MAX)],
    ) {
        let mut writer = Writer::new();
        for (id, (size, split)) in bodies.iter().enumerate() {
            let id = id as u64;
            let body = bytes(*size);
            let segments = if *split { vec![body.slice(..size / 3), body.slice(size / 3..)] } else { vec![body] };
            let head = if id.is_multiple_of(2) { request(id, message(*size)) } else { answer(id, message(*size)) };
            writer.body(id, head, segments, ()).unwrap();
            writer.control(&Header::Cancel { id: 1000 + id }).unwrap();
        }
        let mut wire = Vec::new();
        loop {
            let next = write(&mut writer, write_step);
            if next.is_empty() {
                break;
            }
            wire.extend(next);
        }
        let mut reader = Reader::new();
        let events = read(&mut reader, &wire, read_step).unwrap();
        reader.finish().unwrap();
        let complete = events.iter().filter_map(|event| match event {
            Event::Body { id, bytes } => Some((*id, bytes.clone())),
            _ => None,
        });
        let mut complete: Vec<_> = complete.collect();
        complete.sort_by_key(|(id, _)| *id);
        let expected: Vec<_> = bodies.iter().enumerate().map(|(id, (size, _))| (id as u64, bytes(*size))).collect();
        prop_assert!(complete == expected);
    }

    #[test]
    fn foreign_bytes_are_an_error_or_nothing(wire in prop::collection::vec(any::<u8>(), 0..400), step in 1usize..64) {
        // A small first byte and zeros make lengths that pass the first check.
        let mut plausible = vec![wire.len().min(60) as u8, 0, 0, 0];
        plausible.extend(&wire);
        for bytes in [wire, plausible] {
            let _typed_error = read(&mut Reader::new(), &bytes, step);
        }
    }

    #[test]
    fn a_flipped_byte_is_an_error_or_another_message(at in 0usize..300, value in any::<u8>()) {
        let mut writer = Writer::new();
        let tensor = Tensor { buffer: bytes(100), size: vec![5, 5], dtype: "float32".into(), ..Tensor::default() };
        let (body, buffers) = BodyHead::of_tensors("ffn.1".into(), vec![tensor]);
        writer.body(1, request(1, body), buffers, ()).unwrap();
        writer.body(2, answer(2, message(50)), vec![bytes(50)], ()).unwrap();
        let mut wire = write_all(&mut writer);
        let at = at % wire.len();
        wire[at] = value;
        let _typed_error = read_all(&wire);
    }
}
