//! Why the network's thread does not sleep at once: to wake a sleeping core takes longer than all the rest of a small
//! call. After a connection had something to do, the thread looks for more for a moment, and lets others run meanwhile.
//! Where others want the core for long it does better to sleep: who wakes up goes before who computes.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use skep_kernel::{Deadline, SharedClock};
use tokio::sync::Notify;

/// Who has the core for so long while it looks computes.
const COMPUTES: Duration = Duration::from_micros(500);
/// For how long the thread sleeps at once after it met somebody who computes.
const STAND_BACK: Duration = Duration::from_millis(20);

/// Shared by the connections of a network and the task that keeps its thread awake.
pub(crate) struct BusyPoll {
    clock: SharedClock,
    window: Duration,
    /// Counts what connections had to do.
    turns: AtomicU64,
    is_looking: AtomicBool,
    wake: Notify,
}

impl BusyPoll {
    /// Looks for `window` after the last turn; never if that is zero.
    pub(crate) fn new(clock: SharedClock, window: Duration) -> Self {
        Self { clock, window, turns: AtomicU64::new(0), is_looking: AtomicBool::new(false), wake: Notify::new() }
    }

    /// A connection had something to do.
    pub(crate) fn on_turn(&self) {
        if self.window.is_zero() {
            return;
        }
        // A turn that is missed costs the wake-up that this is to save, no more.
        self.turns.fetch_add(1, Ordering::Relaxed);
        if !self.is_looking.load(Ordering::Relaxed) {
            self.wake.notify_one();
        }
    }

    /// Keeps the thread that runs it awake as said. Never ends.
    pub(crate) async fn keep_awake(&self) {
        loop {
            self.wake.notified().await;
            self.is_looking.store(true, Ordering::Relaxed);
            let others_compute = self.look().await;
            if others_compute {
                self.clock.sleep_until(self.clock.now() + STAND_BACK).await;
            }
            self.is_looking.store(false, Ordering::Relaxed);
        }
    }

    /// Returns when nothing has happened for the window, or at once with `true` when somebody computes on this core.
    async fn look(&self) -> bool {
        let mut seen = self.turns.load(Ordering::Relaxed);
        let mut now = self.clock.now();
        let mut end = Deadline::after(now, self.window);
        while !end.has_passed(now) {
            // The runtime polls its sockets between two turns of a task that yields.
            tokio::task::yield_now().await;
            // Whoever else wants this core, most of all the experts.
            let yields = self.clock.now();
            std::thread::yield_now();
            now = self.clock.now();
            if now.since(yields) > COMPUTES {
                return true;
            }
            let turns = self.turns.load(Ordering::Relaxed);
            if turns != seen {
                seen = turns;
                end = Deadline::after(now, self.window);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use skep_kernel::{TokioClock, WallTime};

    use super::*;

    /// Whether it looks, so many microseconds later. One yield for each microsecond.
    async fn looks_after(busy: &BusyPoll, micros: u64) -> bool {
        for _ in 0..micros {
            tokio::time::advance(Duration::from_micros(1)).await;
            tokio::task::yield_now().await;
        }
        busy.is_looking.load(Ordering::Relaxed)
    }

    fn start(window: Duration) -> Arc<BusyPoll> {
        let clock: SharedClock = Arc::new(TokioClock::starting_at(WallTime(0.0)));
        let busy = Arc::new(BusyPoll::new(clock, window));
        let looker = busy.clone();
        tokio::spawn(async move { looker.keep_awake().await });
        busy
    }

    #[tokio::test(start_paused = true)]
    async fn the_thread_stays_awake_for_the_window_after_the_last_turn_of_a_connection() {
        let busy = start(Duration::from_micros(50));
        assert!(!looks_after(&busy, 200).await, "nothing has happened yet");
        busy.on_turn();
        assert!(looks_after(&busy, 40).await);
        busy.on_turn();
        assert!(looks_after(&busy, 40).await, "the second turn begins the window anew");
        assert!(!looks_after(&busy, 20).await);
        busy.on_turn();
        assert!(looks_after(&busy, 40).await);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_window_it_sleeps_at_once() {
        let busy = start(Duration::ZERO);
        busy.on_turn();
        assert!(!looks_after(&busy, 1).await);
    }
}
