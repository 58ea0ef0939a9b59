//! Backward calls at most once by request id: a repeat joins the running call, gets its answer, or hears that it was
//! applied. A call is followed to its end even when its caller leaves: a step that was made is remembered.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use skep_kernel::{Deadline, SharedClock, Signal, Spawner};
use skep_rpc::{Admission, Answer, Ending, RequestIds, RequestKey, RequestLimits, ServeError};
use skep_wire::HostTensor;

use super::handler::RequestHandler;
use crate::{
    ExpertHandle, Kind, ServerConfig,
    task::{InFlight, Ticket, Verdict},
};

/// How long ids are remembered.
const LIFE: Duration = Duration::from_secs(600);

type Outcome = Result<Answer, ServeError>;

/// A running call: while somebody waits for it, it is wanted.
#[derive(Clone, Default)]
struct Run {
    outcome: Signal<Option<Outcome>>,
    waiting: Arc<InFlight>,
}

/// The memory of one server.
#[derive(Clone)]
pub(crate) struct Once {
    ids: Arc<Mutex<RequestIds<Run>>>,
    spawner: Spawner,
}

impl Once {
    pub fn new(config: &ServerConfig, spawner: Spawner) -> Self {
        let limits =
            RequestLimits { requests: config.remembered_requests, answer_bytes: config.remembered_bytes, life: LIFE };
        Self { ids: Arc::new(Mutex::new(RequestIds::new(limits))), spawner }
    }

    fn ids(&self) -> MutexGuard<'_, RequestIds<Run>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RequestHandler {
    /// Runs a backward call unless it runs or ran already.
    pub async fn backward_once(
        &self,
        key: RequestKey,
        expert: ExpertHandle,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Outcome {
        loop {
            let mut run = Run::default();
            let mut place = run.waiting.enter();
            let admission = self.once.ids().admit(self.executors.now(), &key, run.clone());
            match admission {
                Admission::Run => {
                    let following = self.follow(run.clone(), key.clone(), expert.clone(), tensors.clone(), deadline)?;
                    following.await;
                }
                Admission::Join(running) => (place, run) = (running.waiting.enter(), running),
                Admission::Answered(answer) => return Ok(answer),
                Admission::AlreadyApplied => return Err(ServeError::AlreadyApplied),
                Admission::Full => {
                    return Err(ServeError::Internal("too many requests are running to remember this one".to_owned()));
                }
            }
            let ended = run.outcome.until(Option::clone).await;
            drop(place);
            match ended {
                // The first caller's deadline may be earlier than ours: what was skipped for it runs for us.
                Err(ServeError::Deadline) if !deadline.has_passed(self.executors.now()) => {}
                outcome => return outcome,
            }
        }
    }

    /// Puts the call in line; what it gives stays with it to its end.
    fn follow(
        &self,
        run: Run,
        key: RequestKey,
        expert: ExpertHandle,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Result<Following, ServeError> {
        let waiting = run.waiting.clone();
        let wanted = Box::new(move || waiting.count() > 0);
        // Whatever happens from here on, even a panic, the call does not stay "running".
        let mut entry = Entry::new(self, key, run);
        let accepted = match expert.submit_wanted(Kind::Backward, tensors, deadline, wanted) {
            Ok(accepted) => accepted,
            Err(error) => {
                entry.tell(Err(error.clone()));
                return Err(error);
            }
        };
        let handler = self.clone();
        let rest = Box::pin(async move {
            // Without a deadline: executors answer every task, and how this one ended must be known.
            let Verdict { result, stepped } = accepted.verdict().await;
            if stepped {
                entry.ends(Ending::Applied);
            }
            let outcome = match result {
                Ok(results) => handler.encode(&expert, Kind::Backward, results).await,
                Err(error) => Err(error),
            };
            if let Ok(answer) = &outcome {
                entry.ends(Ending::Answered(answer.clone()));
            }
            entry.tell(outcome);
        });
        Ok(Following { rest: Some(rest), spawner: self.once.spawner.clone() })
    }
}

/// The rest of a running call: where the caller waits, and once that one has left, on the system thread.
struct Following {
    rest: Option<BoxFuture<'static, ()>>,
    spawner: Spawner,
}

impl Future for Following {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Taken out: what panics is not polled again.
        let Some(mut rest) = self.rest.take() else { return Poll::Ready(()) };
        let ended = rest.as_mut().poll(cx);
        if ended.is_pending() {
            self.rest = Some(rest);
        }
        ended
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        if let Some(rest) = self.rest.take() {
            // Refused only when everything ends: then the entry is dropped, which tells who waits.
            let _goes_on = self.spawner.spawn(rest);
        }
    }
}

/// A running call in the memory; dropping it says how it ended.
struct Entry {
    once: Once,
    clock: SharedClock,
    key: RequestKey,
    run: Run,
    ending: Ending,
    /// What those who wait are told.
    outcome: Option<Outcome>,
    _ticket: Ticket,
}

impl Entry {
    fn new(handler: &RequestHandler, key: RequestKey, run: Run) -> Self {
        Self {
            once: handler.once.clone(),
            clock: handler.executors.clock().clone(),
            key,
            run,
            ending: Ending::NotApplied,
            outcome: None,
            _ticket: handler.calls.enter(),
        }
    }

    fn ends(&mut self, ending: Ending) {
        self.ending = ending;
    }

    fn tell(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let ending = std::mem::replace(&mut self.ending, Ending::Applied);
        self.once.ids().finish(self.clock.now(), &self.key, ending);
        // Last: who hears of the end and asks again must not find the call running and join what is over.
        let lost = || Err(ServeError::Internal("the call was lost".to_owned()));
        self.run.outcome.set(Some(self.outcome.take().unwrap_or_else(lost)));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Wake, Waker},
    };

    use libp2p_identity::PeerId;
    use skep_kernel::{Moment, TokioClock};
    use skep_rpc::RequestId;

    use super::*;

    /// Asks again as soon as it is told that a call has ended.
    struct AskAgain {
        once: Once,
        key: RequestKey,
        heard: Mutex<Option<Admission<Run>>>,
    }

    impl Wake for AskAgain {
        fn wake(self: Arc<Self>) {
            *self.heard.lock().unwrap() = Some(self.once.ids().admit(Moment::START, &self.key, Run::default()));
        }
    }

    #[test]
    fn whoever_hears_of_the_end_of_a_call_does_not_find_it_running() {
        let once = Once::new(&ServerConfig::default(), Spawner::new(|_| false));
        let key = RequestKey { peer: PeerId::random(), id: RequestId(7), uid: "e.0".to_owned() };
        let run = Run::default();
        assert!(matches!(once.ids().admit(Moment::START, &key, run.clone()), Admission::Run));
        let entry = Entry {
            once: once.clone(),
            clock: Arc::new(TokioClock::system()),
            key: key.clone(),
            run: run.clone(),
            ending: Ending::NotApplied,
            outcome: Some(Err(ServeError::Deadline)),
            _ticket: Arc::<InFlight>::default().enter(),
        };
        let joiner = Arc::new(AskAgain { once, key, heard: Mutex::default() });
        let mut end = pin!(run.outcome.until(Option::clone));
        let waker = Waker::from(joiner.clone());
        assert!(end.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(entry);
        let heard = joiner.heard.lock().unwrap().take();
        assert!(matches!(heard, Some(Admission::Run)), "it would wait for what is over, again and again");
    }
}
