//! Asking actors: bounded inboxes that outlive their actor, answers under a deadline, and waiting from ordinary threads.

use std::{cell::Cell, panic::Location, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::{
    panics::drop_contained,
    signal::Signal,
    time::{Clock, Deadline, SharedClock, before},
};

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
    /// Answers; an asker who has left is no error: then the answer is dropped, and if that panics, it stays here.
    pub fn send(self, answer: R) {
        drop_contained(self.0.send(answer));
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
    /// Beside the receiver, whose lock a waiting reader holds.
    closed: Signal<bool>,
}

impl<T> Clone for Inbox<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), receiver: self.receiver.clone(), closed: self.closed.clone() }
    }
}

impl<T> Inbox<T> {
    /// An inbox for at most `capacity` messages, at least one.
    pub fn bounded(capacity: usize) -> Self {
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        Self { sender, receiver: Arc::new(Mutex::new(receiver)), closed: Signal::new(false) }
    }

    /// Puts a message in line without waiting for room.
    pub fn tell(&self, message: T) -> Result<(), AskError> {
        if self.is_closed() {
            return Err(AskError::Gone);
        }
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
            Ok(Ok(answer)) => Ok(answer),
            // Whoever holds questions lets go of them at their deadline, too, and may be the first to do so.
            Ok(Err(_)) if deadline.has_passed(clock.now()) => Err(AskError::Elapsed),
            Ok(Err(_)) => Err(AskError::Gone),
            Err(_) => Err(AskError::Elapsed),
        }
    }

    /// The actor's side: the next message. One incarnation reads at a time; `None` once the inbox is closed and empty.
    /// Dropping the future loses no message.
    pub async fn next(&self) -> Option<T> {
        let mut receiver = self.receiver.lock().await;
        if !self.is_closed() {
            tokio::select! {
                biased;
                message = receiver.recv() => return message,
                () = self.closed.until(|closed| closed.then_some(())) => {}
            }
        }
        receiver.close();
        receiver.recv().await
    }

    /// Refuses further messages; those in line are still read. Does not wait for the reader.
    pub fn close(&self) {
        self.closed.set(true);
    }

    /// Whether [`Inbox::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
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
pub struct Spawner(Arc<Start>);

