use bytes::Bytes;
use proptest::prelude::*;
use serde_json::Value as Json;
use skep_wire::{CodecError, Compression, DType, HostTensor, compress, decompress, proto::runtime::Tensor};

use crate::support::{unbase64, vectors};

fn cases() -> Vec<Json> {
    vectors("tensors.json")["cases"].as_array().unwrap().clone()
}

fn numbers(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

fn codec(case: &Json) -> Compression {
    Compression::from_name(case["compression"].as_str().unwrap()).unwrap()
}

fn input(case: &Json) -> HostTensor {
    let dtype = DType::from_name(case["input_dtype"].as_str().unwrap()).unwrap();
    let shape: Vec<usize> = numbers(&case["shape"]).into_iter().map(|d| d as usize).collect();
    HostTensor::new(dtype, shape, unbase64(&case["input_b64"])).unwrap()
}

fn message(case: &Json) -> Tensor {
    let pb = &case["pb"];
    Tensor {
        buffer: unbase64(&pb["buffer_b64"]),
        size: numbers(&pb["size"]),
        requires_grad: pb["requires_grad"].as_bool().unwrap(),
        dtype: pb["dtype"].as_str().unwrap().to_owned(),
        compression: pb["compression"].as_i64().unwrap() as i32,
        chunks: 0,
    }
}

fn decoded(case: &Json) -> HostTensor {
    let dtype = DType::from_name(case["decoded_dtype"].as_str().unwrap()).unwrap();
    HostTensor::new(dtype, input(case).shape(), unbase64(&case["decoded_b64"])).unwrap()
}

/// Values of any dtype, for comparisons.
fn values(tensor: &HostTensor) -> Vec<f64> {
    let data = tensor.data();
    match tensor.dtype() {
        DType::F32 => tensor.to_f32().unwrap().into_iter().map(f64::from).collect(),
        DType::F64 => tensor.to_f64().unwrap(),
        DType::I64 => tensor.to_i64().unwrap().into_iter().map(|n| n as f64).collect(),
        DType::F16 => data.chunks(2).map(|c| half::f16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
        DType::BF16 => data.chunks(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f64()).collect(),
        other => panic!("no comparison for {other}"),
    }
}

#[test]
fn every_recorded_message_decodes_to_what_python_decodes() {
    for case in cases().iter().filter(|case| case.get("error").is_none()) {
        let (got, expected) = (decompress(&message(case)).unwrap(), decoded(case));
        let name = format!("{} {}", case["compression"], case["name"]);
        if codec(case) == Compression::MeanStd16 {
            // For float16 Python rounds after multiplying and again after adding.
            let tolerance = if got.dtype() == DType::F16 { 1e-3 } else { 1e-6 };
            assert_eq!((got.dtype(), got.shape()), (expected.dtype(), expected.shape()), "{name}");
            for (a, b) in values(&got).into_iter().zip(values(&expected)) {
                assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{name}: {a} {b}");
            }
        } else {
            assert_eq!(got, expected, "{name}");
        }
    }
}

#[test]
fn what_python_refuses_to_encode_is_refused() {
    let mut refused = 0;
    for case in cases().iter().filter(|case| case.get("error").is_some()) {
        let tensor = input(case);
        let error = CodecError::Unsupported { compression: codec(case), dtype: tensor.dtype() };
        assert_eq!(compress(&tensor, codec(case)), Err(error));
        refused += 1;
    }
    assert_eq!(refused, 6);
}

#[test]
fn exact_codecs_write_pythons_bytes() {
    for case in cases().iter().filter(|case| case.get("error").is_none()) {
        let is_legacy = !case["name"].as_str().unwrap().contains("USE_LEGACY_BFLOAT16=0");
        if is_legacy && matches!(codec(case), Compression::None | Compression::Float16) {
            let expected = Tensor { requires_grad: false, ..message(case) };
            assert_eq!(compress(&input(case), codec(case)).unwrap(), expected, "{}", case["name"]);
        }
    }
}

/// Python's own error is the yardstick: sums in another order give other codebooks, not worse ones.
#[test]
fn lossy_codecs_lose_no_more_than_pythons() {
    let lossy = |case: &&Json| codec(case) != Compression::None && case.get("error").is_none();
    for case in cases().iter().filter(lossy) {
        let tensor = input(case);
        let ours = decompress(&compress(&tensor, codec(case)).unwrap()).unwrap();
        let error = |t: &HostTensor| {
            let squares = values(t).into_iter().zip(values(&tensor)).map(|(a, b)| (a - b) * (a - b));
            squares.sum::<f64>().sqrt()
        };
        let allowed = 1.02 * error(&decoded(case)) + 1e-4;
        assert!(error(&ours) <= allowed, "{} {}: {} > {allowed}", case["compression"], case["name"], error(&ours));
    }
}

#[test]
fn the_dynamic_code_is_bitsandbytes() {
    let case = cases().into_iter().find(|c| c["name"] == "blockwise two blocks 4096+704").unwrap();
    let recorded = message(&case).buffer;
    let ours = compress(&input(&case), Compression::Blockwise8).unwrap().buffer;
    let code = |buffer: &Bytes| -> Vec<f32> {
        buffer[24..24 + 1024].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    };
    assert_eq!(ours.len(), recorded.len());
    assert_eq!(ours[..24], recorded[..24], "block count, code length and scales");
    for (a, b) in code(&ours).into_iter().zip(code(&recorded)) {
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
    }
}

#[test]
fn uniform_keeps_the_mean() {
    let tensor = HostTensor::from_f32([1000], &(0..1000).map(|i| 5.0 + (i % 10) as f32 / 100.0).collect::<Vec<_>>());
    let decoded = decompress(&compress(&tensor.unwrap(), Compression::Uniform8).unwrap()).unwrap();
    let mean = decoded.to_f32().unwrap().iter().sum::<f32>() / 1000.0;
    assert!((mean - 5.045).abs() < 1e-3, "{mean}");
}

#[test]
fn quantiles_of_a_large_tensor_lose_less_than_a_hundredth() {
    let wave: Vec<f32> = (0..300_000).map(|i| (i as f32 * 0.37).sin()).collect();
    let tensor = HostTensor::from_f32([300_000], &wave).unwrap();
    let decoded = decompress(&compress(&tensor, Compression::Quantile8).unwrap()).unwrap().to_f32().unwrap();
    let square: f32 = decoded.iter().zip(&wave).map(|(a, b)| (a - b) * (a - b)).sum();
    assert!((square / 300_000.0).sqrt() < 0.01);
}

#[test]
fn uncompressed_tensors_are_not_copied() {
    let tensor = HostTensor::zeros(DType::F32, [100, 100]).unwrap();
    let message = compress(&tensor, Compression::None).unwrap();
    assert_eq!(message.buffer.as_ptr(), tensor.data().as_ptr());
    assert_eq!(decompress(&message).unwrap().data().as_ptr(), tensor.data().as_ptr());
}

#[test]
fn odd_tensors_pass_every_codec_or_are_refused() {
    for compression in Compression::ALL {
        for shape in [&[][..], &[0], &[0, 4], &[4, 0], &[1], &[1, 1, 1], &[5000]] {
            for special in [0.0, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE, f32::MAX] {
                let tensor = HostTensor::from_f32(shape, &vec![special; shape.iter().product()]).unwrap();
                match compress(&tensor, compression) {
                    Ok(message) => assert_eq!(decompress(&message).unwrap().shape(), shape, "{compression:?}"),
                    Err(error) => {
                        assert!(
                            matches!(error, CodecError::Shape { .. }) && matches!(shape, [] | [.., 0]),
                            "{compression:?} {error}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_message_that_contradicts_itself_is_refused() {
    let good = compress(&HostTensor::zeros(DType::F32, [2, 3]).unwrap(), Compression::None).unwrap();
    let refused = |tensor: Tensor| decompress(&tensor).unwrap_err();
    assert_eq!(refused(Tensor { compression: 9, ..good.clone() }), CodecError::UnknownCompression(9));
    assert_eq!(refused(Tensor { compression: -1, ..good.clone() }), CodecError::UnknownCompression(-1));
    let dtype = "complex64".to_owned();
    assert_eq!(refused(Tensor { dtype: dtype.clone(), ..good.clone() }), CodecError::UnknownDType(dtype));
    let malformed = |tensor: Tensor| assert!(matches!(refused(tensor), CodecError::Malformed(_)));
    malformed(Tensor { size: vec![2, 4], ..good.clone() });
    malformed(Tensor { size: vec![u32::MAX; 3], ..good.clone() });
    malformed(Tensor { size: vec![1; 65], ..good.clone() });
    malformed(Tensor { buffer: good.buffer.slice(1..), ..good.clone() });
    malformed(Tensor { dtype: "bool".to_owned(), buffer: vec![0, 1, 2, 0, 0, 0].into(), ..good.clone() });
    for code in 1..=5 {
        malformed(Tensor { compression: code, buffer: vec![0xff; 24].into(), ..good.clone() });
    }
    malformed(Tensor { compression: 1, size: vec![u32::MAX, 0], buffer: vec![0; 8].into(), ..good });
}

#[test]
fn an_index_without_a_codebook_entry_is_refused() {
    let mut buffer = 2i64.to_le_bytes().to_vec();
    buffer.extend([1f32, 2f32].iter().flat_map(|v| v.to_le_bytes()));
    buffer.extend([0, 1, 2]);
    let message =
        Tensor { buffer: buffer.into(), size: vec![3], dtype: "float32".into(), compression: 3, ..Tensor::default() };
    assert!(matches!(decompress(&message), Err(CodecError::Malformed(_))));
    let short = Tensor { buffer: message.buffer.slice(..18), size: vec![2], ..message };
    assert_eq!(decompress(&short).unwrap().to_f32().unwrap(), [1.0, 2.0]);
}

#[test]
fn codecs_are_named_and_numbered_as_in_hivemind() {
    for (code, compression) in Compression::ALL.into_iter().enumerate() {
        assert_eq!(Compression::try_from(code as i32), Ok(compression));
        assert_eq!(Compression::from_name(compression.name()), Some(compression));
    }
    assert_eq!(Compression::try_from(6), Err(CodecError::UnknownCompression(6)));
}

proptest! {
    #[test]
    fn uncompressed_tensors_of_every_dtype_survive(dtype in prop::sample::select(&DType::ALL[..]), rows in 0usize..6) {
        let tensor = HostTensor::zeros(dtype, [rows, 3]).unwrap();
        prop_assert_eq!(decompress(&compress(&tensor, Compression::None).unwrap()).unwrap(), tensor);
    }

    #[test]
    fn lossy_codecs_stay_close(values in prop::collection::vec(-100f32..100f32, 8..200)) {
        let width = values.len() / 2;
        let tensor = HostTensor::from_f32([2, width], &values[..2 * width]).unwrap();
        for (compression, tolerance) in [(Compression::Float16, 0.1), (Compression::MeanStd16, 0.2), (Compression::Blockwise8, 3.0)] {
            let decoded = decompress(&compress(&tensor, compression).unwrap()).unwrap().to_f32().unwrap();
            for (a, b) in decoded.iter().zip(&values) {
                prop_assert!((a - b).abs() <= tolerance, "{:?}: {} {}", compression, a, b);
            }
        }
    }
}
