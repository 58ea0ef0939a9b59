//! Asking actors: bounded inboxes that outlive their actor, answers under a deadline, and waiting from ordinary threads.

use std::{cell::Cell, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::time::{Clock, Deadline, SharedClock, before};

/// Why a question got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The inbox holds as many messages as it may.
    #[error("inbox is full ({capacity} messages)")]
    Full {
        /// Messages that the inbox may hold.
        capacity: usize,
    },
    /// The deadline passed first.
    #[error("no answer before the deadline")]
    Elapsed,
    /// The actor stopped for good, or crashed while it held the question.
    #[error("the actor is gone")]
    Gone,
    /// Asked synchronously from one of the runtime's own threads.
    #[error("a synchronous call from one of the runtime's own threads would wait for itself")]
    WouldDeadlock,
}

/// Where an answer goes. Dropping it unanswered tells the asker [`AskError::Gone`].
#[derive(Debug)]
pub struct Reply<R>(oneshot::Sender<R>);

impl<R> Reply<R> {
    /// Answers; an asker who has left is no error.
    pub fn send(self, answer: R) {
        let _asker_left = self.0.send(answer);
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }

    /// A reply and the future of its answer, which fails when the reply is dropped.
    pub fn channel() -> (Self, oneshot::Receiver<R>) {
        let (tx, rx) = oneshot::channel();
        (Self(tx), rx)
    }
}

/// A bounded queue of messages to one actor. It outlives the actor: after a crash the next incarnation goes on with the
/// message behind the one that was being handled.
pub struct Inbox<T> {
    sender: mpsc::Sender<T>,
    receiver: Arc<Mutex<mpsc::Receiver<T>>>,
}

impl<T> Clone for Inbox<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), receiver: self.receiver.clone() }
    }
}

impl<T> Inbox<T> {
    /// An inbox for at most `capacity` messages.
    pub fn bounded(capacity: usize) -> Self {
        let (sender, receiver) = mpsc::channel(capacity);
        Self { sender, receiver: Arc::new(Mutex::new(receiver)) }
    }

    /// Puts a message in line without waiting for room.
    pub fn tell(&self, message: T) -> Result<(), AskError> {
        self.sender.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => AskError::Full { capacity: self.sender.max_capacity() },
            mpsc::error::TrySendError::Closed(_) => AskError::Gone,
        })
    }

    /// Asks and waits for the answer. Dropping the future abandons the question.
    pub async fn ask<R>(
        &self,
        clock: &dyn Clock,
        deadline: Deadline,
        question: impl FnOnce(Reply<R>) -> T,
    ) -> Result<R, AskError> {
        let (reply, answer) = Reply::channel();
        self.tell(question(reply))?;
        match before(clock, deadline, answer).await {
            Ok(answered) => answered.map_err(|_| AskError::Gone),
            Err(_) => Err(AskError::Elapsed),
        }
    }

    /// The actor's side: the next message. One incarnation reads at a time; `None` once the inbox is closed and empty.
    pub async fn next(&self) -> Option<T> {
        self.receiver.lock().await.recv().await
    }

    /// Refuses further messages; those in line are still read.
    pub async fn close(&self) {
        self.receiver.lock().await.close();
    }

    /// Messages in line.
    pub fn len(&self) -> usize {
        self.sender.max_capacity() - self.sender.capacity()
    }

    /// Whether no message is in line.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

thread_local! {
    static OURS: Cell<bool> = const { Cell::new(false) };
}

/// Marks the current thread as one of the runtime's own: synchronous calls on it fail instead of waiting for themselves.
pub fn mark_runtime_thread() {
    OURS.with(|ours| ours.set(true));
}

/// Whether [`mark_runtime_thread`] was called on this thread.
pub fn is_runtime_thread() -> bool {
    OURS.with(Cell::get)
}

/// Starts futures on the runtime's system thread, from any thread.
#[derive(Clone)]
pub struct Spawner(Arc<dyn Fn(BoxFuture<'static, ()>) -> bool + Send + Sync>);

impl Spawner {
    /// Spawns through `start`, which says whether the runtime still takes work.
    pub fn new(start: impl Fn(BoxFuture<'static, ()>) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(start))
    }

    /// Spawns on an actix arbiter.
    pub fn arbiter(arbiter: actix_rt::ArbiterHandle) -> Self {
        Self::new(move |future| arbiter.spawn(future))
    }

    /// Starts a future; `false` when the runtime has stopped.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> bool {
        (self.0)(Box::pin(future))
    }

    /// Runs a future on the system thread and blocks this thread for its result, at most until the deadline; then the
    /// future is dropped. Works on any thread but the runtime's own ones, inside or outside other async runtimes.
    pub fn wait<R: Send + 'static>(
        &self,
        clock: &SharedClock,
        deadline: Deadline,
        work: impl Future<Output = R> + Send + 'static,
    ) -> Result<R, AskError> {
        if is_runtime_thread() {
            return Err(AskError::WouldDeadlock);
        }
        let (done, result) = crossbeam_channel::bounded(1);
        let alarm = clock.clone();
        let started = self.spawn(async move {
            if let Ok(value) = before(&*alarm, deadline, work).await {
                let _waiter_left = done.send(value);
            }
        });
        if !started {
            return Err(AskError::Gone);
        }
        // The task ends by the deadline; the grace only covers a system thread that is late.
        let patience = deadline.remaining(clock.now()) + GRACE;
        result.recv_timeout(patience).map_err(|error| match error {
            crossbeam_channel::RecvTimeoutError::Timeout => AskError::Elapsed,
            crossbeam_channel::RecvTimeoutError::Disconnected if deadline.has_passed(clock.now()) => AskError::Elapsed,
            crossbeam_channel::RecvTimeoutError::Disconnected => AskError::Gone,
        })
    }
}

const GRACE: Duration = Duration::from_millis(50);
