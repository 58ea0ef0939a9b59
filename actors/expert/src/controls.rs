//! Other work on an expert's backend than batches: saving, reloading.

use std::{
    collections::VecDeque,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::expert::Slot;

/// Runs on the executor that owns the expert, between two batches.
pub(crate) type Control = Box<dyn FnOnce(&mut Slot) + Send>;

/// Control work that may wait for one expert.
pub(crate) const MAX_CONTROLS: usize = 16;

/// Why control work was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoControl {
    /// [`MAX_CONTROLS`] are waiting.
    Full,
    /// The expert has ended.
    Closed,
}

/// Control work in line.
#[derive(Default)]
pub(crate) struct Controls(Mutex<Line>);

#[derive(Default)]
struct Line {
    waiting: VecDeque<Control>,
    closed: bool,
}

impl Controls {
    /// Puts work in line. Who succeeds moves the expert's token.
    pub fn push(&self, control: Control) -> Result<(), NoControl> {
        let mut line = self.lock();
        if line.closed {
            return Err(NoControl::Closed);
        }
        if line.waiting.len() >= MAX_CONTROLS {
            return Err(NoControl::Full);
        }
        line.waiting.push_back(control);
        Ok(())
    }

    pub fn take(&self) -> Option<Control> {
        self.lock().waiting.pop_front()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().waiting.is_empty()
    }

    /// Drops what is in line, so that whoever waits for it hears of the end, and lets nothing in any more that nobody
    /// would take.
    pub fn close(&self) {
        let dropped = {
            let mut line = self.lock();
            line.closed = true;
            mem::take(&mut line.waiting)
        };
        drop(dropped);
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn an_end_is_heard_by_those_in_line_and_by_those_who_come_too_late() {
        let controls = Controls::default();
        let work = || {
            let (done, result) = oneshot::channel::<()>();
            let control: Control = Box::new(move |_| drop(done));
            (control, result)
        };
        let (control, mut result) = work();
        assert_eq!(controls.push(control), Ok(()));
        controls.close();
        assert_eq!(result.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        let (too_late, _result) = work();
        assert_eq!(controls.push(too_late), Err(NoControl::Closed));
        assert!(controls.is_empty());
    }

    #[test]
    fn so_many_wait_and_no_more() {
        let controls = Controls::default();
        assert!((0..MAX_CONTROLS).all(|_| controls.push(Box::new(|_| {})).is_ok()));
        assert_eq!(controls.push(Box::new(|_| {})), Err(NoControl::Full));
        assert!(controls.take().is_some());
        assert_eq!(controls.push(Box::new(|_| {})), Ok(()));
    }
}
