//! Calls of the peer on one connection: reads them, has them served, answers.
//!
//! Each call is let in by the same door as those on hivemind's wire. A call that is not gets an error with the reason,
//! and its body is read and forgotten. A caller who cancels, leaves, or whose deadline passes takes the work along.

use std::{
    sync::{Arc, Mutex},
    task::Context,
    time::Duration,
};

use bytes::Bytes;
use futures::{AsyncRead, AsyncWrite, task::AtomicWaker};
use libp2p::PeerId;
use skep_kernel::{Deadline, Moment, SharedClock};
use skep_rpc::{Answer, Inbound, Meta, RequestId, ServeError, Service as _};
use skep_wire::frame::{
    FrameError,
    native::{AnswerHead, Event, Header, Lane as Which, MAX_SMALL_BODY, RequestHead},
};
use tokio::task::AbortHandle;
use tracing::debug;

use super::{Broken, Context as Node, calls::Calls, convert, lane::Lane};
use crate::{
    budget::Held,
    inbound::{Visit, over_limit},
    status::Counters,
};

/// Frames without a body that wait to be written, refusals above all. Nothing is read while there are more.
const MAX_CONTROLS: usize = 1024;
/// The longest time for which a caller may have a call served.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// A call of the peer that is not answered. It ends when the request is not complete in time, or the answer not there.
struct Served {
    visit: Visit,
    stage: Stage,
}

enum Stage {
    /// The body arrives; the memory for it is set aside.
    Arriving { head: RequestHead, since: Moment, bytes: Held },
    /// A task serves it.
    Running(AbortHandle),
}

/// Answers of the tasks that serve, on their way to the connection's task.
#[derive(Default)]
struct Done {
    answers: Mutex<Vec<(u64, Result<Answer, ServeError>)>>,
    waker: AtomicWaker,
}

/// A stream that the peer opened.
struct Inlet<S> {
    lane: Lane<S, Visit>,
    /// `None` before its greeting.
    which: Option<Which>,
}

/// The serving side of one connection.
pub(crate) struct Servant<S: AsyncRead + AsyncWrite + Unpin> {
    node: Arc<Node>,
    clock: SharedClock,
    peer: PeerId,
    /// At most two.
    inlets: Vec<Inlet<S>>,
    calls: Calls<Served>,
    done: Arc<Done>,
    answers: Vec<(u64, Result<Answer, ServeError>)>,
    is_vouched: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Servant<S> {
    pub(crate) fn new(node: Arc<Node>, peer: PeerId) -> Self {
        let clock = node.server.clock.clone();
        Self {
            node,
            calls: Calls::new(clock.clone()),
            clock,
            peer,
            inlets: Vec::new(),
            done: Arc::default(),
            answers: Vec::new(),
            is_vouched: false,
        }
    }

    /// The peer opened a stream of its link. A third one means that it gave the others up.
    pub(crate) fn accept(&mut self, stream: S) {
        if self.inlets.len() >= 2 {
            self.end();
        }
        self.inlets.push(Inlet { lane: Lane::new(stream, self.node.pool.clone()), which: None });
    }

    /// Whether calls are being served or answered.
    pub(crate) fn is_busy(&self) -> bool {
        !self.calls.is_empty() || self.inlets.iter().any(|inlet| !inlet.lane.writer.is_empty())
    }

    /// Makes what progress there is.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) {
        if self.inlets.is_empty() {
            return;
        }
        self.done.waker.register(cx.waker());
        if let Err(broken) = self.go_on(cx) {
            debug!(peer = %self.peer, reason = %broken, "a native link of the peer ended");
            self.end();
        }
    }

    fn go_on(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        std::mem::swap(&mut *self.done.answers.lock().expect(UNPOISONED), &mut self.answers);
        for (id, outcome) in std::mem::take(&mut self.answers) {
            self.answer(id, outcome)?;
        }
        loop {
            self.exchange(cx)?;
            let patience_ends = self.patience_ends();
            match self.calls.poll(cx, patience_ends) {
                // What that has to say must be written.
                Some(now) => self.expire(now)?,
                None => return Ok(()),
            }
        }
    }