type Start = dyn Fn(BoxFuture<'static, ()>, &'static Location<'static>) -> bool + Send + Sync;

impl Spawner {
    /// Spawns through `start`, which says whether the runtime still takes work.
    pub fn new(start: impl Fn(BoxFuture<'static, ()>) -> bool + Send + Sync + 'static) -> Self {
        Self::located(move |future, _place| start(future))
    }

    /// Spawns through `start`, which is told where in the code a future was started.
    pub fn located(
        start: impl Fn(BoxFuture<'static, ()>, &'static Location<'static>) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(start))
    }

    /// Spawns on an actix arbiter.
    pub fn arbiter(arbiter: actix_rt::ArbiterHandle) -> Self {
        Self::new(move |future| arbiter.spawn(future))
    }

    /// Starts a future; `false` when the runtime has stopped.
    #[track_caller]
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> bool {
        (self.0)(Box::pin(future), Location::caller())
    }

    /// Runs a future on the system thread and blocks this thread for its result. Works on any thread but the runtime's own
    /// ones, inside or outside other async runtimes.
    ///
    /// `work` should end by the deadline itself: it knows best what it waited for. If it does not, or if the system thread
    /// is too busy to say so, the wait ends 20 ms after the deadline, and the future is dropped.
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
        let (alarm, latest) = (clock.clone(), Deadline::at(deadline.moment() + GRACE));
        let started = self.spawn(async move {
            if let Ok(value) = before(&*alarm, latest, work).await {
                let _waiter_left = done.send(value);
            }
        });
        if !started {
            return Err(AskError::Gone);
        }
        // This thread keeps the time itself: the system thread may be busy.
        result.recv_timeout(latest.remaining(clock.now())).map_err(|error| match error {
            crossbeam_channel::RecvTimeoutError::Timeout => AskError::Elapsed,
            crossbeam_channel::RecvTimeoutError::Disconnected if deadline.has_passed(clock.now()) => AskError::Elapsed,
            crossbeam_channel::RecvTimeoutError::Disconnected => AskError::Gone,
        })
    }
}

/// What work that ends at its deadline may take to say so.
const GRACE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use futures::{FutureExt, poll};
    use tokio::pin;

    use super::*;
    use crate::time::TokioClock;

    enum Question {
        Double(u32, Reply<u32>),
    }

    fn soon(clock: &dyn Clock) -> Deadline {
        Deadline::after(clock.now(), Duration::from_secs(1))
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_is_answered() {
        let (inbox, clock) = (Inbox::bounded(1), TokioClock::system());
        let asking = inbox.ask(&clock, soon(&clock), |reply| Question::Double(21, reply));
        let answering = async {
            let Some(Question::Double(number, reply)) = inbox.next().await else { panic!("a question is in line") };
            reply.send(2 * number);
        };
        assert_eq!(tokio::join!(asking, answering).0, Ok(42));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_inbox_refuses_at_once_and_a_silent_actor_costs_the_deadline_only() {
        let (inbox, clock) = (Inbox::bounded(1), TokioClock::system());
        let silent = inbox.ask(&clock, soon(&clock), |reply| Question::Double(1, reply));
        pin!(silent);
        assert!(poll!(&mut silent).is_pending());
        let refused = inbox.ask(&clock, soon(&clock), |reply| Question::Double(2, reply));
        assert_eq!(refused.now_or_never(), Some(Err(AskError::Full { capacity: 1 })));
        assert_eq!(silent.await, Err(AskError::Elapsed));
        let Some(Question::Double(1, reply)) = inbox.next().await else { panic!("the question stays in line") };
        assert!(reply.is_abandoned());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_reply_tells_the_asker() {
        let (inbox, clock) = (Inbox::bounded(1), TokioClock::system());
        let asking = inbox.ask(&clock, soon(&clock), |reply| Question::Double(1, reply));
        let crashing = async { drop(inbox.next().await) };
        assert_eq!(tokio::join!(asking, crashing).0, Err(AskError::Gone));
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_dropped_at_its_deadline_is_late_and_not_lost() {
        let (inbox, clock) = (Inbox::bounded(1), TokioClock::system());
        let deadline = soon(&clock);
        let dropping = async {
            let question = inbox.next().await;
            clock.sleep_until(deadline.moment()).await;
            drop(question);
        };
        let asking = inbox.ask(&clock, deadline, |reply| Question::Double(1, reply));
        // The one who drops it is woken first.
        let (_, outcome) = tokio::join!(dropping, asking);
        assert_eq!(outcome, Err(AskError::Elapsed));
    }

    #[tokio::test(start_paused = true)]
    async fn closing_wakes_the_reader_and_keeps_what_is_in_line() {
        let inbox = Inbox::bounded(2);
        {
            let reading = inbox.next();
            pin!(reading);
            assert!(poll!(&mut reading).is_pending());
            inbox.close();
            assert_eq!(reading.await, None);
        }
        assert_eq!(inbox.tell(1), Err(AskError::Gone));

        let inbox = Inbox::bounded(2);
        inbox.tell(1).unwrap();
        inbox.close();
        assert_eq!((inbox.next().await, inbox.next().await), (Some(1), None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_leaves_takes_no_message_along() {
        let inbox = Inbox::bounded(2);
        {
            let reading = inbox.next();
            pin!(reading);
            assert!(poll!(&mut reading).is_pending());
            inbox.tell(1).unwrap();
        }
        assert_eq!(inbox.next().await, Some(1));
    }

    /// A runtime on a thread of its own.
    fn spawner() -> Spawner {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let runtime = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            tell.send(runtime.handle().clone()).unwrap();
            mark_runtime_thread();
            runtime.block_on(std::future::pending::<()>());
        };
        std::thread::Builder::new().spawn(runtime).unwrap();
        let handle = told.recv().unwrap();
        Spawner::new(move |future| {
            handle.spawn(future);
            true
        })
    }

    #[test]
    fn a_thread_waits_for_a_result_but_not_for_ever_and_not_for_itself() {
        let (spawner, clock): (_, SharedClock) = (spawner(), Arc::new(TokioClock::system()));
        let soon = Deadline::after(clock.now(), Duration::from_millis(20));
        let late = Deadline::after(clock.now(), Duration::from_secs(60));
        assert_eq!(spawner.wait(&clock, late, async { 7 }), Ok(7));
        assert_eq!(spawner.wait(&clock, soon, std::future::pending::<()>()), Err(AskError::Elapsed));
        let (again, its_clock) = (spawner.clone(), clock.clone());
        let from_inside = async move { again.wait(&its_clock, late, async {}) };
        assert_eq!(spawner.wait(&clock, late, from_inside), Ok(Err(AskError::WouldDeadlock)));
        assert_eq!(spawner.wait(&clock, late, async { panic!("a bug") }).map(|(): ()| ()), Err(AskError::Gone));
        let stopped = Spawner::new(|_| false);
        assert_eq!(stopped.wait(&clock, late, async {}), Err(AskError::Gone));
    }

    #[test]
    fn a_wait_ends_in_time_though_the_system_thread_is_stuck() {
        let held = std::sync::Mutex::new(Vec::new());
        let stuck = Spawner::new(move |future| {
            held.lock().unwrap().push(future);
            true
        });
        let clock: SharedClock = Arc::new(TokioClock::system());
        let deadline = Deadline::after(clock.now(), Duration::from_millis(30));
        assert_eq!(stuck.wait(&clock, deadline, async {}), Err(AskError::Elapsed));
        assert!(deadline.has_passed(clock.now()));
    }
}
