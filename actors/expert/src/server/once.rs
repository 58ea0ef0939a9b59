//! Backward calls at most once by request id: a repeat joins the running call, gets its answer, or hears that it was
//! applied. Who follows a call to its end outlives the caller: a step that was made is remembered even if nobody waits.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use skep_kernel::{Deadline, Signal, Spawner};
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

impl Run {
    /// Ends the call, unless it has ended.
    fn end(&self, outcome: Outcome) {
        self.outcome.update_if(|ended| {
            let is_first = ended.is_none();
            ended.get_or_insert(outcome);
            is_first
        });
    }
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
                Admission::Run => self.follow(run.clone(), key.clone(), expert.clone(), tensors.clone(), deadline)?,
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

    /// Puts the call in line and starts the task that stays with it to its end.
    fn follow(
        &self,
        run: Run,
        key: RequestKey,
        expert: ExpertHandle,
        tensors: Vec<HostTensor>,
        deadline: Deadline,
    ) -> Result<(), ServeError> {
        let waiting = run.waiting.clone();
        let wanted = Box::new(move || waiting.count() > 0);
        // Whatever happens from here on, even a panic, the call does not stay "running".
        let mut entry =
            Entry { handler: self.clone(), key, run, ending: Ending::NotApplied, _ticket: self.calls.enter() };
        let accepted = match expert.submit_wanted(Kind::Backward, tensors, deadline, wanted) {
            Ok(accepted) => accepted,
            Err(error) => {
                entry.run.end(Err(error.clone()));
                return Err(error);
            }
        };
        let follower = async move {
            // Without a deadline: executors answer every task, and how this one ended must be known.
            let Verdict { result, stepped } = accepted.verdict().await;
            if stepped {
                entry.ending = Ending::Applied;
            }
            let outcome = match result {
                Ok(results) => entry.handler.encode(&expert, Kind::Backward, results).await,
                Err(error) => Err(error),
            };
            if let Ok(answer) = &outcome {
                entry.ending = Ending::Answered(answer.clone());
            }
            entry.run.end(outcome);
        };
        if self.once.spawner.spawn(follower) { Ok(()) } else { Err(ServeError::Stopping) }
    }
}

/// A running call in the memory; dropping it says how it ended.
struct Entry {
    handler: RequestHandler,
    key: RequestKey,
    run: Run,
    ending: Ending,
    _ticket: Ticket,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.run.end(Err(ServeError::Internal("the call was lost".to_owned())));
        let ending = std::mem::replace(&mut self.ending, Ending::Applied);
        self.handler.once.ids().finish(self.handler.executors.now(), &self.key, ending);
    }
}