    /// Writes and reads until neither is possible.
    fn exchange(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        loop {
            let mut progress = false;
            for index in 0..self.inlets.len() {
                progress |= self.inlets[index].lane.write(cx, &*self.clock)?;
                while self.inlets[index].lane.writer.controls() < MAX_CONTROLS
                    && let Some(event) = self.inlets[index].lane.read(cx)?
                {
                    self.on_event(index, event)?;
                    progress = true;
                }
            }
            if !progress {
                return Ok(());
            }
        }
    }

    /// When a peer that takes nothing of what is sent to it is given up.
    fn patience_ends(&self) -> Option<Moment> {
        let patience = self.node.server.timeouts.write_answer;
        self.inlets.iter().filter_map(|inlet| inlet.lane.patience_ends(patience)).min()
    }

    fn expire(&mut self, now: Moment) -> Result<(), Broken> {
        if self.patience_ends().is_some_and(|end| end <= now) {
            return Err(Broken::Stuck);
        }
        while let Some(id) = self.calls.due(now) {
            self.drop_body(id);
            self.answer(id, Err(ServeError::Deadline))?;
        }
        Ok(())
    }

    fn on_event(&mut self, index: usize, event: Event) -> Result<(), Broken> {
        match (event, self.inlets[index].which) {
            (Event::Hello(which), None) if self.inlets.iter().all(|other| other.which != Some(which)) => {
                self.inlets[index].which = Some(which);
                Ok(())
            }
            (Event::Hello(_), _) => Err(Broken::Unexpected("a greeting")),
            (_, None) => Err(Broken::Unexpected("frames before its greeting")),
            (Event::Request(head), _) => self.enter(index, head),
            (Event::Body { id, bytes }, _) => self.serve(id, bytes),
            (Event::Credit(bytes), _) => {
                self.inlets[index].lane.writer.allow(bytes);
                Ok(())
            }
            (Event::Cancel(id), _) => {
                if self.forget(id).is_some() {
                    Counters::add(&self.node.server.counters.calls_in_left);
                }
                // On either lane: the cancellation may have come on the other one than the body.
                self.drop_body(id);
                for inlet in &mut self.inlets {
                    inlet.lane.writer.cancel(id);
                }
                Ok(())
            }
            (Event::Answer(_) | Event::Error { .. }, _) => Err(Broken::Unexpected("an answer")),
        }
    }

    /// Lets a call in, or refuses it.
    fn enter(&mut self, index: usize, head: RequestHead) -> Result<(), Broken> {
        let id = head.id;
        if self.calls.contains(id) {
            return Err(FrameError::Duplicate(id).into());
        }
        match self.admit(&head) {
            Ok((visit, bytes)) => {
                let since = self.clock.now();
                let wait = Duration::from_micros(head.wait_us).min(self.node.server.timeouts.read_request);
                let stage = Stage::Arriving { head, since, bytes };
                self.calls.insert(id, since + wait, Served { visit, stage });
                Ok(())
            }
            Err(refusal) => {
                let lane = &mut self.inlets[index].lane;
                lane.reader.refuse(id);
                lane.writer.control(&Header::Error { id, failure: convert::failure_out(refusal) })?;
                Ok(())
            }
        }
    }

    fn admit(&self, head: &RequestHead) -> Result<(Visit, Held), ServeError> {
        let server = &self.node.server;
        if !head.method.is_native() {
            return Err(ServeError::Refused(format!("{} does not travel on this wire", head.method)));
        }
        let visit = server.enter(head.method)?;
        let (size, limit) = (head.body.len(), server.limits.max_body_bytes);
        match usize::try_from(size) {
            Ok(size) if size <= limit => Ok((visit, server.hold_bytes(size.saturating_add(head.body.overhead()))?)),
            _ => Err(over_limit(size, limit)),
        }
    }

