//! The parts that every call passes, each alone: `cargo bench -p skep --bench parts`, and with `-- --test` once only, to
//! see that they work. What whole calls cost is measured by `skep bench`.

use std::{hint::black_box, time::Duration};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libp2p_identity::Keypair;
use skep::{
    dht::{
        DhtId,
        probe::{Network, Records},
    },
    kernel::{BatchMailbox, Capacity, Key, Moment, ReadyToken, Rows},
    moe::probe::Fan,
    wire::{
        Compression, HostTensor, Method, compress, decompress,
        frame::native::{BodyHead, Event, Header, Reader, RequestHead, Writer},
    },
};

fn tensor(rows: usize, width: usize) -> HostTensor {
    let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect();
    HostTensor::from_f32([rows, width], &values).expect("rows × width values")
}

fn codecs(criterion: &mut Criterion) {
    let tensor = tensor(32, 512);
    let codecs = [
        ("none", Compression::None),
        ("float16", Compression::Float16),
        ("meanstd16", Compression::MeanStd16),
        ("uniform8", Compression::Uniform8),
        ("quantile8", Compression::Quantile8),
        ("blockwise8", Compression::Blockwise8),
    ];
    for direction in ["compress", "decompress"] {
        let mut group = criterion.benchmark_group(direction);
        group.throughput(Throughput::Bytes(tensor.data().len() as u64));
        for (name, codec) in codecs {
            let packed = compress(&tensor, codec).expect("finite numbers");
            group.bench_function(name, |bench| match direction {
                "compress" => bench.iter(|| compress(black_box(&tensor), codec)),
                _ => bench.iter(|| decompress(black_box(&packed))),
            });
        }
        group.finish();
    }
}

/// A call from its header and body to the bytes of the wire and back.
fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("native_frame");
    for size in [256, 64 << 10, 8 << 20] {
        let body = Bytes::from(vec![7; size]);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bench| bench.iter(|| there_and_back(&body)));
    }
    group.finish();
}

fn there_and_back(body: &Bytes) -> Bytes {
    let head = RequestHead {
        id: 1,
        method: Method::Forward,
        wait_us: 1_000_000,
        request_id: 7,
        trace: None,
        body: BodyHead::Message { bytes: body.len() as u64 },
        bytes: 0,
    };
    let (mut writer, mut reader) = (Writer::new(), Reader::new());
    writer.body(1, Header::Request(head), vec![body.clone()], ()).expect("a small header");
    loop {
        let bytes = writer.next_bytes();
        let space = reader.space();
        let n = bytes.len().min(space.len());
        space[..n].copy_from_slice(&bytes[..n]);
        writer.wrote(n);
        reader.filled(n);
        while let Some(event) = reader.next_event().expect("what was written is well formed") {
            if let Event::Body { bytes, .. } = event {
                return bytes;
            }
        }
        // The other side would allow more on the wire.
        if let Some(credit) = reader.take_credit() {
            writer.allow(credit as usize);
        }
    }
}

/// Rows of callers in and a batch out, as an executor does it.
fn batching(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mailbox");
    for tasks in [1, 64] {
        let mailbox = BatchMailbox::new(Capacity { rows: Rows(4096), bytes: 1 << 30 });
        let token = ReadyToken::new();
        group.throughput(Throughput::Elements(tasks));
        group.bench_function(BenchmarkId::new("push_and_take", tasks), |bench| {
            bench.iter(|| {
                let mut queued = false;
                for task in 0..tasks {
                    let pushed = mailbox.try_push(Moment::START, task, Rows(1), 256, Key(1));
                    assert!(pushed.is_ok());
                    queued |= token.on_push();
                }
                assert!(queued && token.on_take());
                let taken = mailbox.take(Rows(4096), |_| true);
                assert!(!token.on_finish(false));
                taken.batch.len()
            });
        });
    }
    for lanes in [4, 64] {
        let mailbox = BatchMailbox::new(Capacity { rows: Rows(4096), bytes: 1 << 30 });
        group.throughput(Throughput::Elements(lanes));
        group.bench_function(BenchmarkId::new("take_from_lanes", lanes), |bench| {
            bench.iter(|| {
                // One task a lane: as many shapes wait as there are lanes, and each is a batch.
                for lane in 0..lanes {
                    let pushed = mailbox.try_push(Moment::START, lane, Rows(1), 256, Key(lane));
                    assert!(pushed.is_ok());
                }
                (0..lanes).map(|_| mailbox.take(Rows(4096), |_| true).batch.len()).sum::<usize>()
            });
        });
    }
    group.finish();
}

/// Answers of a mixture's calls until the batch is complete.
fn fan_outs(criterion: &mut Criterion) {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    let mut group = criterion.benchmark_group("fan_out");
    for (rows, k, experts) in [(32, 4, 16), (2048, 4, 256)] {
        let name = format!("{rows} rows, {k} of {experts} experts");
        let fan = Fan::plan(peer, rows, k, experts);
        group.throughput(Throughput::Elements((rows * k) as u64));
        group.bench_function(BenchmarkId::new("plan", &name), |bench| bench.iter(|| Fan::plan(peer, rows, k, experts)));
        group.bench_function(BenchmarkId::new("join", &name), |bench| bench.iter(|| fan.join()));
    }
    group.finish();
}

/// The DHT's decisions, without calls.
fn dht(criterion: &mut Criterion) {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    let network = Network::of(peer, 1000);
    let key = DhtId::of_text("expert.0");
    let near = network.nearest(&key);
    let mut group = criterion.benchmark_group("dht");
    group.throughput(Throughput::Elements(network.lookup(key, &near) as u64));
    group.bench_function("steps_of_a_lookup", |bench| bench.iter(|| network.lookup(black_box(key), &near)));
    let (mut records, mut now) = (Records::none(), 0.0);
    let (subkey, value) = (Bytes::from_static(b"expert.0"), Bytes::from_static(&[7; 64]));
    group.throughput(Throughput::Elements(1));
    group.bench_function("store", |bench| {
        bench.iter(|| {
            now += 1.0;
            assert!(records.store(now, black_box(key), subkey.clone(), value.clone()));
        });
    });
    group.finish();
}

/// Parts of callers become one batch, and its result parts again.
fn joining(criterion: &mut Criterion) {
    let parts: Vec<HostTensor> = (0..4).map(|_| tensor(32, 512)).collect();
    let whole = HostTensor::concat_rows(&parts).expect("equal widths");
    let order: Vec<usize> = (0..128).rev().collect();
    let mut group = criterion.benchmark_group("rows");
    group.throughput(Throughput::Bytes(whole.data().len() as u64));
    group.bench_function("concat", |bench| bench.iter(|| HostTensor::concat_rows(black_box(&parts))));
    group.bench_function("slice", |bench| bench.iter(|| black_box(&whole).slice_rows(32, 64)));
    group.bench_function("gather", |bench| bench.iter(|| black_box(&whole).gather_rows(&order)));
    group.finish();
}

criterion_group! {
    name = parts;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = codecs, frames, batching, joining, fan_outs, dht
}
criterion_main!(parts);
