//! What actix lacks, and nothing of tensors, peers or wires: bounded keyed mailboxes, inboxes that outlive their actor,
//! supervision by factory, one clock, deadlines, seeded randomness, phased shutdown.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod ask;
pub mod guardian;
pub mod mailbox;
pub mod panics;
pub mod pump;
pub mod random;
pub mod restart;
pub mod shutdown;
pub mod signal;
pub mod time;
pub mod token;
pub mod tombstone;

/// What `token` is made of; its loom test brings loom's.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicU8, Ordering};
}

pub use ask::{AskError, Inbox, Reply, Spawner};
pub use guardian::{ChildSpec, Guardian, GuardianHandle, GuardianSpec, Started, Stop, Strategy};
pub use mailbox::{BatchMailbox, Capacity, Closed, Full, Key, PushError, Rows, Taken};
pub use pump::pump;
pub use random::Seed;
pub use restart::{Intensity, Restart};
pub use shutdown::{Phase, Shutdown};
pub use signal::{Follower, Signal};
pub use time::{Clock, Deadline, Elapsed, Moment, SharedClock, TokioClock, WallTime};
pub use token::{Parking, ReadyToken};
pub use tombstone::{Exit, Tombstone};
