//! What actix lacks, and nothing of tensors, peers or wires: bounded keyed mailboxes, inboxes that outlive their actor,
//! supervision by factory, one clock, deadlines, seeded randomness, phased shutdown.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod ask;
pub mod mailbox;
pub mod time;
pub mod tombstone;

pub use ask::{AskError, Inbox, Reply, Spawner};
pub use mailbox::{BatchMailbox, Capacity, Key, Rows};
pub use time::{Clock, Deadline, Elapsed, Moment, SharedClock, TokioClock, WallTime};
pub use tombstone::{Exit, Tombstone};
