//! [`Signal`]: a value that many wait for, told in the order in which they came. tokio's `watch` draws that order from
//! randomness of its own, so a simulation that used it could not be replayed.

use std::{
    fmt, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// A shared value whose changes wake whoever waits for them. Cheap to clone; clones share the value.
///
/// What is given a reference to the value runs under its lock: it must neither block nor use the same signal.
///
/// ```
/// use futures::FutureExt;
/// use skep_kernel::Signal;
///
/// let rows = Signal::new(0);
/// let waiting = rows.until(|rows| (*rows > 2).then_some(rows * 10));
/// rows.set(3);
/// assert_eq!(waiting.now_or_never(), Some(30));
/// ```
pub struct Signal<T>(Arc<Inner<T>>);

struct Inner<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

struct State<T> {
    value: T,
    changes: u64,
}

impl<T> Clone for Signal<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Default> Default for Signal<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug> fmt::Debug for Signal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signal").field(&self.state().value).finish()
    }
}

impl<T> Signal<T> {
    /// A signal with this value.
    pub fn new(value: T) -> Self {
        Self(Arc::new(Inner { state: Mutex::new(State { value, changes: 0 }), changed: Notify::new() }))
    }

    /// The value now.
    pub fn get(&self) -> T
    where
        T: Clone,
    {
        self.state().value.clone()
    }

    /// Looks at the value now.
    pub fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.state().value)
    }

    /// Sets the value and wakes whoever waits, also when it is an equal one.
    pub fn set(&self, value: T) {
        // The old value is dropped when the lock is free again.
        let _old = self.update(|now| mem::replace(now, value));
    }

    /// Changes the value in its place and wakes whoever waits.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut result = None;
        self.update_if(|value| {
            result = Some(change(value));
            true
        });
        result.expect("the change was made")
    }

    /// As [`update`](Self::update), but wakes only when `change` says that it changed something, which is returned.
    pub fn update_if(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = {
            let mut state = self.state();
            let changed = change(&mut state.value);
            state.changes += u64::from(changed);
            changed
        };
        if changed {
            self.0.changed.notify_waiters();
        }
        changed
    }

    /// Waits until `met` makes something of the value: of the one now, or of a later one. Values that are replaced
    /// before this task runs are not seen. Dropping the future leaves the line.
    pub async fn until<R>(&self, mut met: impl FnMut(&T) -> Option<R>) -> R {
        self.until_state(|state| met(&state.value)).await
    }

    /// Reads along from now on.
    pub fn follow(&self) -> Follower<T> {
        Follower { signal: self.clone(), seen: self.state().changes }
    }

    async fn until_state<R>(&self, mut met: impl FnMut(&State<T>) -> Option<R>) -> R {
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            // Registered before the value is read: no change in between is missed.
            changed.as_mut().enable();
            if let Some(result) = met(&self.state()) {
                return result;
            }
            changed.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a [`Signal`], and knows which of its changes it has seen. A clone has seen the same.
pub struct Follower<T> {
    signal: Signal<T>,
    seen: u64,
}

impl<T> Clone for Follower<T> {
    fn clone(&self) -> Self {
        Self { signal: self.signal.clone(), seen: self.seen }
    }
}

impl<T: fmt::Debug> fmt::Debug for Follower<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Follower").field(&self.signal.state().value).finish()
    }
}

impl<T> Follower<T> {
    /// The value now.
    pub fn get(&self) -> T
    where
        T: Clone,
    {
        self.signal.get()
    }

    /// As [`Signal::until`]; changes count as unseen all the same.
    pub async fn until<R>(&self, met: impl FnMut(&T) -> Option<R>) -> R {
        self.signal.until(met).await
    }

    /// Waits for a change that it has not seen; several are one. Dropping the future leaves them unseen.
    pub async fn changed(&mut self) {
        let seen = self.seen;
        self.seen = self.signal.until_state(|state| (state.changes != seen).then_some(state.changes)).await;
    }

    /// What has changed so far counts as seen.
    pub fn catch_up(&mut self) {
        self.seen = self.signal.state().changes;
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, poll};
    use tokio::pin;

    use super::*;

    #[tokio::test]
    async fn those_who_wait_are_told_in_the_order_in_which_they_came() {
        let (signal, order) = (Signal::new(false), Arc::new(Mutex::new(Vec::new())));
        let waiters = (0..100).map(|number| {
            let (signal, order) = (signal.clone(), order.clone());
            tokio::spawn(async move {
                signal.until(|on| on.then_some(())).await;
                order.lock().unwrap().push(number);
            })
        });
        let waiters: Vec<_> = waiters.collect();
        // More than run in one turn of the runtime.
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        signal.set(true);
        futures::future::join_all(waiters).await;
        assert_eq!(*order.lock().unwrap(), (0..100).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_holds_already_is_not_waited_for_and_what_is_not_met_is_waited_for_on() {
        let signal = Signal::new(1);
        assert_eq!(signal.until(|value| (*value == 1).then_some("one")).now_or_never(), Some("one"));
        let three = signal.until(|value| (*value == 3).then_some(()));
        pin!(three);
        assert!(poll!(&mut three).is_pending());
        signal.set(2);
        assert!(poll!(&mut three).is_pending());
        assert_eq!(signal.update(|value| mem::replace(value, 3)), 2);
        assert!(poll!(&mut three).is_ready());
    }

    #[tokio::test]
    async fn a_follower_hears_of_each_change_once_and_of_none_that_changed_nothing() {
        let signal = Signal::new(0);
        let mut follower = signal.follow();
        signal.set(1);
        signal.set(1);
        assert_eq!((follower.changed().now_or_never(), follower.get()), (Some(()), 1));
        assert_eq!(follower.changed().now_or_never(), None);
        assert!(!signal.update_if(|_value| false));
        assert_eq!(follower.changed().now_or_never(), None);
        signal.set(2);
        follower.catch_up();
        assert_eq!(follower.changed().now_or_never(), None);
    }

    #[tokio::test]
    async fn a_change_that_nobody_waited_for_any_more_is_not_lost() {
        let signal = Signal::new(0);
        let mut follower = signal.follow();
        {
            let changed = follower.changed();
            pin!(changed);
            assert!(poll!(&mut changed).is_pending());
            signal.set(1);
        }
        assert_eq!(follower.changed().now_or_never(), Some(()));
    }

    #[test]
    fn a_change_that_panics_leaves_the_signal_usable() {
        let signal = Signal::new(1);
        let update = std::panic::AssertUnwindSafe(|| signal.update(|_value| panic!("half way")));
        let _panicked = std::panic::catch_unwind(update).unwrap_err();
        signal.set(2);
        assert_eq!(signal.get(), 2);
    }
}
