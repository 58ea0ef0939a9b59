//! One request on its way through an expert.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use skep_kernel::{Deadline, Moment, Reply, Rows, panics::Contained};
use skep_rpc::ServeError;
use skep_wire::HostTensor;
use tokio::sync::Notify;

/// What an expert is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Compute outputs.
    Forward,
    /// Train on output gradients and return input gradients.
    Backward,
}

/// Outputs or input gradients in schema order, or why there are none.
pub type TaskResult = Result<Vec<HostTensor>, ServeError>;

/// How a task ended.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub result: TaskResult,
    /// Whether the expert's state was changed, wholly or in part.
    pub stepped: bool,
}

/// Asked on executors when a batch is formed: must be cheap.
pub(crate) type Wanted = Box<dyn Fn() -> bool + Send>;

/// A request whose tensors fit the expert's schema, waiting for or in a batch.
pub(crate) struct Task {
    /// Tensors may borrow from whoever sent them, and so be dropped by foreign code.
    pub inputs: Contained<Vec<HostTensor>>,
    /// Empty for forward.
    pub grad_outputs: Contained<Vec<HostTensor>>,
    pub rows: Rows,
    pub deadline: Deadline,
    /// When it was accepted.
    pub entered: Moment,
    pub reply: Reply<Verdict>,
    /// Whether others than the receiver of `reply` still want it; `None` when there are no others.
    pub wanted: Option<Wanted>,
    /// Counts the task as unanswered while it exists.
    pub ticket: Ticket,
}

impl Task {
    /// Whether somebody still waits for the answer.
    pub fn is_wanted(&self, now: Moment) -> bool {
        let wanted = self.wanted.as_ref().is_none_or(|wanted| wanted());
        wanted && !self.reply.is_abandoned() && !self.deadline.has_passed(now)
    }

    /// Answers; a caller who has left is no error. An error means that nothing was changed.
    pub fn answer(self, result: TaskResult) {
        let stepped = result.is_ok();
        self.end(Verdict { result, stepped });
    }

    /// Answers with an error although the expert's state was changed.
    pub fn answer_stepped(self, error: ServeError) {
        self.end(Verdict { result: Err(error), stepped: true });
    }

    fn end(self, verdict: Verdict) {
        self.reply.send(verdict);
        drop(self.ticket);
    }
}

/// Counts what is under way and tells when nothing is.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    count: AtomicUsize,
    idle: Notify,
}

impl InFlight {
    /// Counts one more until the ticket is dropped.
    pub fn enter(self: &Arc<Self>) -> Ticket {
        self.count.fetch_add(1, Ordering::AcqRel);
        Ticket(self.clone())
    }

    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Completes when nothing is under way.
    pub async fn idle(&self) {
        loop {
            let mut changed = std::pin::pin!(self.idle.notified());
            // Registered before the count is read: a ticket that goes in between is not missed.
            changed.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            changed.await;
        }
    }
}

/// One thing under way.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<InFlight>);

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn idle_comes_with_the_last_ticket() {
        let in_flight = Arc::new(InFlight::default());
        in_flight.idle().await;
        let tickets = [in_flight.enter(), in_flight.enter()];
        let waiter = tokio::spawn({
            let in_flight = in_flight.clone();
            async move { in_flight.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(tickets);
        waiter.await.unwrap();
    }
}
