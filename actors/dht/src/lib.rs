//! The hivemind DHT protocol: a sans-IO core, the `DhtActor` around it, announcing and looking up experts. No sockets: it
//! calls other nodes through [`skep_rpc::Transport`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod handle;
mod key;
mod messages;

pub use handle::Dht;
pub use key::{DhtId, DhtKey};
pub use messages::{DhtError, Freshness, Hosted, StoreItem, Stored, SuccessorTable, Successors, Timed};
