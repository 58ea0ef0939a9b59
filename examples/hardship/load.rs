//! The callers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep::{
    Client, RemoteExpert,
    kernel::{Clock, Deadline},
    wire::HostTensor,
};

use crate::tally::{Caller, Tally};

const MAX_ROWS: usize = 16;
const DEADLINES_MS: std::ops::RangeInclusive<u64> = 50..=5000;
/// A call that has not ended so long after its deadline hangs.
const HUNG: Duration = Duration::from_secs(5);

/// What the callers share.
pub struct Run {
    client: Client,
    /// With an input of the most rows that are sent.
    experts: Vec<(RemoteExpert, HostTensor)>,
    /// Calls that are still to be begun.
    left: AtomicU64,
    /// Whether callers end once no call is left.
    over: AtomicBool,
}

/// One call as it was drawn.
struct Drawn<'a> {
    expert: &'a RemoteExpert,
    input: HostTensor,
    deadline: Deadline,
    trains: bool,
}

impl Run {
    pub fn new(client: Client, experts: Vec<RemoteExpert>, calls: u64) -> Self {
        let with_input = |expert: RemoteExpert| {
            let width = expert.info().flat_inputs()[0].size[1].unwrap_or(1);
            let input = HostTensor::from_f32([MAX_ROWS, width], &vec![0.5; MAX_ROWS * width]);
            (expert, input.expect("rows × width values"))
        };
        let experts = experts.into_iter().map(with_input).collect();
        Self { client, experts, left: AtomicU64::new(calls), over: AtomicBool::new(false) }
    }

    pub fn calls_left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// No further call is begun.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.left.store(0, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn clock(&self) -> &dyn Clock {
        &*self.client.clock
    }

    /// The next call; `None` when all are made and nobody is killed any more.
    fn draw(&self, random: &mut ChaCha8Rng) -> Option<Drawn<'_>> {
        if self.is_over() {
            return None;
        }
        // Below zero, calls go on until the last kill.
        let _counted = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        let (expert, input) = &self.experts[random.random_range(0..self.experts.len())];
        let input = input.slice_rows(0, random.random_range(1..=MAX_ROWS)).expect("no more rows than there are");
        let wait = Duration::from_millis(random.random_range(DEADLINES_MS));
        let trains = random.random_bool(0.5);
        Some(Drawn { expert, input, deadline: Deadline::after(self.clock().now(), wait), trains })
    }
}

/// Makes one call after the other.
pub async fn call_by_call(run: Arc<Run>, seed: u64) -> Tally {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut tally = Tally::default();
    while let Some(Drawn { expert, input, deadline, trains }) = run.draw(&mut random) {
        let call = async {
            match trains {
                false => expert.forward(vec![input], deadline).await,
                true => expert.backward(vec![input.clone()], vec![input], deadline).await,
            }
        };
        let patience = deadline.remaining(run.clock().now()) + HUNG;
        match tokio::time::timeout(patience, call).await {
            Ok(outcome) => tally.count(Caller::Task, run.clock().now(), deadline, Some(&outcome)),
            Err(_) => tally.hung += 1,
        }
    }
    tally
}

/// Makes one call after the other and blocks its thread for each.
pub fn call_by_call_and_wait(run: &Run, seed: u64) -> Tally {
    let mut random = ChaCha8Rng::seed_from_u64(1000 + seed);
    let mut tally = Tally::default();
    while let Some(Drawn { expert, input, deadline, trains }) = run.draw(&mut random) {
        let outcome = match trains {
            false => expert.forward_wait(vec![input], deadline),
            true => expert.backward_wait(vec![input.clone()], vec![input], deadline),
        };
        tally.count(Caller::Thread, run.clock().now(), deadline, Some(&outcome));
    }
    tally
}

/// Waits for one moment after the other and calls nobody: how late this machine is.
pub async fn timer(run: Arc<Run>, seed: u64) -> Tally {
    let mut random = ChaCha8Rng::seed_from_u64(2000 + seed);
    let mut tally = Tally::default();
    while !run.is_over() {
        let wait = Duration::from_micros(random.random_range(1_000..100_000));
        let deadline = Deadline::after(run.clock().now(), wait);
        run.clock().sleep_until(deadline.moment()).await;
        tally.count(Caller::Timer, run.clock().now(), deadline, None);
    }
    tally
}

/// Runs a caller and hands in its tally.
pub async fn tell(ended: mpsc::SyncSender<Tally>, caller: impl Future<Output = Tally>) {
    let tally = caller.await;
    // Nobody receives what comes too late to count.
    let _too_late = ended.send(tally);
}
