//! Our calls on one connection: opens the link, sends, matches answers, keeps deadlines.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{AsyncRead, AsyncWrite};
use libp2p::PeerId;
use skep_kernel::{Deadline, Moment, SharedClock};
use skep_rpc::{Answer, Body, RpcError, Step};
use skep_wire::{
    Method,
    frame::native::{self, AnswerHead, BodyHead, Event, Failure, Header, MAX_SMALL_BODY, RequestHead, micros},
};
use tokio::sync::{oneshot, watch};
use tracing::debug;

use super::{
    Broken, Context as Node, Ended, Link, Native,
    calls::Calls,
    convert,
    lane::Lane,
    link::{NewCall, Slot},
};
use crate::budget::Held;

impl Node {
    /// Memory for an answer with such a body.
    fn hold_answer(&self, body: &BodyHead) -> Result<Held, RpcError> {
        let (size, limit) = (usize::try_from(body.len()).unwrap_or(usize::MAX), self.server.limits.max_body_bytes);
        if size > limit {
            return Err(RpcError::TooLarge { size, limit });
        }
        self.answers.hold(size.saturating_add(body.overhead())).map_err(|no_room| no_room.for_answer(size))
    }
}

/// Calls sent and not answered. What is over it waits here.
const MAX_SENT: usize = 256;
/// How often a link that broke is opened again on one connection.
const MAX_REOPENS: u32 = 3;

/// A call of ours that has not ended.
struct Open {
    method: Method,
    since: Moment,
    deadline: Deadline,
    reply: oneshot::Sender<Ended>,
    /// What is to be sent; `None` once it was handed to a lane.
    unsent: Option<NewRequest>,
    /// The lane that carries the request.
    lane: usize,
    /// The answer whose body is arriving, and the memory for it.
    answer: Option<(AnswerHead, Held)>,
    _slot: Slot,
}

struct NewRequest {
    head: RequestHead,
    segments: Vec<bytes::Bytes>,
}

impl Open {
    fn answer_with(self, result: Ended) {
        // A caller who left says so through the link's queue.
        let _caller_left = self.reply.send(result);
    }
}

/// The link's two streams.
enum Lanes<S> {
    None,
    Opening { calls: Option<Box<Lane<S, ()>>>, bulk: Option<Box<Lane<S, ()>>> },
    Open { link: Arc<Link>, lanes: [Box<Lane<S, ()>>; 2] },
}

/// The calling side of one connection.
pub(crate) struct Caller<S: AsyncRead + AsyncWrite + Unpin> {
    node: Arc<Node>,
    clock: SharedClock,
    peer: PeerId,
    state: watch::Sender<Native>,
    lanes: Lanes<S>,
    /// Streams to be asked for.
    wanted: VecDeque<native::Lane>,
    reopens: u32,
    open: Calls<Open>,
    /// Calls that wait for one sent before to end, in order.
    waiting: VecDeque<u64>,
    started: VecDeque<NewCall>,
    left: Vec<u64>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Caller<S> {
    /// A side that tells through `state` whether calls may be made.
    pub(crate) fn new(node: Arc<Node>, peer: PeerId, state: watch::Sender<Native>) -> Self {
        let clock = node.server.clock.clone();
        Self {
            node,
            open: Calls::new(clock.clone()),
            clock,
            peer,
            state,
            lanes: Lanes::None,
            wanted: VecDeque::new(),
            reopens: 0,
            waiting: VecDeque::new(),
            started: VecDeque::new(),
            left: Vec::new(),
        }
    }

    /// Identify told which protocols the peer offers.
    pub(crate) fn identified(&mut self, is_native: bool) {
        if !matches!(self.lanes, Lanes::None) || self.reopens > 0 {
            return;
        }
        match is_native {
            true => self.want(),
            false => self.tell(Native::Absent),
        }
    }

    /// A stream of the link was opened.
    pub(crate) fn opened(&mut self, which: native::Lane, stream: S) {
        let Lanes::Opening { calls, bulk } = &mut self.lanes else { return };
        let mut lane = Box::new(Lane::new(stream, self.node.pool.clone()));
        lane.writer.control(&Header::Hello { lane: which }).expect("a greeting is small");
        match which {
            native::Lane::Calls => *calls = Some(lane),
            native::Lane::Bulk => *bulk = Some(lane),
        }
        if let (Some(_), Some(_)) = (&calls, &bulk)
            && let (Some(calls), Some(bulk)) = (calls.take(), bulk.take())
        {
            let link = Link::new(self.peer);
            self.lanes = Lanes::Open { link: link.clone(), lanes: [calls, bulk] };
            self.tell(Native::Ready(link));
        }
    }

    /// A stream of the link could not be opened.
    pub(crate) fn refused(&mut self, reason: &str) {
        debug!(peer = %self.peer, reason, "the native wire is not used: no stream for it");
        self.lanes = Lanes::None;
        self.wanted.clear();
        self.tell(Native::Absent);
    }

    /// Whether calls are under way.
    pub(crate) fn is_busy(&self) -> bool {
        !self.open.is_empty()
    }

    /// Makes what progress there is. Ready when a stream should be opened.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<native::Lane> {
        if let Err(broken) = self.go_on(cx) {
            debug!(peer = %self.peer, reason = %broken, "a native link ended");
            self.end(&broken);
            self.reopens += 1;
            match self.reopens <= MAX_REOPENS && !matches!(broken, Broken::Closed) {
                true => self.want(),
                false => self.tell(Native::Absent),
            }
        }
        match self.wanted.pop_front() {
            Some(lane) => Poll::Ready(lane),
            None => Poll::Pending,
        }
    }

