//! The hivemind DHT protocol: a sans-IO core, the `DhtActor` around it, announcing and looking up experts. No sockets: it
//! calls other nodes through [`skep_rpc::Transport`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod actor;
mod announcer;
mod config;
mod core;
mod experts;
mod handle;
mod key;
mod lookup;
mod messages;
#[doc(hidden)]
pub mod probe;
mod serve;

pub use self::core::{
    signature::{BadRecordKey, RecordKey},
    validate::{DhtRecord, RecordValidator, Validators},
};
pub use actor::DhtActor;
pub use announcer::{Announced, Announcer, AnnouncerActor};
pub use config::{BadDhtConfig, DhtConfig};
pub use handle::{Dht, DhtParts};
pub use key::{DhtId, DhtKey};
pub use lookup::{ListLimits, Listed, ListedSuccessors};
pub use messages::{DhtError, DhtStatus, Freshness, Hosted, StoreItem, Stored, SuccessorTable, Successors, Timed};
