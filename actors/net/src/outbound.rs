//! Calls of ours: on the native wire to peers that offer it (docs/wire.md §13), else on hivemind's ([`hivemind`]).

mod hivemind;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::AsyncReadExt as _;
use libp2p::PeerId;
use skep_kernel::{Deadline, time::before};
use skep_rpc::{Answer, Call, Inbound, RpcError, Service as _, Step};
use skep_wire::{Framing, Method};

use self::hivemind::{Request, converse, read_stream_answer, read_unary_answer};
use crate::{
    budget::Held,
    native_link::{Link, Native},
    net::Shared,
    status::Counters,
    streams::{OpenError, Opened, Purpose},
};

/// How long a call that trains nothing waits for a fresh connection to tell whether the peer offers the native wire, and
/// for the link's streams. Peers of hivemind answer identify, too, so none waits that long unless something is wrong.
const NATIVE_PATIENCE: Duration = Duration::from_secs(2);

/// An answer, with the memory that it holds until the caller has it.
pub(crate) struct Received {
    pub(crate) answer: Answer,
    /// `None` when something else counts it.
    pub(crate) held: Option<Held>,
}

impl From<Answer> for Received {
    fn from(answer: Answer) -> Self {
        Self { answer, held: None }
    }
}

/// Makes one call; it ends by its deadline, which is kept here for all that it waits for.
pub(crate) async fn call(shared: Arc<Shared>, call: Call) -> Result<Received, RpcError> {
    Counters::add(&shared.counters.calls_out);
    let (peer, method, deadline) = (call.peer, call.method, call.meta.deadline);
    let started = shared.clock.now();
    let progress = Progress::default();
    let result = before(&*shared.clock, deadline, exchange(&shared, call, &progress)).await;
    let late = |_| RpcError::Deadline { peer, step: progress.step(), waited: deadline.moment().since(started) };
    let result = result.map_err(late).and_then(|result| result);
    note(&shared, peer, method, result.as_ref().err());
    result
}

/// How far a call has come, for the error if its deadline passes.
struct Progress(Mutex<Step>);

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(Step::Prepare))
    }
}

