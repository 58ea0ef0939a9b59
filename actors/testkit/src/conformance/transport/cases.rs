//! The cases of the suite.

use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, join, join_all, select};
use libp2p_identity::{Keypair, PeerId};
use skep_kernel::Deadline;
use skep_rpc::{Body, Call, Meta, RequestId, Router, RpcError};
use skep_wire::Method;

use super::{
    Connected, Factory, PATIENCE,
    services::{Echo, Failing, Slow, router},
    tensors,
};

/// What a real network may add to a deadline.
const LATE: Duration = Duration::from_millis(500);
/// More than one message may have on any wire.
const HUGE: usize = 65 << 20;

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn message(text: String) -> Body {
    Body::Message(text.into())
}

/// A pair whose callee is slow on the clock of the pair, which a first pair tells.
async fn slow_pair(make: &impl Factory, takes: Duration) -> (Slow, Connected) {
    let clock = make.connect(Router::new()).await.clock.clone();
    let slow = Slow::new(clock, takes);
    let pair = make.connect(router(slow.clone())).await;
    (slow, pair)
}

/// Calls that follow each other arrive in their order; of calls at the same time each gets its own answer.
pub async fn ordering(make: &impl Factory) {
    let echo = Echo::default();
    let pair = make.connect(router(echo.clone())).await;
    let bodies: Vec<Body> = (0..32).map(|number| message(format!("call {number}"))).collect();
    for body in &bodies {
        let answer = pair.call(PATIENCE, Method::Ping, body.clone()).await.expect("it is served");
        assert_eq!(answer.body, *body);
    }
    assert_eq!(echo.heard(), bodies);
    let sizes = (0..32).map(|n| 4 * (1 + n * 997 % 4096));
    let answers = join_all(sizes.clone().map(|size| pair.call(PATIENCE, Method::Forward, tensors(size)))).await;
    for (size, answer) in sizes.zip(answers) {
        assert_eq!(answer.expect("it is served").body.len(), size);
    }
}

/// A call ends at its deadline, neither before nor long after; one whose deadline has passed ends at once.
pub async fn deadlines(make: &impl Factory) {
    let (slow, pair) = slow_pair(make, Duration::from_secs(3600)).await;
    let start = pair.clock.now();
    let late = pair.call(millis(300), Method::Forward, tensors(64)).await;
    let took = pair.clock.now() - start;
    assert!(matches!(late, Err(RpcError::Deadline { .. })), "{late:?}");
    assert!(took >= millis(300) && took < millis(300) + LATE, "a deadline after 300 ms took {took:?}");
    pair.until("the callee drops what nobody waits for", || slow.dropped() == 1).await;
    let start = pair.clock.now();
    let passed = pair.call(Duration::ZERO, Method::Forward, tensors(64)).await;
    assert!(matches!(passed, Err(RpcError::Deadline { .. })), "{passed:?}");
    assert!(pair.clock.now() - start < LATE);
}

/// A call whose future is dropped is dropped at the callee, too, and the connection goes on.
pub async fn cancellation(make: &impl Factory) {
    let (slow, pair) = slow_pair(make, Duration::from_secs(3600)).await;
    for round in 1..=3 {
        let call = pair.call(PATIENCE, Method::Backward, tensors(64));
        let began = Box::pin(pair.until("the call begins", || slow.began() == round));
        match select(call, began).await {
            Either::Left((ended, _)) => panic!("it was to take an hour, but: {ended:?}"),
            Either::Right(((), call)) => drop(call),
        }
        pair.until("the callee drops the call", || slow.dropped() == round).await;
    }
}

/// Whoever has sent its whole request still listens: answers that take their time arrive, and an empty body is a body.
pub async fn half_close(make: &impl Factory) {
    let (_slow, pair) = slow_pair(make, millis(400)).await;
    for body in [message("late".to_owned()), Body::Message(Bytes::new())] {
        let answer = pair.call(PATIENCE, Method::Ping, body.clone()).await.expect("it is served");
        assert_eq!(answer.body, body);
    }
    // Large enough for a stream on hivemind's wire.
    let answer = pair.call(PATIENCE, Method::Forward, tensors(3 << 20)).await.expect("it is served");
    assert_eq!(answer.body.len(), 3 << 20);
}

/// Tensors of many megabytes pass; a message over the transport's limit is an error instead of being served, and the
/// connection goes on.
pub async fn size_limits(make: &impl Factory) {
    let echo = Echo::default();
    let pair = make.connect(router(echo.clone())).await;
    for size in [4, 1 << 20, (4 << 20) + 4, 9 << 20] {
        let answer = pair.call(PATIENCE, Method::Forward, tensors(size)).await;
        assert_eq!(answer.unwrap_or_else(|error| panic!("{size} bytes: {error}")).body.len(), size);
    }
    let served = echo.heard().len();
    let refused = pair.call(PATIENCE, Method::Ping, Body::Message(vec![7; HUGE].into())).await;
    assert!(matches!(refused, Err(RpcError::TooLarge { .. })), "{:?}", refused.map(|answer| answer.body.len()));
    assert_eq!(echo.heard().len(), served);
    assert_eq!(pair.ask("on").await, Ok(message("on".to_owned())));
}

/// Failures of a service, of a route and of reaching somebody are told apart, and cost nobody else anything.
pub async fn errors(make: &impl Factory) {
    let pair = make.connect(router(Failing)).await;
    let orders = [("unknown", "ffn.7"), ("invalid", "odd shape"), ("internal", "broken inside"), ("panic", "panicked")];
    for (order, told) in orders {
        let error = pair.ask(order).await.expect_err("it was ordered to fail");
        assert!(matches!(&error, RpcError::Remote { text } if text.contains(told)), "{order}: {error}");
    }
    assert_eq!(pair.ask("well").await, Ok(message("well".to_owned())));

    let pair = make.connect(Router::new()).await;
    let refused = pair.ask("anything").await;
    assert!(matches!(refused, Err(RpcError::Refused { .. })), "{refused:?}");

    let stranger: PeerId = Keypair::ed25519_from_bytes([7; 32]).expect("32 bytes are a key").public().to_peer_id();
    let meta = Meta { deadline: Deadline::after(pair.clock.now(), PATIENCE), request_id: RequestId(1), trace: None };
    let body = message("anybody".to_owned());
    let nobody = pair.caller.call(Call { peer: stranger, method: Method::Ping, body, meta }).await;
    assert!(matches!(nobody, Err(RpcError::Unreachable { .. })), "{nobody:?}");
}

/// 256 calls are under way at the same time, and each gets its own answer.
pub async fn many_calls(make: &impl Factory) {
    let (slow, pair) = slow_pair(make, Duration::from_secs(3)).await;
    let bodies = (0..256).map(|number| message(format!("call {number}")));
    let calls = join_all(bodies.clone().map(|body| pair.call(PATIENCE, Method::Ping, body)));
    // None is over before the last one has begun.
    let (start, takes) = (pair.clock.now(), Duration::from_secs(3));
    let (answers, ()) = join(calls, pair.until("256 calls are served at once", || slow.began() == 256)).await;
    assert!(pair.clock.now() - start < 2 * takes, "they were served one after the other");
    for (body, answer) in bodies.zip(answers) {
        assert_eq!(answer.expect("it is served").body, body);
    }
}
