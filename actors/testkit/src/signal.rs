//! [`Signal`]: a value that many wait for, told in the order in which they came. tokio's `watch` draws that order from
//! randomness of its own, so a simulation that used it could not be replayed.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// Cheap to clone; clones share the value.
#[derive(Clone, Default)]
pub(crate) struct Signal<T>(Arc<Inner<T>>);

#[derive(Default)]
struct Inner<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T: Copy> Signal<T> {
    /// A signal with this value.
    pub fn new(value: T) -> Self {
        Self(Arc::new(Inner { value: Mutex::new(value), changed: Notify::new() }))
    }

    /// The value now.
    pub fn get(&self) -> T {
        *self.0.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the value and tells whoever waits.
    pub fn set(&self, value: T) {
        *self.0.value.lock().unwrap_or_else(PoisonError::into_inner) = value;
        self.0.changed.notify_waiters();
    }

    /// Waits until `work` makes something of the value.
    pub async fn until<R>(&self, mut work: impl FnMut(T) -> Option<R>) -> R {
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            // Registered before the value is read: no change in between is missed.
            changed.as_mut().enable();
            if let Some(result) = work(self.get()) {
                return result;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn those_who_wait_are_told_in_the_order_in_which_they_came() {
        let (signal, order) = (Signal::new(false), Arc::new(Mutex::new(Vec::new())));
        let waiters = (0..32).map(|number| {
            let (signal, order) = (signal.clone(), order.clone());
            tokio::spawn(async move {
                signal.until(|on| on.then_some(())).await;
                order.lock().unwrap().push(number);
            })
        });
        let waiters: Vec<_> = waiters.collect();
        tokio::task::yield_now().await;
        signal.set(true);
        futures::future::join_all(waiters).await;
        assert_eq!(*order.lock().unwrap(), (0..32).collect::<Vec<_>>());
    }
}
