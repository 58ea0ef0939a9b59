//! Keeps the experts of a server visible in the DHT.

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use skep_dht::Dht;
use skep_kernel::{Deadline, SharedClock};
use skep_wire::ExpertUid;
use tokio::sync::watch;
use tracing::{info, warn};

use super::directory::Directory;

/// First and longest wait after an announcement that failed.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Share of a wait that passes, so that servers started together do not announce together.
const JITTER: std::ops::Range<f64> = 0.9..1.0;
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(15);

/// What announcing needs.
pub(crate) struct Announcing {
    pub dht: Dht,
    pub directory: Directory,
    pub clock: SharedClock,
    pub period: Duration,
    pub life: Duration,
    pub seed: u64,
    /// Why experts are not visible; `None` once all of them are.
    pub trouble: watch::Sender<Option<String>>,
}

impl Announcing {
    /// Announces now and every period until it is dropped; failures are retried soon. Experts that serve no more are
    /// withdrawn at the next turn.
    pub async fn run(self) {
        let mut announced: Vec<ExpertUid> = Vec::new();
        let mut retry = RETRY.0;
        let mut random = StdRng::seed_from_u64(self.seed);
        loop {
            let begun = self.clock.now();
            let serving = self.directory.serving();
            let gone = announced.iter().filter(|uid| !serving.contains(uid)).cloned().collect();
            self.withdraw(gone).await;
            let problem = self.declare(&serving).await.err();
            announced = serving;
            let wait = match &problem {
                None => self.period,
                Some(problem) => {
                    warn!(problem, "experts are not announced");
                    let wait = retry.min(self.period);
                    retry = (retry * 2).min(RETRY.1);
                    wait
                }
            };
            if problem.is_none() {
                retry = RETRY.0;
            }
            self.trouble.send_replace(problem);
            self.until_change_or(begun + wait.mul_f64(random.random_range(JITTER))).await;
        }
    }

    async fn declare(&self, uids: &[ExpertUid]) -> Result<(), String> {
        let deadline = Deadline::after(self.clock.now(), ATTEMPT);
        if uids.is_empty() {
            return Ok(());
        }
        self.dht.joined(deadline).await.map_err(|error| error.to_string())?;
        let expiration = self.clock.wall() + self.life.as_secs_f64();
        let taken: BTreeMap<ExpertUid, bool> =
            self.dht.declare_experts(uids.to_vec(), expiration, deadline).await.map_err(|error| error.to_string())?;
        let refused: Vec<&str> =
            uids.iter().filter(|uid| taken.get(*uid) != Some(&true)).map(ExpertUid::as_str).collect();
        match refused.as_slice() {
            [] => Ok(()),
            [first, ..] => Err(format!("no DHT node took the records of {} experts, as of {first}", refused.len())),
        }
    }

    async fn withdraw(&self, uids: Vec<ExpertUid>) {
        if uids.is_empty() {
            return;
        }
        info!(experts = uids.len(), "withdrawing experts");
        let deadline = Deadline::after(self.clock.now(), ATTEMPT);
        if let Err(error) = self.dht.withdraw_experts(uids, deadline).await {
            warn!(%error, "experts are not withdrawn; their records expire");
        }
    }

    /// Waits until `at`, or until an expert is poisoned, reloaded or stopped.
    async fn until_change_or(&self, at: skep_kernel::Moment) {
        tokio::select! {
            biased;
            () = self.directory.changed() => {}
            () = self.clock.sleep_until(at) => {}
        }
    }
}
