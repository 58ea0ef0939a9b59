//! The callers' end of a link.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::task::AtomicWaker;
use libp2p::PeerId;
use skep_kernel::{Deadline, Moment};
use skep_rpc::{Answer, Call, RequestId, RpcError, Step, TraceContext};
use skep_wire::{Method, frame::native::BodyHead};
use tokio::sync::oneshot;

use super::{Broken, Ended, convert};

/// Calls on one link that have not ended, those that wait to be sent included.
const MAX_OPEN: usize = 4096;
/// When a call over that limit may be made again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// What is known of a connection and the native wire.
#[derive(Clone, Default)]
pub(crate) enum Native {
    /// Identify has not told yet.
    #[default]
    Unknown,
    /// The peer does not speak it, or its link broke too often.
    Absent,
    /// The link's streams are being opened.
    Opening,
    /// Calls may be made.
    Ready(Arc<Link>),
}

/// Where callers put calls for one connection.
pub(crate) struct Link {
    pub(super) peer: PeerId,
    queue: Mutex<Queue>,
    pub(super) waker: AtomicWaker,
    open: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Queue {
    next_id: u64,
    started: VecDeque<NewCall>,
    /// Callers who gave up.
    left: Vec<u64>,
    ended: Option<Broken>,
}

/// A call on its way to the connection's task.
pub(super) struct NewCall {
    pub(super) id: u64,
    pub(super) method: Method,
    pub(super) request_id: RequestId,
    pub(super) trace: Option<TraceContext>,
    pub(super) body: BodyHead,
    pub(super) segments: Vec<Bytes>,
    pub(super) since: Moment,
    pub(super) deadline: Deadline,
    pub(super) reply: oneshot::Sender<Ended>,
    pub(super) slot: Slot,
}

/// One of the calls that a link may have open.
pub(super) struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Link {
    pub(super) fn new(peer: PeerId) -> Arc<Self> {
        Arc::new(Self { peer, queue: Mutex::default(), waker: AtomicWaker::new(), open: Arc::default() })
    }

    /// Puts a call in line. Dropping what it gives cancels the call, at the peer, too.
    pub(crate) fn call(self: Arc<Self>, now: Moment, call: Call) -> Result<Waiting, RpcError> {
        let Call { peer, method, body, meta } = call;
        let slot = Slot(self.open.clone());
        let open = self.open.fetch_add(1, Ordering::Relaxed);
        if open >= MAX_OPEN {
            let (waiting, limit) = (count(open), count(MAX_OPEN));
            return Err(RpcError::Overloaded { waiting, limit, retry_after: RETRY_AFTER });
        }
        let (body, segments) = convert::split(body);
        let (sender, reply) = oneshot::channel();
        let mut queue = self.lock();
        if let Some(broken) = &queue.ended {
            return Err(convert::lost(broken, peer, Step::OpenStream));
        }
        let id = queue.next_id;
        queue.next_id += 1;
        queue.started.push_back(NewCall {
            id,
            method,
            request_id: meta.request_id,
            trace: meta.trace,
            body,
            segments,
            since: now,
            deadline: meta.deadline,
            reply: sender,
            slot,
        });
        drop(queue);
        self.waker.wake();
        Ok(Waiting { reply, id, link: Some(self) })
    }

    /// What callers did since the last time.
    pub(super) fn take(&self, started: &mut VecDeque<NewCall>, left: &mut Vec<u64>) {
        let mut queue = self.lock();
        std::mem::swap(&mut queue.started, started);
        std::mem::swap(&mut queue.left, left);
    }

    /// No call is taken any more; those in line fail.
    pub(super) fn end(&self, broken: &Broken) {
        let mut queue = self.lock();
        queue.ended = Some(broken.clone());
        let started = std::mem::take(&mut queue.started);
        drop(queue);
        for call in started {
            let _caller_left = call.reply.send(Err(convert::lost(broken, self.peer, Step::OpenStream)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics while it holds the queue")
    }
}

fn count(calls: usize) -> u32 {
    u32::try_from(calls).unwrap_or(u32::MAX)
}

/// A call that is under way. Ends by the call's deadline, which the connection's task keeps.
pub(crate) struct Waiting {
    reply: oneshot::Receiver<Ended>,
    id: u64,
    /// `None` once the call has ended.
    link: Option<Arc<Link>>,
}

impl Future for Waiting {
    type Output = Result<Answer, RpcError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = std::task::ready!(Pin::new(&mut self.reply).poll(cx));
        self.link = None;
        // Without a reply only if the network stopped.
        Poll::Ready(ended.unwrap_or(Err(RpcError::Cancelled)).map(|(answer, _held)| answer))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(link) = self.link.take() {
            link.lock().left.push(self.id);
            link.waker.wake();
        }
    }
}
