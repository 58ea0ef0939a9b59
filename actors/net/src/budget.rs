//! Memory for messages of peers, counted in bytes.

use std::sync::Arc;

use skep_rpc::RpcError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The largest budget.
pub(crate) const MAX_BYTES: usize = Semaphore::MAX_PERMITS;

/// Bytes that may be held at once.
pub(crate) struct Budget {
    free: Arc<Semaphore>,
    limit: usize,
}

/// Bytes of a budget; dropping it gives them back.
pub(crate) struct Held(OwnedSemaphorePermit);

/// Why bytes cannot be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// There are fewer in all.
    Never {
        /// How many there are.
        limit: usize,
    },
    /// Others hold too many of them.
    Now {
        /// How many there are.
        limit: usize,
    },
}

impl NoRoom {
    /// What the caller hears whose answer of `size` bytes has no room.
    pub(crate) fn for_answer(self, size: usize) -> RpcError {
        match self {
            NoRoom::Never { limit } => RpcError::TooLarge { size, limit },
            NoRoom::Now { limit } => RpcError::NoRoom { size, limit },
        }
    }
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        let limit = bytes.min(MAX_BYTES);
        Self { free: Arc::new(Semaphore::new(limit)), limit }
    }

    /// Takes so many bytes, or none.
    pub(crate) fn hold(&self, bytes: usize) -> Result<Held, NoRoom> {
        let limit = self.limit;
        let count = u32::try_from(bytes).ok().filter(|_| bytes <= limit).ok_or(NoRoom::Never { limit })?;
        self.free.clone().try_acquire_many_owned(count).map(Held).map_err(|_| NoRoom::Now { limit })
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.free.available_permits()
    }
}

impl Held {
    /// Holds the other bytes, too.
    pub(crate) fn merge(&mut self, other: Held) {
        self.0.merge(other.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_fits_is_told_from_what_does_not_fit_now() {
        let budget = Budget::new(10);
        let mut held = budget.hold(4).unwrap();
        held.merge(budget.hold(6).unwrap());
        assert_eq!(budget.hold(1).err(), Some(NoRoom::Now { limit: 10 }));
        assert_eq!(budget.hold(11).err(), Some(NoRoom::Never { limit: 10 }));
        drop(held);
        assert!(budget.hold(10).is_ok());
        assert_eq!(budget.free(), 10);
    }

    #[test]
    fn more_than_can_be_counted_never_fits() {
        let budget = Budget::new(usize::MAX);
        assert_eq!(budget.hold(usize::MAX).err(), Some(NoRoom::Never { limit: MAX_BYTES }));
        assert!(budget.hold(u32::MAX as usize).is_ok());
    }
}
