//! Phased shutdown: first nobody is told to come here any more, then what is in flight is finished, then all stops.

use std::{collections::BTreeMap, time::Duration};

use tracing::{info, warn};

use crate::{
    Deadline, SharedClock, Signal,
    time::{Clock, before},
};

/// How far a shutdown has come. Phases only advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No shutdown yet.
    #[default]
    Running,
    /// What this process announced is withdrawn; requests are still served.
    Announce,
    /// New work is refused, work in flight is finished.
    Drain,
    /// Everything ends.
    Stop,
}

/// Shares of the time until the deadline after which a phase ends even if somebody still holds it.
const PHASES: [(Phase, f64); 3] = [(Phase::Announce, 0.25), (Phase::Drain, 0.75), (Phase::Stop, 1.0)];

/// The shutdown of one runtime; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    progress: Signal<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    phase: Phase,
    deadline: Option<Deadline>,
    holds: BTreeMap<u64, (Phase, String)>,
    next: u64,
}

impl Progress {
    fn holders(&self, phase: Phase) -> Vec<String> {
        self.holds.values().filter(|(held, _)| *held == phase).map(|(_, name)| name.clone()).collect()
    }
}

/// Makes a phase last until it is dropped, within the phase's share of time.
#[derive(Debug)]
#[must_use = "a hold that is dropped holds nothing"]
pub struct Hold {
    progress: Signal<Progress>,
    number: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.progress.update(|progress| drop(progress.holds.remove(&self.number)));
    }
}

/// Someone who had not let go of a phase when its time was over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// The phase.
    pub phase: Phase,
    /// Who held it.
    pub name: String,
}

impl Shutdown {
    /// Of a runtime that runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.progress.read(|progress| progress.phase)
    }

    /// When all will be over; `None` while running.
    pub fn deadline(&self) -> Option<Deadline> {
        self.progress.read(|progress| progress.deadline)
    }

    /// Waits for a phase or any later one.
    pub async fn reached(&self, phase: Phase) {
        self.progress.until(|progress| (progress.phase >= phase).then_some(())).await;
    }

    /// Takes part in a phase: it lasts until the hold is dropped. Taken before the phase begins, or it is too late.
    pub fn hold(&self, phase: Phase, name: impl Into<String>) -> Hold {
        let name = name.into();
        let number = self.progress.update(|progress| {
            progress.next += 1;
            progress.holds.insert(progress.next, (phase, name));
            progress.next
        });
        Hold { progress: self.progress.clone(), number }
    }

    /// Ends all waiting: [`Phase::Stop`] at once, as after a second signal.
    pub fn stop_at_once(&self, clock: &dyn Clock) {
        self.advance(Phase::Stop, Deadline::at(clock.now()));
    }

    /// Goes through the phases, each until nobody holds it or its share of the time until `deadline` is over, and says
    /// who was late. A second run joins the first in effect: phases only advance, and the earlier deadline counts.
    /// Dropping the future leaves the phase as it is.
    pub async fn run(&self, clock: &SharedClock, deadline: Deadline) -> Vec<Late> {
        let start = clock.now();
        let time = deadline.remaining(start);
        let mut late = Vec::new();
        for (phase, share) in PHASES {
            self.advance(phase, deadline);
            info!(?phase, "shutting down");
            let end = Deadline::after(start, share_of(time, share));
            if before(&**clock, end, self.released(phase)).await.is_err() {
                let names = self.progress.read(|progress| progress.holders(phase));
                late.extend(names.into_iter().map(|name| Late { phase, name }));
            }
        }
        for Late { phase, name } in &late {
            warn!(?phase, %name, "not done in time");
        }
        late
    }

    /// Until nobody holds the phase, or a stop at once overtakes it.
    async fn released(&self, phase: Phase) {
        let released = |progress: &Progress| {
            let overtaken = progress.phase > phase;
            (overtaken || progress.holds.values().all(|(held, _)| *held != phase)).then_some(())
        };
        self.progress.until(released).await;
    }

    fn advance(&self, phase: Phase, deadline: Deadline) {
        self.progress.update(|progress| {
            progress.phase = progress.phase.max(phase);
            progress.deadline = Some(progress.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
        });
    }
}

fn share_of(time: Duration, share: f64) -> Duration {
    // `mul_f64` panics beyond Duration's range, which a share below one cannot leave.
    time.mul_f64(share.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use futures::poll;
    use tokio::pin;

    use std::sync::Arc;

    use super::*;
    use crate::TokioClock;

    const SECOND: Duration = Duration::from_secs(1);

    fn clock() -> SharedClock {
        Arc::new(TokioClock::system())
    }

    fn four_seconds(clock: &SharedClock) -> Deadline {
        Deadline::after(clock.now(), 4 * SECOND)
    }

    #[tokio::test(start_paused = true)]
    async fn without_holds_a_shutdown_takes_no_time() {
        let (shutdown, clock) = (Shutdown::new(), clock());
        let start = clock.now();
        assert_eq!(shutdown.phase(), Phase::Running);
        assert_eq!(shutdown.run(&clock, four_seconds(&clock)).await, []);
        assert_eq!((shutdown.phase(), clock.now()), (Phase::Stop, start));
        shutdown.reached(Phase::Announce).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_phase_lasts_until_its_holds_are_dropped() {
        let (shutdown, clock) = (Shutdown::new(), clock());
        let announcing = shutdown.hold(Phase::Announce, "announcer");
        let draining = shutdown.hold(Phase::Drain, "server");
        let running = shutdown.run(&clock, four_seconds(&clock));
        pin!(running);
        assert!(poll!(&mut running).is_pending());
        assert_eq!(shutdown.phase(), Phase::Announce);
        drop(announcing);
        assert!(poll!(&mut running).is_pending());
        assert_eq!(shutdown.phase(), Phase::Drain);
        drop(draining);
        assert_eq!(running.await, []);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_let_go_is_named_and_costs_its_share() {
        let (shutdown, clock) = (Shutdown::new(), clock());
        let start = clock.now();
        let _stuck = shutdown.hold(Phase::Announce, "announcer");
        let late = shutdown.run(&clock, four_seconds(&clock)).await;
        assert_eq!(late, [Late { phase: Phase::Announce, name: "announcer".into() }]);
        assert!(clock.now() - start < SECOND + SECOND / 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_ends_all_waiting() {
        let (shutdown, clock) = (Shutdown::new(), clock());
        let start = clock.now();
        let _stuck = shutdown.hold(Phase::Drain, "server");
        let running = shutdown.run(&clock, four_seconds(&clock));
        pin!(running);
        assert!(poll!(&mut running).is_pending());
        shutdown.stop_at_once(&*clock);
        running.await;
        assert_eq!((shutdown.phase(), clock.now()), (Phase::Stop, start));
        assert_eq!(shutdown.deadline(), Some(Deadline::at(start)));
    }
}
