//! Experts as actors and the server that hosts many of them: mailboxes that batch, ready tokens, stream executors, the
//! request handler. Knows no torch: whatever computes sits behind [`Backend`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod actor;
mod backend;
mod batch;
mod checkpoint;
mod checkpointer;
mod config;
mod controls;
mod device;
mod distribution;
mod executor;
mod expert;
mod handle;
mod reviver;
mod saving;
mod schema;
mod server;
mod task;

pub use actor::{ExpertActor, ExpertInbox, ExpertMessage};
pub use backend::{Backend, BackendError, BackendFactory, Batch, Snapshot};
pub use checkpoint::{
    Checkpoint, CheckpointId, CheckpointStore, DirectoryCheckpoints, Manifest, MemoryCheckpoints, SharedStore,
    StoreError,
};
pub use config::{ConfigError, ServerConfig};
pub use device::{Cpu, Device, Lane, Outcome};
pub use executor::{Cost, Seat, Streams};
pub use expert::ExpertState;
pub use handle::{Accepted, ExpertHandle, ExpertStatus};
pub use saving::LAST_CHECKPOINT;
pub use server::{
    Executors, ExpertPattern, HostedExpert, Place, PlacementError, Server, ServerError, ServerParts, ServerStatus,
    TakePlaces, choose_uids,
};
pub use task::{Kind, TaskResult};
