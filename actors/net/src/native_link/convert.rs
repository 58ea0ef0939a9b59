//! Between what calls are to the rooms above and what they are on the wire.

use std::time::Duration;

use bytes::Bytes;
use libp2p::PeerId;
use skep_rpc::{Body, RpcError, ServeError, ServerLoad, Step, TensorBody, TraceContext};
use skep_wire::frame::{
    FrameError,
    native::{BodyHead, Failure, Load, Trace, micros},
};

use super::Broken;

/// Parts a body from its bytes; nothing is copied.
pub(super) fn split(body: Body) -> (BodyHead, Vec<Bytes>) {
    match body {
        Body::Message(bytes) => (BodyHead::Message { bytes: bytes.len() as u64 }, vec![bytes]),
        Body::Tensors(TensorBody { uid, tensors }) => BodyHead::of_tensors(uid, tensors),
    }
}

/// Puts a body together; tensors are views over `bytes`. Fails when it has not the length that its head says: a peer may
/// begin one number on both lanes.
pub(super) fn join(head: BodyHead, mut bytes: Bytes) -> Result<Body, Broken> {
    if head.len() != bytes.len() as u64 {
        return Err(Broken::Unexpected("the body of another call"));
    }
    Ok(match head {
        BodyHead::Message { .. } => Body::Message(bytes),
        BodyHead::Tensors { uid, tensors } => {
            let cut = |head: skep_wire::frame::native::TensorHead| {
                head.cut_from(&mut bytes).expect("a body is as long as its tensors together")
            };
            Body::Tensors(TensorBody { uid, tensors: tensors.into_iter().map(cut).collect() })
        }
    })
}

pub(super) fn trace_out(trace: TraceContext) -> Trace {
    Trace { trace_id: trace.trace_id, span_id: trace.span_id }
}

pub(super) fn trace_in(trace: Trace) -> TraceContext {
    TraceContext { trace_id: trace.trace_id, span_id: trace.span_id }
}

pub(super) fn load_out(load: ServerLoad) -> Load {
    Load::new(load.waiting_rows, load.oldest_wait)
}

pub(super) fn load_in(load: Load) -> ServerLoad {
    ServerLoad { waiting_rows: load.waiting_rows, oldest_wait: load.oldest_wait() }
}

pub(super) fn failure_out(error: ServeError) -> Failure {
    let failure = match error {
        ServeError::UnknownExpert { uid } => Failure::UnknownExpert { uid },
        ServeError::Invalid(text) => Failure::Invalid(text),
        ServeError::Overloaded { waiting, limit, retry_after } => {
            Failure::Overloaded { waiting, limit, retry_after_us: micros(retry_after) }
        }
        ServeError::Deadline => Failure::Deadline,
        ServeError::Refused(text) => Failure::Refused(text),
        ServeError::AlreadyApplied => Failure::AlreadyApplied,
        ServeError::Poisoned { uid, reason } => Failure::Poisoned { uid, reason },
        ServeError::Stopping => Failure::Stopping,
        other => Failure::Internal(other.to_string()),
    };
    failure.cut()
}

pub(super) fn failure_in(failure: Failure) -> ServeError {
    match failure {
        Failure::UnknownExpert { uid } => ServeError::UnknownExpert { uid },
        Failure::Invalid(text) => ServeError::Invalid(text),
        Failure::Overloaded { waiting, limit, retry_after_us } => {
            ServeError::Overloaded { waiting, limit, retry_after: Duration::from_micros(retry_after_us) }
        }
        Failure::Deadline => ServeError::Deadline,
        Failure::Refused(text) => ServeError::Refused(text),
        Failure::AlreadyApplied => ServeError::AlreadyApplied,
        Failure::Poisoned { uid, reason } => ServeError::Poisoned { uid, reason },
        Failure::Internal(text) => ServeError::Internal(text),
        Failure::Stopping => ServeError::Stopping,
    }
}

/// What callers hear when their link ends during a call, or before it left.
pub(super) fn lost(broken: &Broken, peer: PeerId, step: Step) -> RpcError {
    match broken {
        Broken::Frame(FrameError::Truncated { .. })
        | Broken::Closed
        | Broken::Ended
        | Broken::Io(_)
        | Broken::Stuck => RpcError::Unreachable { peer, step, reason: broken.to_string() },
        Broken::Frame(_) | Broken::Unexpected(_) if step == Step::Exchange => {
            RpcError::Malformed { peer, reason: broken.to_string() }
        }
        Broken::Frame(_) | Broken::Unexpected(_) => RpcError::Unreachable { peer, step, reason: broken.to_string() },
    }
}
