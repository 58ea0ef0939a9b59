//! What the network is doing, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// A snapshot of the network, for status pages, tests and metrics.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NetStatus {
    /// Our peer id.
    pub peer_id: String,
    /// Addresses at which others reach us.
    pub addresses: Vec<String>,
    /// Peers that are connected, in the order of their ids.
    pub connected: Vec<String>,
    /// Live connections.
    pub connections: usize,
    /// Peers in the address book.
    pub peers_known: usize,
    /// Peers in the address book that speak our protocols.
    pub peers_ours: usize,
    /// Streams that we have open at peers.
    pub streams_out: usize,
    /// Calls of others being served now.
    pub serving: usize,
    /// Calls that we made.
    pub calls_out: u64,
    /// Calls of ours that brought no answer.
    pub calls_out_failed: u64,
    /// Calls that we made on the native wire; the others were made on hivemind's.
    pub calls_out_native: u64,
    /// Calls of others that were served.
    pub calls_in: u64,
    /// Calls of others on the native wire that were served.
    pub calls_in_native: u64,
    /// Calls of others that were refused because too many were being served.
    pub calls_in_refused: u64,
    /// Calls of others whose caller left before the answer.
    pub calls_in_left: u64,
    /// Streams of others that were reset because a connection carried too many.
    pub streams_in_refused: u64,
    /// Peers that failed lately and are left alone for a while.
    pub banned: Vec<String>,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) calls_out: AtomicU64,
    pub(crate) calls_out_failed: AtomicU64,
    pub(crate) calls_out_native: AtomicU64,
    pub(crate) calls_in: AtomicU64,
    pub(crate) calls_in_native: AtomicU64,
    pub(crate) calls_in_refused: AtomicU64,
    pub(crate) calls_in_left: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
