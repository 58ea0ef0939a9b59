//! Calls between peers, whoever carries them: the ports [`Transport`] and [`Service`]. No sockets, no actors.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod bans;
mod call;
mod error;
mod request_ids;
mod router;
mod service;
mod transport;

pub use bans::Bans;
pub use call::{Answer, Body, Call, Inbound, Meta, RequestId, ServerLoad, TensorBody, TraceContext};
pub use error::{RpcError, ServeError, Step};
pub use request_ids::{Admission, Ending, RequestIds, RequestKey, RequestLimits};
pub use router::Router;
pub use service::{Service, SharedService};
pub use transport::{SharedTransport, Transport};
