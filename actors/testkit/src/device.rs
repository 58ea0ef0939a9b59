//! [`ScriptedDevice`]: a device in virtual time that lists what it did when.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use skep_expert::{Backend, Batch, Device, Kind, Outcome};
use skep_kernel::{Moment, SharedClock};

/// What a device was busy with.
///
/// ```
/// use std::time::Duration;
/// use skep_expert::{Batch, Kind, Lane};
/// use skep_testkit::{ScriptedBackend, ScriptedDevice, Sim, Work};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let device = ScriptedDevice::new(sim.clock(), Duration::from_millis(2), Duration::from_millis(10));
///     let mut lane = Lane::new(device.clone());
///     let batch = Batch { rows: skep_kernel::Rows(1), inputs: vec![sim.rows(1, 4)], grad_outputs: Vec::new() };
///     lane.stage(Kind::Forward, batch, ()).ok().expect("nothing is staged");
///     lane.launch(&mut ScriptedBackend::scale(2.0));
///     let works: Vec<Work> = device.spans().iter().map(|span| span.work).collect();
///     assert_eq!(works, [Work::Stage, Work::Run(Kind::Forward)]);
/// });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Copying a batch to the device.
    Stage,
    /// Running a batch.
    Run(Kind),
}

/// One span of a device's time. Batches are numbered from 0 in the order of their staging.
///
/// ```
/// use std::time::Duration;
/// use skep_kernel::Moment;
/// use skep_testkit::{Span, Work};
///
/// let at = |millis| Moment::START + Duration::from_millis(millis);
/// let one = Span { batch: 0, work: Work::Stage, from: at(0), to: at(5) };
/// assert!(one.overlaps(&Span { batch: 1, from: at(4), to: at(9), ..one }));
/// assert!(!one.overlaps(&Span { batch: 1, from: at(5), to: at(9), ..one }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Of which batch.
    pub batch: usize,
    /// What was done.
    pub work: Work,
    /// When it began.
    pub from: Moment,
    /// When it was over.
    pub to: Moment,
}

impl Span {
    /// Whether two spans have time in common.
    pub fn overlaps(&self, other: &Span) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// A device with one engine for copies and one for batches, each of which does one thing after the other; both take
/// virtual time, and nobody waits in a call.
///
/// ```
/// use std::time::Duration;
/// use skep_expert::{Batch, Kind, Lane};
/// use skep_testkit::{ScriptedBackend, ScriptedDevice, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let millis = Duration::from_millis;
///     let device = ScriptedDevice::new(sim.clock(), millis(2), millis(10));
///     let mut lane = Lane::new(device.clone());
///     let mut expert = ScriptedBackend::scale(2.0);
///     let batch = Batch { rows: skep_kernel::Rows(1), inputs: vec![sim.rows(1, 4)], grad_outputs: Vec::new() };
///     lane.stage(Kind::Forward, batch, "first").ok().expect("nothing is staged");
///     lane.launch(&mut expert);
///     assert!(lane.finished().is_none(), "it has only begun");
///     sim.advance(millis(12)).await;
///     assert_eq!(lane.finished().expect("it is done").0, "first");
///     assert_eq!(device.spans().len(), 2);
/// });
/// ```
#[derive(Clone)]
pub struct ScriptedDevice {
    clock: SharedClock,
    copy: Duration,
    run: Duration,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    batches: usize,
    spans: Vec<Span>,
    copies_until: Moment,
    runs_until: Moment,
}

impl ScriptedDevice {
    /// A device that copies a batch in `copy` and runs one in `run`.
    pub fn new(clock: SharedClock, copy: Duration, run: Duration) -> Self {
        Self { clock, copy, run, state: Arc::default() }
    }

    /// All that it did or has been told to do, in the order of telling.
    pub fn spans(&self) -> Vec<Span> {
        self.state().spans.clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A batch on its way to a [`ScriptedDevice`].
///
/// ```
/// use std::time::Duration;
/// use skep_expert::{Batch, Device, Kind};
/// use skep_testkit::{Copied, ScriptedBackend, ScriptedDevice, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let mut device = ScriptedDevice::new(sim.clock(), Duration::from_millis(2), Duration::from_millis(10));
///     let batch = Batch { rows: skep_kernel::Rows(1), inputs: vec![sim.rows(1, 4)], grad_outputs: Vec::new() };
///     let copied: Copied = device.stage(batch);
///     let launched = device.launch(Kind::Forward, copied, &mut ScriptedBackend::scale(2.0));
///     let mark = device.record();
///     assert!(!device.query(&mark), "it is copied and run first");
///     sim.advance(Duration::from_millis(12)).await;
///     assert!(device.query(&mark) && device.collect(launched).is_ok());
/// });
/// ```
pub struct Copied {
    number: usize,
    batch: Batch,
    there: Moment,
}

impl Device for ScriptedDevice {
    type Staged = Copied;
    type Launched = Outcome;
    type Mark = Moment;

    fn stage(&mut self, batch: Batch) -> Copied {
        let now = self.clock.now();
        let mut state = self.state();
        let (number, from) = (state.batches, state.copies_until.max(now));
        let there = from + self.copy;
        state.batches += 1;
        state.copies_until = there;
        state.spans.push(Span { batch: number, work: Work::Stage, from, to: there });
        Copied { number, batch, there }
    }

    fn launch(&mut self, kind: Kind, staged: Copied, backend: &mut dyn Backend) -> Outcome {
        let now = self.clock.now();
        let mut state = self.state();
        let from = state.runs_until.max(staged.there).max(now);
        let to = from + self.run;
        state.runs_until = to;
        state.spans.push(Span { batch: staged.number, work: Work::Run(kind), from, to });
        drop(state);
        match kind {
            Kind::Forward => backend.forward(&staged.batch),
            Kind::Backward => backend.backward(&staged.batch),
        }
    }

    fn record(&mut self) -> Moment {
        self.state().runs_until
    }

    fn query(&mut self, mark: &Moment) -> bool {
        *mark <= self.clock.now()
    }

    fn collect(&mut self, launched: Outcome) -> Outcome {
        launched
    }
}
