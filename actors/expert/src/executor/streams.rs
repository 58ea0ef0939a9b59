//! Executors over devices that go on after a launch: one thread owns one stream, and the experts on it are its own for
//! life. While a batch runs the next one is staged; answers leave when the device has passed their mark.

use std::{
    collections::VecDeque,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use skep_kernel::{SharedClock, ask::mark_runtime_thread, panics::contain};
use tracing::{debug, error};

use super::{
    ExecutorGroup, begin, finish,
    niceness::stand_behind,
    queue::{ReadyQueue, Work},
    run::{self, Errand, Failure},
    run_errand, run_job,
};
use crate::{
    BackendError, Batch, Device, Kind, Lane,
    expert::Expert,
    task::{Task, Ticket},
};

/// How often a thread with batches under way asks its device whether one is done.
const LOOK: Duration = Duration::from_micros(50);

/// The streams of one device, on which experts are hosted: how many, and how each is made.
#[derive(Clone)]
pub struct Streams {
    name: String,
    count: usize,
    serve: Arc<dyn Fn(Seat) + Send + Sync>,
}

/// Where a stream's thread works; for [`Streams`] only.
pub struct Seat {
    queue: Arc<ReadyQueue>,
    clock: SharedClock,
    ticket: Ticket,
    started: mpsc::SyncSender<Result<(), BackendError>>,
}

impl Streams {
    /// `count` streams, at least one, each made by `make` on a thread of its own, `skep-exec-<name>-<i>`, which it never
    /// leaves. Two with the same name are the same.
    pub fn new<D: Device + 'static>(
        name: impl Into<String>,
        count: usize,
        make: impl Fn() -> Result<D, BackendError> + Send + Sync + 'static,
    ) -> Self {
        let serve = move |seat: Seat| match contain(&make).unwrap_or_else(|panic| Err(BackendError::Failed(panic))) {
            Ok(device) => {
                let _starter_left = seat.started.send(Ok(()));
                Desk { lane: Lane::new(device), flights: VecDeque::new(), staged: None, queue: seat.queue }
                    .work(&seat.clock);
                drop(seat.ticket);
            }
            Err(error) => _ = seat.started.send(Err(error)),
        };
        Self { name: name.into(), count: count.max(1), serve: Arc::new(serve) }
    }

    /// Its name, as in `cuda0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts the threads: a group for each, so that no other thread takes their experts.
    pub(crate) fn start(&self, clock: &SharedClock, niceness: u8) -> Result<Vec<ExecutorGroup>, BackendError> {
        let groups: Vec<ExecutorGroup> = (0..self.count).map(|_| ExecutorGroup::new(clock.clone())).collect();
        for (i, group) in groups.iter().enumerate() {
            let (started, told) = mpsc::sync_channel(1);
            let (queue, ticket) = (group.0.queue.clone(), group.0.running.enter());
            let (seat, serve) = (Seat { queue, clock: clock.clone(), ticket, started }, self.serve.clone());
            let body = move || {
                mark_runtime_thread();
                stand_behind(niceness);
                serve(seat);
            };
            let spawned = thread::Builder::new().name(format!("skep-exec-{}-{i}", self.name)).spawn(body);
            let thread = spawned.map_err(|error| BackendError::Failed(error.to_string()))?;
            group.keep(thread);
            told.recv().map_err(|_| BackendError::Failed("a stream's thread ended at once".to_owned()))??;
        }
        Ok(groups)
    }
}

/// A batch that is staged or in the stream.
struct Flight {
    expert: Arc<Expert>,
    kind: Kind,
    tasks: Vec<Task>,
    batch: Batch,
}

/// One thread's work: a lane, and what the batches in it are of, in the lane's order.
struct Desk<D: Device> {
    lane: Lane<D, ()>,
    flights: VecDeque<Flight>,
    staged: Option<Flight>,
    queue: Arc<ReadyQueue>,
}

