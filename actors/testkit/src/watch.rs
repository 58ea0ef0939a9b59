//! [`Watch`]: notices code that spends real time waiting, which virtual time knows nothing of.

#![allow(clippy::disallowed_methods, reason = "real time is what is watched here")]

use std::{
    cell::{Cell, RefCell},
    fs, panic,
    sync::Once,
    time::{Duration, Instant},
};

use crate::process::current_node;

/// Real time that one turn of a node may spend waiting. Less may be a page fault.
const PATIENCE: Duration = Duration::from_millis(100);
/// Real time after which the thread's account is read anew.
const FRESH: Duration = Duration::from_millis(10);

thread_local! {
    /// Whether a panic was printed on this thread meanwhile: that reads files and waits for other threads that print.
    static PANICKED: Cell<bool> = const { Cell::new(false) };
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// The thread's account of real time: what it did not spend running or queueing for a core, it spent waiting.
///
/// Only Linux keeps it (`/proc/thread-self/schedstat`); elsewhere nothing is noticed.
pub(crate) struct Watch {
    at: Instant,
    busy: Duration,
    /// Who waited, and for how long.
    caught: Option<(u32, Duration)>,
}

impl Watch {
    /// Begins to watch this thread.
    pub fn begin() {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let print = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                PANICKED.set(true);
                print(info);
            }));
        });
        let watch = busy().map(|busy| Watch { at: Instant::now(), busy, caught: None });
        WATCH.set(watch);
    }

    /// Ends watching; who waited, if anybody did.
    pub fn end() -> Option<(u32, Duration)> {
        WATCH.take().and_then(|watch| watch.caught)
    }

    /// Runs one turn of a node.
    pub fn over<R>(turn: impl FnOnce() -> R) -> R {
        Self::look(current_node());
        let result = turn();
        Self::look(current_node());
        result
    }

    /// Reads the clock; if much time has passed, also what the thread did meanwhile.
    pub fn look(node: u32) {
        WATCH.with_borrow_mut(|watch| {
            let Some(watch) = watch else { return };
            let passed = watch.at.elapsed();
            if passed < FRESH {
                return;
            }
            let Some(busy) = busy() else { return };
            let waited = passed.saturating_sub(busy.saturating_sub(watch.busy));
            (watch.at, watch.busy) = (Instant::now(), busy);
            if !PANICKED.take() && waited >= PATIENCE {
                watch.caught.get_or_insert((node, waited));
            }
        });
    }
}

/// Time that this thread has run or queued for a core.
fn busy() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let mut numbers = stat.split_whitespace().map_while(|number| number.parse::<u64>().ok());
    let (ran, queued) = (numbers.next()?, numbers.next()?);
    Some(Duration::from_nanos(ran.checked_add(queued)?))
}