impl Progress {
    fn at(&self, step: Step) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = step;
    }

    fn step(&self) -> Step {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a call on the link that the peer has with us; gives the call back if there is none, or it is none for a link.
/// The deadline is the link's to keep, so this may be polled anywhere.
pub(crate) async fn call_on_link(shared: &Shared, call: Call) -> Result<Result<Answer, RpcError>, Call> {
    let Some(link) = call.method.is_native().then(|| shared.connections.link(call.peer)).flatten() else {
        return Err(call);
    };
    Counters::add(&shared.counters.calls_out);
    let (peer, method) = (call.peer, call.method);
    let result = ask_link(shared, link, call).await;
    note(shared, peer, method, result.as_ref().err());
    Ok(result)
}

async fn ask_link(shared: &Shared, link: Arc<Link>, call: Call) -> Result<Answer, RpcError> {
    Counters::add(&shared.counters.calls_out_native);
    link.call(shared.clock.now(), call)?.await
}

/// Remembers what a call's end says of the peer.
fn note(shared: &Shared, peer: PeerId, method: Method, failure: Option<&RpcError>) {
    shared.bans.note(shared.clock.now(), peer, method, failure);
    if matches!(failure, None | Some(RpcError::Remote { .. })) {
        shared.book.with(|book| book.vouch(peer));
    }
    if failure.is_some() {
        Counters::add(&shared.counters.calls_out_failed);
    }
}

async fn exchange(shared: &Shared, call: Call, progress: &Progress) -> Result<Received, RpcError> {
    if call.peer == shared.local_peer {
        progress.at(Step::Exchange);
        return serve_ourselves(shared, call).await.map(Received::from);
    }
    let (peer, method) = (call.peer, call.method);
    if method.is_native()
        && shared.config.native
        && let Some(link) = link(shared, &call, progress).await?
    {
        progress.at(Step::Exchange);
        return ask_link(shared, link, call).await.map(Received::from);
    }
    // Sizes are checked before anything is dialled: an oversize request would block the writer for ever.
    let request = Request::new(call)?;
    let Opened { stream, slot } = open(shared, peer, method, request.framing(), progress).await?;
    progress.at(Step::Exchange);
    let (reader, writer) = stream.split();
    let answered = match request {
        Request::Unary { call_id, segments } => {
            converse(writer, &segments, read_unary_answer(reader, method, call_id, &shared.answers)).await
        }
        Request::Stream { segments } => {
            let max_bytes = shared.config.limits.max_body_bytes;
            converse(writer, &segments, read_stream_answer(reader, max_bytes, &shared.answers)).await
        }
    };
    drop(slot);
    let (body, held) = answered.map_err(|failure| failure.of(peer))?;
    Ok(Received { answer: Answer { body, load: None }, held: Some(held) })
}

/// A call to our own peer id: libp2p cannot dial itself, and need not.
async fn serve_ourselves(shared: &Shared, call: Call) -> Result<Answer, RpcError> {
    let Call { peer, method, body, meta } = call;
    let inbound = Inbound { peer, method, body, meta, knows_overload: true };
    shared.router.serve(inbound).await.map_err(|error| error.into_rpc(peer))
}

/// The link to a peer, connecting first if need be. A fresh connection tells by identify whether the peer offers the
/// native wire; a call waits for that. `None` if the peer does not offer it, or does not say so in time: a backward call
/// waits to its deadline, since only that wire carries its request id. A connection that ends meanwhile is replaced once.
async fn link(shared: &Shared, call: &Call, progress: &Progress) -> Result<Option<Arc<Link>>, RpcError> {
    let peer = call.peer;
    for _ in 0..3 {
        let Some((mut native, since)) = shared.connections.native(peer) else {
            progress.at(Step::Dial);
            shared.reach(peer).await?;
            continue;
        };
        progress.at(Step::OpenStream);
        // A connection that has been silent for so long has been waited for by others.
        let from = if matches!(*native.borrow(), Native::Unknown) { since } else { shared.clock.now() };
        let patience = Deadline::after(from, NATIVE_PATIENCE);
        let wait = native.wait_for(|native| matches!(native, Native::Ready(_) | Native::Absent));
        let known = match call.method {
            Method::Backward => Ok(wait.await),
            _ => before(&*shared.clock, patience, wait).await,
        };
        match known {
            Ok(Ok(native)) => {
                return Ok(match &*native {
                    Native::Ready(link) => Some(link.clone()),
                    _ => None,
                });
            }
            // The connection ended.
            Ok(Err(_)) => {}
            Err(_) => return Ok(None),
        }
    }
    Err(RpcError::Unreachable { peer, step: Step::OpenStream, reason: "the connection closed".to_owned() })
}

/// Opens a stream, connecting first if need be. A connection that closes meanwhile is replaced once.
async fn open(
    shared: &Shared,
    peer: PeerId,
    method: Method,
    framing: Framing,
    progress: &Progress,
) -> Result<Opened, RpcError> {
    let unreachable = |step, reason: String| RpcError::Unreachable { peer, step, reason };
    let mut attempts_left = 2;
    loop {
        // Streams of other calls may have to end first.
        progress.at(Step::Prepare);
        let slot = shared.connections.slot(peer).await;
        progress.at(Step::OpenStream);
        let opened = match slot {
            Ok(slot) => slot.open(Purpose::Call(method, framing)).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(opened) => return Ok(opened),
            Err(OpenError::NotConnected | OpenError::Closed) if attempts_left > 0 => {
                attempts_left -= 1;
                progress.at(Step::Dial);
                shared.reach(peer).await?;
            }
            Err(error @ OpenError::Unsupported(_)) => {
                return Err(RpcError::Refused { peer, reason: error.to_string() });
            }
            Err(error) => return Err(unreachable(Step::OpenStream, error.to_string())),
        }
    }
}