    fn want(&mut self) {
        self.lanes = Lanes::Opening { calls: None, bulk: None };
        self.wanted = [native::Lane::Calls, native::Lane::Bulk].into();
        self.tell(Native::Opening);
    }

    fn tell(&self, state: Native) {
        // Receivers live in the table of connections and with callers that wait.
        self.state.send_replace(state);
    }

    fn go_on(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let Lanes::Open { link, .. } = &self.lanes else { return Ok(()) };
        link.waker.register(cx.waker());
        link.take(&mut self.started, &mut self.left);
        while let Some(call) = self.started.pop_front() {
            self.begin(call);
        }
        while let Some(id) = self.left.pop() {
            if let Some(call) = self.forget(id) {
                self.cancel(id, &call)?;
            }
        }
        loop {
            self.exchange(cx)?;
            let patience_ends = self.patience_ends();
            match self.open.poll(cx, patience_ends) {
                // What that has to say must be written.
                Some(now) => self.expire(now)?,
                None => return Ok(()),
            }
        }
    }

    /// When a peer that takes nothing of what is sent to it is given up.
    fn patience_ends(&self) -> Option<Moment> {
        let Lanes::Open { lanes, .. } = &self.lanes else { return None };
        lanes.iter().filter_map(|lane| lane.patience_ends(self.node.server.timeouts.write_answer)).min()
    }

    /// Writes and reads until neither is possible.
    fn exchange(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        loop {
            self.send_waiting()?;
            let mut progress = false;
            for index in 0..2 {
                progress |= lane(&mut self.lanes, index)?.write(cx, &*self.clock)?;
                while let Some(event) = lane(&mut self.lanes, index)?.read(cx)? {
                    self.on_event(index, event)?;
                    progress = true;
                }
            }
            if !progress {
                return Ok(());
            }
        }
    }

    fn begin(&mut self, call: NewCall) {
        let NewCall { id, method, request_id, trace, body, segments, since, deadline, reply, slot } = call;
        let trace = trace.map(convert::trace_out);
        let head = RequestHead { id, method, wait_us: 0, request_id: request_id.0, trace, body, bytes: 0 };
        let lane = usize::from(head.body.len() > MAX_SMALL_BODY as u64);
        let unsent = Some(NewRequest { head, segments });
        self.open.insert(
            id,
            deadline.moment(),
            Open { method, since, deadline, reply, unsent, lane, answer: None, _slot: slot },
        );
        self.waiting.push_back(id);
    }

    fn send_waiting(&mut self) -> Result<(), Broken> {
        while self.open.len() - self.waiting.len() < MAX_SENT
            && let Some(id) = self.waiting.pop_front()
        {
            let call = self.open.get_mut(id).expect("who waits is open");
            let NewRequest { mut head, segments } = call.unsent.take().expect("who waits was not sent");
            head.wait_us = micros(call.deadline.remaining(self.clock.now()));
            let queued = lane(&mut self.lanes, call.lane)?.writer.body(id, Header::Request(head), segments, ());
            if let Err(error) = queued {
                let size = match error {
                    skep_wire::frame::FrameError::TooLarge { size, .. } => usize::try_from(size).unwrap_or(usize::MAX),
                    other => return Err(other.into()),
                };
                self.reply(id, Err(RpcError::TooLarge { size, limit: native::MAX_HEADER }));
            }
        }
        Ok(())
    }

    fn on_event(&mut self, index: usize, event: Event) -> Result<(), Broken> {
        match event {
            Event::Answer(head) => self.on_answer(index, head)?,
            Event::Body { id, bytes } => self.on_body(id, bytes)?,
            Event::Error { id, failure } => {
                let error = self.failed(id, failure);
                self.reply(id, Err(error));
                self.stop_sending(id)?;
            }
            Event::Credit(bytes) => lane(&mut self.lanes, index)?.writer.allow(bytes),
            Event::Hello(_) => return Err(Broken::Unexpected("a greeting")),
            Event::Request(_) => return Err(Broken::Unexpected("a call")),
            Event::Cancel(_) => return Err(Broken::Unexpected("a cancellation")),
        }
        Ok(())
    }

