//! Executors without threads: tasks on the runtime that calls them, for virtual time.

use std::{sync::Arc, time::Duration};

use skep_kernel::{Rows, SharedClock, Spawner};
use skep_wire::ExpertUid;

use super::{
    ExecutorGroup, begin,
    queue::{ReadyQueue, Work},
    run_errand, run_job,
};
use crate::{Kind, task::Ticket};

/// What a batch of an expert, of a kind and so many rows costs on a simulated device.
pub type Cost = Arc<dyn Fn(&ExpertUid, Kind, Rows) -> Duration + Send + Sync>;

impl ExecutorGroup {
    /// Starts `n` executors as tasks: a batch is taken, its cost passes on the clock, then it runs and is answered.
    /// Backends run on the spawner's thread, so they must be quick.
    pub fn inline(clock: SharedClock, spawner: &Spawner, n: usize, cost: Cost) -> Self {
        let group = Self::new(clock);
        for _ in 0..n.max(1) {
            let ticket = group.0.running.enter();
            spawner.spawn(serve(group.0.queue.clone(), group.0.clock.clone(), cost.clone(), ticket));
        }
        group
    }
}

async fn serve(queue: Arc<ReadyQueue>, clock: SharedClock, cost: Cost, ticket: Ticket) {
    loop {
        match queue.pop(clock.now()) {
            Work::Expert(expert) => {
                if let Some(errand) = begin(&queue, &expert, clock.now()) {
                    if let Some(kind) = errand.kind() {
                        let done_at = clock.now() + cost(&expert.uid, kind, errand.rows());
                        clock.sleep_until(done_at).await;
                    }
                    run_errand(&queue, expert, errand);
                }
            }
            Work::Job(job) => run_job(job),
            Work::Wait(None) => queue.changed().await,
            Work::Wait(Some(alarm)) => tokio::select! {
                biased;
                () = queue.changed() => {}
                () = clock.sleep_until(alarm) => {}
            },
            Work::Ended => break,
        }
    }
    drop(ticket);
}
