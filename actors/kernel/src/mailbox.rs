//! A bounded mailbox whose items are taken in batches of one key.
//!
//! Limits count rows and bytes. Items of different keys share the limits but never a batch: hivemind's servers join
//! whatever waits and lose the expert when two widths meet (wire document §12).

use std::time::Duration;

use crate::Moment;

/// A number of batch rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rows(pub u32);

/// What items of one batch have in common; opaque here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u64);

/// What a mailbox may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rows in all.
    pub rows: Rows,
    /// Payload bytes in all.
    pub bytes: usize,
}

/// The mailbox has no room; the item comes back.
#[derive(Debug)]
pub struct Full<T> {
    /// The item that found no room.
    pub item: T,
    /// Rows in line.
    pub waiting: Rows,
    /// Rows that may wait.
    pub limit: Rows,
    /// How long the head of the line has waited: a hint for when a retry makes sense.
    pub oldest_wait: Duration,
}

/// The mailbox is closed; the item comes back.
#[derive(Debug)]
pub struct Closed<T>(pub T);

/// Why a push failed.
#[derive(Debug)]
pub enum PushError<T> {
    /// No room.
    Full(Full<T>),
    /// Closed for good.
    Closed(Closed<T>),
}

/// See the module's documentation. Shared by reference; pushes and takes never block for long.
pub struct BatchMailbox<T> {
    _items: std::marker::PhantomData<fn(T)>,
}

impl<T> BatchMailbox<T> {
    /// An empty mailbox.
    pub fn new(_capacity: Capacity) -> Self {
        unimplemented!()
    }

    /// Puts an item at the end of the line.
    pub fn try_push(&self, _now: Moment, _item: T, _rows: Rows, _bytes: usize, _key: Key) -> Result<(), PushError<T>> {
        unimplemented!()
    }

    /// When the head of the line was pushed.
    pub fn oldest(&self) -> Option<Moment> {
        unimplemented!()
    }

    /// Takes items of the head's key in order, up to `max_rows` (at least one item), leaving items of other keys in
    /// line. Items that `keep` rejects are removed and returned apart, whatever their key.
    pub fn take(&self, _max_rows: Rows, _keep: impl FnMut(&T) -> bool) -> Taken<T> {
        unimplemented!()
    }

    /// Rows in line.
    pub fn waiting(&self) -> Rows {
        unimplemented!()
    }

    /// Rows in line that share the head's key: what the next batch would hold.
    pub fn head_rows(&self) -> Rows {
        unimplemented!()
    }

    /// Refuses further pushes and hands out what is in line.
    pub fn close(&self) -> Vec<T> {
        unimplemented!()
    }
}

/// What [`BatchMailbox::take`] removed.
#[derive(Debug)]
pub struct Taken<T> {
    /// The batch, in order of arrival.
    pub batch: Vec<T>,
    /// Items that are no longer wanted.
    pub dropped: Vec<T>,
}