    /// An answer begins: it gets the memory that its body will take, or is refused.
    fn on_answer(&mut self, index: usize, head: AnswerHead) -> Result<(), Broken> {
        let id = head.id;
        let Some(call) = self.open.get_mut(id) else {
            // Its caller left, or it ended otherwise.
            lane(&mut self.lanes, index)?.reader.refuse(id);
            return Ok(());
        };
        // A peer may begin one answer on both lanes.
        if call.answer.is_some() {
            return Err(Broken::Unexpected("a second answer"));
        }
        match self.node.hold_answer(&head.body) {
            Ok(held) => call.answer = Some((head, held)),
            Err(refusal) => {
                lane(&mut self.lanes, index)?.reader.refuse(id);
                if let Some(call) = self.forget(id) {
                    self.cancel(id, &call)?;
                    call.answer_with(Err(refusal));
                }
            }
        }
        Ok(())
    }

    /// What a failure is to the caller. Both sides keep the deadline; whichever is first, it is the same end.
    fn failed(&mut self, id: u64, failure: Failure) -> RpcError {
        match (failure, self.open.get_mut(id)) {
            (Failure::Deadline, Some(call)) => {
                let waited = self.clock.now().since(call.since);
                RpcError::Deadline { peer: self.peer, step: Step::Exchange, waited }
            }
            (failure, _) => convert::failure_in(failure).into_rpc(self.peer),
        }
    }

    fn on_body(&mut self, id: u64, bytes: bytes::Bytes) -> Result<(), Broken> {
        let Some(call) = self.open.get_mut(id) else { return Ok(()) };
        let Some((head, held)) = call.answer.take() else {
            return Err(Broken::Unexpected("an answer without a beginning"));
        };
        let body = convert::join(head.body, bytes)?;
        let is_tensors = matches!(body, Body::Tensors(_));
        let answer = match is_tensors == call.method.carries_tensors() {
            true => Ok((Answer { body, load: head.load.map(convert::load_in) }, held)),
            false => {
                let reason = format!("the answer has not the form of an answer to {}", call.method);
                Err(RpcError::Malformed { peer: self.peer, reason })
            }
        };
        self.reply(id, answer);
        self.stop_sending(id)
    }

    fn expire(&mut self, now: Moment) -> Result<(), Broken> {
        if self.patience_ends().is_some_and(|end| end <= now) {
            return Err(Broken::Stuck);
        }
        while let Some(id) = self.open.due(now) {
            let Some(call) = self.forget(id) else { continue };
            let waited = call.deadline.moment().since(call.since);
            self.cancel(id, &call)?;
            call.answer_with(Err(RpcError::Deadline { peer: self.peer, step: Step::Exchange, waited }));
        }
        Ok(())
    }

    fn reply(&mut self, id: u64, result: Ended) {
        if let Some(call) = self.forget(id) {
            call.answer_with(result);
        }
    }

    fn forget(&mut self, id: u64) -> Option<Open> {
        let call = self.open.remove(id)?;
        if call.unsent.is_some() {
            self.waiting.retain(|waiting| *waiting != id);
        }
        Some(call)
    }

    /// Tells the peer that nobody waits for the answer, if it has heard of the call: on the lane of the request, for on
    /// another one it might come first.
    fn cancel(&mut self, id: u64, call: &Open) -> Result<(), Broken> {
        if call.unsent.is_some() || lane(&mut self.lanes, call.lane)?.writer.cancel(id) {
            return Ok(());
        }
        for index in 0..2 {
            lane(&mut self.lanes, index)?.reader.refuse(id);
        }
        lane(&mut self.lanes, call.lane)?.writer.control(&Header::Cancel { id })?;
        Ok(())
    }

    /// The call has ended, perhaps before all of its request was sent.
    fn stop_sending(&mut self, id: u64) -> Result<(), Broken> {
        for index in 0..2 {
            lane(&mut self.lanes, index)?.writer.cancel(id);
        }
        Ok(())
    }

    /// Answers that came with the connection's end lie in the streams still.
    fn read_the_rest(&mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for index in 0..2 {
            while let Ok(lane) = lane(&mut self.lanes, index)
                && let Ok(Some(event)) = lane.read(&mut cx)
                && self.on_event(index, event).is_ok()
            {}
        }
    }

    /// Fails everything that is under way.
    fn end(&mut self, broken: &Broken) {
        let lanes = std::mem::replace(&mut self.lanes, Lanes::None);
        if let Lanes::Open { link, .. } = lanes {
            link.end(broken);
        }
        self.waiting.clear();
        for call in self.open.take_all() {
            let step = if call.unsent.is_some() { Step::OpenStream } else { Step::Exchange };
            call.answer_with(Err(convert::lost(broken, self.peer, step)));
        }
    }
}

fn lane<S>(lanes: &mut Lanes<S>, index: usize) -> Result<&mut Lane<S, ()>, Broken> {
    match lanes {
        Lanes::Open { lanes, .. } => Ok(&mut lanes[index]),
        Lanes::None | Lanes::Opening { .. } => Err(Broken::Closed),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Caller<S> {
    fn drop(&mut self) {
        self.read_the_rest();
        self.end(&Broken::Closed);
        self.tell(Native::Absent);
    }
}