    /// A request is complete: a task of its own serves it.
    fn serve(&mut self, id: u64, bytes: Bytes) -> Result<(), Broken> {
        let Some(Served { visit, stage }) = self.calls.remove(id) else { return Ok(()) };
        let (head, since, held) = match stage {
            Stage::Arriving { head, since, bytes } => (head, since, bytes),
            // A peer may begin one number on both lanes.
            Stage::Running(task) => {
                task.abort();
                return Err(Broken::Unexpected("a second body"));
            }
        };
        let body = convert::join(head.body, bytes)?;
        let deadline = since + Duration::from_micros(head.wait_us).min(MAX_WAIT);
        let server = self.node.server.clone();
        Counters::add(&server.counters.calls_in);
        Counters::add(&server.counters.calls_in_native);
        let (peer, method) = (self.peer, head.method);
        let meta = Meta {
            deadline: Deadline::at(deadline),
            request_id: RequestId(head.request_id),
            trace: head.trace.map(convert::trace_in),
        };
        let inbound = Inbound { peer, method, body, meta, knows_overload: true };
        let done = self.done.clone();
        let task = tokio::spawn(async move {
            let outcome = server.router.serve(inbound).await;
            drop(held);
            done.answers.lock().expect(UNPOISONED).push((id, outcome));
            done.waker.wake();
        });
        self.calls.insert(id, deadline, Served { visit, stage: Stage::Running(task.abort_handle()) });
        Ok(())
    }

    /// Queues an answer. Its visit ends when its last byte was written.
    fn answer(&mut self, id: u64, outcome: Result<Answer, ServeError>) -> Result<(), Broken> {
        let Some(visit) = self.forget(id) else { return Ok(()) };
        if outcome.is_ok() && !std::mem::replace(&mut self.is_vouched, true) {
            self.node.server.book.with(|book| book.vouch(self.peer));
        }
        let refusal = match outcome {
            Ok(Answer { body, load }) => {
                let (body, segments) = convert::split(body);
                let is_bulk = body.len() > MAX_SMALL_BODY as u64;
                let head = Header::Answer(AnswerHead { id, load: load.map(convert::load_out), body, bytes: 0 });
                match self.lane(is_bulk).writer.body(id, head, segments, visit) {
                    Ok(()) => return Ok(()),
                    Err(error) => ServeError::Internal(format!("the answer cannot be sent: {error}")),
                }
            }
            Err(refusal) => refusal,
        };
        self.lane(false).writer.control(&Header::Error { id, failure: convert::failure_out(refusal) })?;
        Ok(())
    }

    /// The stream for an answer: the other one if the peer has not opened it.
    fn lane(&mut self, is_bulk: bool) -> &mut Lane<S, Visit> {
        let which = if is_bulk { Which::Bulk } else { Which::Calls };
        let index = self.inlets.iter().position(|inlet| inlet.which == Some(which)).unwrap_or(0);
        &mut self.inlets[index].lane
    }

    fn drop_body(&mut self, id: u64) {
        for inlet in &mut self.inlets {
            inlet.lane.reader.refuse(id);
        }
    }

    /// Forgets a call and stops its task.
    fn forget(&mut self, id: u64) -> Option<Visit> {
        let call = self.calls.remove(id)?;
        if let Stage::Running(task) = call.stage {
            task.abort();
        }
        Some(call.visit)
    }

    /// The peer left, or broke the rules: its work is dropped.
    fn end(&mut self) {
        self.inlets.clear();
        for call in self.calls.take_all() {
            Counters::add(&self.node.server.counters.calls_in_left);
            if let Stage::Running(task) = call.stage {
                task.abort();
            }
        }
        // Answers of tasks that ended just now are of calls that nobody knows any more; numbers begin anew.
        self.done = Arc::default();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Servant<S> {
    fn drop(&mut self) {
        self.end();
    }
}

const UNPOISONED: &str = "nothing panics while it holds the answers";