impl<D: Device> Desk<D> {
    fn work(&mut self, clock: &SharedClock) {
        loop {
            self.answer_finished();
            self.launch();
            if self.staged.is_some() {
                // It has no place in the stream yet: nothing more is taken before.
                self.queue.nap(LOOK);
                continue;
            }
            let work = if self.flights.is_empty() { self.queue.wait(&**clock) } else { self.queue.pop(clock.now()) };
            match work {
                Work::Expert(expert) => match begin(&self.queue, &expert, clock.now()) {
                    Some(Errand::Batch { kind, tasks }) => self.stage(expert, kind, tasks),
                    // Saving and loading see the state behind all that was launched, and whether it was torn.
                    Some(control) => {
                        self.land();
                        run_errand(&self.queue, expert, control);
                    }
                    None => {}
                },
                Work::Job(job) => run_job(job),
                Work::Ended if self.flights.is_empty() => break,
                Work::Wait(_) | Work::Ended => self.queue.nap(LOOK),
            }
        }
        debug!("a stream's executor ends");
    }

    fn is_idle(&self) -> bool {
        self.staged.is_none() && self.flights.is_empty()
    }

    /// Brings a batch on its way. The thread still owns its expert.
    fn stage(&mut self, expert: Arc<Expert>, kind: Kind, tasks: Vec<Task>) {
        run::count_tasks(&expert, kind, &tasks);
        let staged = contain(|| {
            let batch = run::form_batch(&expert, &tasks)?;
            let free = self.lane.stage(kind, batch.clone(), ()).is_ok();
            debug_assert!(free, "nothing is taken while a batch is staged");
            Ok(batch)
        });
        match staged.unwrap_or_else(|panic| Err(run::panicked(Kind::Forward, panic))) {
            Ok(batch) => self.staged = Some(Flight { expert, kind, tasks, batch }),
            Err(failure) => {
                self.settle(&expert, kind, tasks, Err(failure));
                finish(&self.queue, expert);
            }
        }
    }

    /// Puts the staged batch into the stream, if there is room, and lets its expert go: nobody else takes it.
    fn launch(&mut self) {
        let Some(flight) = &self.staged else { return };
        let mut slot = flight.expert.slot();
        let launched = contain(|| self.lane.launch(&mut **slot.backend));
        drop(slot);
        if matches!(launched, Ok(false)) {
            return;
        }
        let flight = self.staged.take().expect("it was just there");
        let expert = flight.expert.clone();
        match launched {
            Ok(_) => self.flights.push_back(flight),
            Err(panic) => {
                let failure = run::panicked(flight.kind, panic);
                self.settle(&expert, flight.kind, flight.tasks, Err(failure));
            }
        }
        finish(&self.queue, expert);
    }

    fn answer_finished(&mut self) {
        while !self.flights.is_empty() {
            let outcome = match contain(|| self.lane.finished()) {
                Ok(None) => return,
                Ok(Some(((), outcome))) => Ok(outcome),
                Err(panic) => Err(panic),
            };
            let Flight { expert, kind, tasks, batch } = self.flights.pop_front().expect("one was there");
            if outcome.is_err() {
                self.lane.forget_down_to(self.flights.len());
            }
            let parts = match outcome {
                // An earlier batch tore the state that this one ran on.
                _ if expert.abandons_line().is_some() => Err(run::ran_on_torn_state(&expert, kind)),
                Ok(outcome) => run::parts_of(&expert, kind, &tasks, &batch, outcome),
                Err(panic) => Err(run::panicked(kind, panic)),
            };
            self.settle(&expert, kind, tasks, parts);
        }
    }

    /// Waits until everything that was staged or launched is answered.
    fn land(&mut self) {
        while !self.is_idle() {
            self.answer_finished();
            self.launch();
            if !self.is_idle() {
                self.queue.nap(LOOK);
            }
        }
    }

    /// Answers everybody. Panics of what is left to be dropped end here.
    fn settle(&self, expert: &Expert, kind: Kind, tasks: Vec<Task>, parts: Result<run::Parts, Failure>) {
        let settled = contain(|| run::settle(expert, &mut expert.slot(), kind, tasks, parts));
        if let Err(panic) = settled {
            error!(uid = %expert.uid, panic, "panicked beside its batches");
            run::poison(expert, format!("panicked beside its batches: {panic}"));
        }
    }
}
