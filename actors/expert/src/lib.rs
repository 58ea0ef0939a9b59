//! Experts as actors and the server that hosts many of them: mailboxes that batch, ready tokens, stream executors, the
//! request handler. Knows no torch: whatever computes sits behind [`Backend`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backend;

pub use backend::{Backend, BackendError, BackendFactory, Batch, Snapshot};
