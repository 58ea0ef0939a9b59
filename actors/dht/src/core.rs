//! The protocol without I/O: what comes in, what goes out, and when to look again. Seeded, ordered, no clock of its own.
//! Section numbers (§6.9) in its comments are those of docs/wire.md.

pub(crate) mod bucket;
pub(crate) mod cache;
pub(crate) mod expert_types;
pub(crate) mod id;
pub(crate) mod message;
pub(crate) mod node;
pub(crate) mod record;
pub(crate) mod routing;
pub(crate) mod search;
pub(crate) mod signature;
pub(crate) mod storage;
pub(crate) mod timed;
pub(crate) mod validate;

#[cfg(test)]
mod vectors;
