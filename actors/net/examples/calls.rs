//! How fast calls travel, without experts: a second process answers each call with what it was sent.
//!
//! ```text
//! cargo run --release -p skep-net --example calls -- [--bytes 4096] [--seconds 3] [--noise] [--hivemind]
//! ```
//!
//! Prints calls per second, megabytes per second (both directions together) and percentiles of one call's time, with one
//! call at a time and with 64, and the processor time of a call in both processes together, which other work on the
//! machine hardly changes. `--noise` leaves TLS out, `--hivemind` the native wire.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, executor::block_on, future::BoxFuture, stream::FuturesUnordered};
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, SharedClock, TokioClock};
use skep_net::{Net, NetConfig, identity, parse_peer_address};
use skep_rpc::{Answer, Body, Call, Inbound, Meta, RequestId, Router, ServeError, Service, TensorBody, Transport as _};
use skep_wire::{Method, proto::runtime::Tensor};

type Failure = Box<dyn std::error::Error>;

struct Echo;

impl Service for Echo {
    fn serve(&self, inbound: Inbound) -> BoxFuture<'static, Result<Answer, ServeError>> {
        Box::pin(async move { Ok(Answer { body: inbound.body, load: None }) })
    }
}

/// The server's process; it ends with us.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

struct Options {
    bytes: usize,
    seconds: f64,
    native: bool,
    tls: bool,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| arguments.iter().skip_while(|argument| *argument != name).nth(1);
    let options = Options {
        bytes: value("--bytes").map_or(Ok(4096), |text| text.parse())?,
        seconds: value("--seconds").map_or(Ok(3.0), |text| text.parse())?,
        native: !has("--hivemind"),
        tls: !has("--noise"),
    };
    if has("--serve") { serve(&options) } else { measure(&options, &arguments) }
}

fn config(options: &Options, base: NetConfig) -> NetConfig {
    NetConfig { native: options.native, tls: options.tls, ..base }
}

fn start(config: NetConfig, router: Router) -> Result<(Net, SharedClock), Failure> {
    let clock: SharedClock = Arc::new(TokioClock::system());
    let identity = identity::generate(identity::KeyKind::Ed25519)?.keypair().clone();
    Ok((Net::start(config, identity, router, clock.clone())?, clock))
}

fn serve(options: &Options) -> Result<(), Failure> {
    let router = Router::new();
    router.route(&Method::ALL, Arc::new(Echo));
    let (net, _clock) = start(config(options, NetConfig::default()), router)?;
    println!("{}", net.addresses()[0]);
    // Until whoever started us goes.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn measure(options: &Options, arguments: &[String]) -> Result<(), Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--serve").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut server = Server(command.spawn()?);
    let mut address = String::new();
    BufReader::new(server.0.stdout.take().ok_or("the server has no output")?).read_line(&mut address)?;
    let (peer, address) = parse_peer_address(&address)?;

    let (net, clock) = start(config(options, NetConfig::client()), Router::new())?;
    net.add_addresses(peer, vec![address]);
    let tensor = Tensor {
        buffer: vec![1; options.bytes].into(),
        size: vec![1, u32::try_from(options.bytes / 4)?],
        dtype: "float32".to_owned(),
        ..Tensor::default()
    };
    let call = |deadline| {
        let body = Body::Tensors(TensorBody { uid: "nop.0".to_owned(), tensors: vec![tensor.clone()] });
        let meta = Meta { deadline, request_id: RequestId(u128::MAX / 3), trace: None };
        net.call(Call { peer, method: Method::Forward, body, meta })
    };
    for in_flight in [1, 64] {
        // The first calls make the connection and warm up.
        run(&clock, peer, in_flight, Duration::from_millis(300), &call)?;
        let before = processor_time(server.0.id());
        let times = run(&clock, peer, in_flight, Duration::from_secs_f64(options.seconds), &call)?;
        let busy = processor_time(server.0.id()).zip(before).map(|(after, before)| after - before);
        let busy = busy.map_or("?".to_owned(), |seconds| format!("{:.0}", seconds * 1e6 / times.len() as f64));
        let rate = times.len() as f64 / options.seconds;
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_nanos() as f64 / 1000.0;
        println!(
            "{:>8} bytes, {in_flight:>2} in flight: {rate:>8.0} calls/s, {:>7.1} MB/s, p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs, processor {busy} µs a call",
            options.bytes,
            rate * 2e-6 * options.bytes as f64,
            at(0.5),
            at(0.99),
            at(0.999),
        );
    }
    let status = net.status();
    println!("{} of {} calls on the native wire", status.calls_out_native, status.calls_out);
    Ok(())
}

/// Seconds that this process and another one have kept a processor busy. Linux only.
fn processor_time(other: u32) -> Option<f64> {
    let of = |process: String| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // Behind the command's name: the 12th and 13th field are user and system time in hundredths.
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    Some((of("self".to_owned())? + of(other.to_string())?) / 100.0)
}

/// The sorted times of calls made for so long, always as many at once.
fn run(
    clock: &SharedClock,
    peer: PeerId,
    in_flight: usize,
    length: Duration,
    call: &impl Fn(Deadline) -> BoxFuture<'static, Result<Answer, skep_rpc::RpcError>>,
) -> Result<Vec<Duration>, Failure> {
    let end = clock.now() + length;
    let one = || async move {
        let begin = clock.now();
        let answer = call(Deadline::after(begin, Duration::from_secs(30))).await;
        answer.map(|_| clock.now() - begin).map_err(|error| format!("calling {peer}: {error}"))
    };
    let mut times = block_on(async {
        let mut times = Vec::new();
        let mut calls: FuturesUnordered<_> = (0..in_flight).map(|_| one()).collect();
        while let Some(time) = calls.next().await {
            times.push(time?);
            if clock.now() < end {
                calls.push(one());
            }
        }
        Ok::<_, String>(times)
    })?;
    times.sort_unstable();
    Ok(times)
}
