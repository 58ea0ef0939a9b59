//! A bounded mailbox whose items are taken in batches of one key.
//!
//! Limits count rows and bytes. Items of different keys share the limits but never a batch: hivemind's servers join
//! whatever waits and lose the expert when two widths meet (docs/wire.md §12).
//!
//! Order: a batch always contains the item that has been in line longest, so no key starves another. Those who wait for
//! room ([`BatchMailbox::push_when_room`]) enter in the order in which they came, or the newest first while many leave
//! unserved; while somebody waits, nobody else is let in before them.

mod order;

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

use self::order::Departures;
use crate::{
    panics::drop_contained,
    time::{Clock, Deadline, Moment, before},
};

/// A number of batch rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rows(pub u32);

/// What items of one batch have in common; opaque here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u64);

/// What a mailbox may hold.
///
/// An item counts as at least one row. One that alone exceeds a limit is accepted by an empty mailbox and by no other,
/// so that it can be served at all; who must refuse such items checks their size first.
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

/// What [`BatchMailbox::take`] removed.
#[derive(Debug)]
pub struct Taken<T> {
    /// The batch, in order of arrival.
    pub batch: Vec<T>,
    /// Items that are no longer wanted.
    pub dropped: Vec<T>,
}

/// See the module's documentation. Shared by reference; pushes and takes never block for long.
pub struct BatchMailbox<T> {
    line: Mutex<Line<T>>,
}

impl<T> BatchMailbox<T> {
    /// An empty mailbox.
    pub fn new(capacity: Capacity) -> Self {
        Self { line: Mutex::new(Line::new(capacity)) }
    }

    /// Puts an item at the end of the line. Refused when it finds no room, or when others already wait for room.
    pub fn try_push(&self, now: Moment, item: T, rows: Rows, bytes: usize, key: Key) -> Result<(), PushError<T>> {
        let mut line = self.lock();
        if line.closed {
            return Err(PushError::Closed(Closed(item)));
        }
        let entry = Entry::new(item, rows, bytes, now);
        if !line.waiters.is_empty() || !line.fits(&entry) {
            return Err(PushError::Full(line.now_full().with(entry.item, now)));
        }
        line.append(key, entry);
        Ok(())
    }

    /// Puts an item at the end of the line as soon as there is room, in the order of the calls; [`PushError::Full`]
    /// when the deadline passes first.
    ///
    /// Under lasting overload, that is once more than one in eight leaves unserved and until less than one in 32 does, the
    /// newest enter first: in order of arrival everybody would reach the head of the line when about to leave, and work
    /// would be done for nobody.
    ///
    /// Dropping the future gives up the place and drops the item, unless the item already is in line. An item counts as
    /// waiting from the moment of the call. The number of waiters is not limited here: whoever calls this holds a permit
    /// of its own.
    pub async fn push_when_room(
        &self,
        clock: &dyn Clock,
        deadline: Deadline,
        item: T,
        rows: Rows,
        bytes: usize,
        key: Key,
    ) -> Result<(), PushError<T>> {
        let since = clock.now();
        let (ticket, mut entered) = {
            let mut line = self.lock();
            if line.closed {
                return Err(PushError::Closed(Closed(item)));
            }
            let entry = Entry::new(item, rows, bytes, since);
            if line.waiters.is_empty() && line.fits(&entry) {
                line.append(key, entry);
                return Ok(());
            }
            let (enter, entered) = oneshot::channel();
            (line.wait(Waiter { key, entry, enter }), entered)
        };
        let place = Place { mailbox: self, ticket };
        let outcome = match before(clock, deadline, &mut entered).await {
            Ok(outcome) => outcome,
            Err(_) => match place.give_up() {
                Some((item, now_full)) => {
                    return Err(PushError::Full(now_full.with(item, clock.now())));
                }
                // It left the waiters between the alarm and this line: the outcome is being sent.
                None => entered.await,
            },
        };
        outcome.expect("who removes a waiter tells it why").map_err(PushError::Closed)
    }

    /// When the head of the line was pushed.
    pub fn oldest(&self) -> Option<Moment> {
        self.lock().head().map(|(_, entry)| entry.since)
    }

    /// Takes items of the head's key in order, up to `max_rows` (at least one item), leaving items of other keys in
    /// line. Items that `keep` rejects are removed and returned apart, whatever their key. `keep` runs under the
    /// mailbox's lock, once for every item in line: it must be cheap and must not use the mailbox.
    pub fn take(&self, max_rows: Rows, keep: impl FnMut(&T) -> bool) -> Taken<T> {
        let mut line = self.lock();
        let dropped = line.sweep(keep);
        let batch = line.take_batch(max_rows);
        line.departures.left(dropped.len());
        line.departures.served(batch.len());
        let entered = line.admit();
        drop(line);
        announce(entered);
        Taken { batch, dropped }
    }

    /// Rows in line.
    pub fn waiting(&self) -> Rows {
        self.lock().rows_in_line()
    }

    /// Rows in line that share the head's key: what the next batch would hold.
    pub fn head_rows(&self) -> Rows {
        let line = self.lock();
        let rows = line.head().map(|(key, _)| line.lanes[&key].rows);
        narrow(rows.unwrap_or(0))
    }

    /// Whether nothing is in line. While something is, nobody waits for room in vain.
    pub fn is_empty(&self) -> bool {
        self.lock().lanes.is_empty()
    }

    /// Refuses further pushes and hands out what is in line, in order of arrival. Those who wait for room get their item
    /// back as [`PushError::Closed`].
    pub fn close(&self) -> Vec<T> {
        let mut line = self.lock();
        line.closed = true;
        let in_line = line.clear();
        let waiters = mem::take(&mut line.waiters);
        drop(line);
        for waiter in waiters.into_values() {
            // The item of one who left meanwhile is dropped here, before the others are told.
            drop_contained(waiter.enter.send(Err(Closed(waiter.entry.item))));
        }
        in_line
    }

    fn lock(&self) -> MutexGuard<'_, Line<T>> {
        // Only a panic in a caller's `keep` poisons the lock; it runs between two consistent states.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among those who wait for room; given up when dropped.
struct Place<'a, T> {
    mailbox: &'a BatchMailbox<T>,
    ticket: u64,
}

impl<T> Place<'_, T> {
    /// The item, unless it has entered the line.
    fn give_up(&self) -> Option<(T, NowFull)> {
        let mut line = self.mailbox.lock();
        let waiter = line.waiters.remove(&self.ticket)?;
        line.departures.left(1);
        let now_full = line.now_full();
        // The next in line may be smaller.
        let entered = line.admit();
        drop(line);
        announce(entered);
        Some((waiter.entry.item, now_full))
    }
}

impl<T> Drop for Place<'_, T> {
    fn drop(&mut self) {
        drop(self.give_up());
    }
}

type Enter<T> = oneshot::Sender<Result<(), Closed<T>>>;

fn announce<T>(entered: Vec<Enter<T>>) {
    for enter in entered {
        let _left_meanwhile = enter.send(Ok(()));
    }
}

struct Entry<T> {
    item: T,
    rows: Rows,
    bytes: usize,
    since: Moment,
}

impl<T> Entry<T> {
    fn new(item: T, rows: Rows, bytes: usize, since: Moment) -> Self {
        Self { item, rows: Rows(rows.0.max(1)), bytes, since }
    }
}

struct Waiter<T> {
    key: Key,
    entry: Entry<T>,
    enter: Enter<T>,
}

/// The items of one key in order of arrival; never empty.
struct Lane<T> {
    entries: VecDeque<(u64, Entry<T>)>,
    rows: u64,
}

/// Everything behind the lock. Waiters exist only while something is in line.
struct Line<T> {
    capacity: Capacity,
    lanes: BTreeMap<Key, Lane<T>>,
    rows: u64,
    bytes: usize,
    waiters: BTreeMap<u64, Waiter<T>>,
    departures: Departures,
    /// Number of the next arrival, in line or among the waiters.
    next: u64,
    closed: bool,
}

impl<T> Line<T> {
    fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            lanes: BTreeMap::new(),
            rows: 0,
            bytes: 0,
            waiters: BTreeMap::new(),
            departures: Departures::default(),
            next: 0,
            closed: false,
        }
    }

    fn fits(&self, entry: &Entry<T>) -> bool {
        let rows_fit = self.rows + u64::from(entry.rows.0) <= u64::from(self.capacity.rows.0);
        let bytes_fit = self.bytes.saturating_add(entry.bytes) <= self.capacity.bytes;
        self.lanes.is_empty() || (rows_fit && bytes_fit)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn append(&mut self, key: Key, entry: Entry<T>) {
        let number = self.number();
        self.rows += u64::from(entry.rows.0);
        self.bytes = self.bytes.saturating_add(entry.bytes);
        let lane = self.lanes.entry(key).or_insert_with(|| Lane { entries: VecDeque::new(), rows: 0 });
        lane.rows += u64::from(entry.rows.0);
        lane.entries.push_back((number, entry));
    }

    fn wait(&mut self, waiter: Waiter<T>) -> u64 {
        let ticket = self.number();
        self.waiters.insert(ticket, waiter);
        ticket
    }

    /// Lets waiters in while the first of them fits.
    fn admit(&mut self) -> Vec<Enter<T>> {
        let mut entered = Vec::new();
        let newest_first = self.departures.newest_first();
        loop {
            let mut waiters = self.waiters.iter();
            let first = if newest_first { waiters.next_back() } else { waiters.next() };
            let Some((ticket, _)) = first.filter(|(_, first)| self.fits(&first.entry)) else { return entered };
            let ticket = *ticket;
            let waiter = self.waiters.remove(&ticket).expect("it was just seen");
            self.append(waiter.key, waiter.entry);
            entered.push(waiter.enter);
        }
    }

    /// The key and the item that has waited longest.
    fn head(&self) -> Option<(Key, &Entry<T>)> {
        let fronts = self.lanes.iter().filter_map(|(key, lane)| lane.entries.front().map(|front| (key, front)));
        fronts.min_by_key(|(_, (number, _))| *number).map(|(key, (_, entry))| (*key, entry))
    }

    /// Removes what `keep` rejects.
    fn sweep(&mut self, mut keep: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut dropped = Vec::new();
        let keys: Vec<Key> = self.lanes.keys().copied().collect();
        for key in keys {
            let lane = &self.lanes[&key];
            let verdicts: Vec<bool> = lane.entries.iter().map(|(_, entry)| keep(&entry.item)).collect();
            if verdicts.iter().all(|kept| *kept) {
                continue;
            }
            let mut lane = self.lanes.remove(&key).expect("the key was just listed");
            for ((number, entry), kept) in mem::take(&mut lane.entries).into_iter().zip(verdicts) {
                if kept {
                    lane.entries.push_back((number, entry));
                } else {
                    lane.rows -= u64::from(entry.rows.0);
                    dropped.push(self.release(entry));
                }
            }
            if !lane.entries.is_empty() {
                self.lanes.insert(key, lane);
            }
        }
        dropped
    }

    fn take_batch(&mut self, max_rows: Rows) -> Vec<T> {
        let mut batch = Vec::new();
        let Some((key, _)) = self.head() else {
            return batch;
        };
        let mut lane = self.lanes.remove(&key).expect("the head has a lane");
        let mut room = u64::from(max_rows.0);
        while let Some((_, entry)) = lane.entries.front() {
            let rows = u64::from(entry.rows.0);
            if rows > room && !batch.is_empty() {
                break;
            }
            room = room.saturating_sub(rows);
            lane.rows -= rows;
            let (_, entry) = lane.entries.pop_front().expect("the front was just seen");
            batch.push(self.release(entry));
        }
        if !lane.entries.is_empty() {
            self.lanes.insert(key, lane);
        }
        batch
    }

    /// Removes everything; in order of arrival.
    fn clear(&mut self) -> Vec<T> {
        let lanes = mem::take(&mut self.lanes).into_values();
        let mut entries: Vec<(u64, Entry<T>)> = lanes.flat_map(|lane| lane.entries).collect();
        entries.sort_unstable_by_key(|(number, _)| *number);
        entries.into_iter().map(|(_, entry)| self.release(entry)).collect()
    }

    fn release(&mut self, entry: Entry<T>) -> T {
        self.rows -= u64::from(entry.rows.0);
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        entry.item
    }

    fn rows_in_line(&self) -> Rows {
        narrow(self.rows)
    }

    fn now_full(&self) -> NowFull {
        let oldest = self.head().map(|(_, entry)| entry.since);
        NowFull { waiting: self.rows_in_line(), limit: self.capacity.rows, oldest }
    }
}

/// How full a mailbox was when it refused an item.
struct NowFull {
    waiting: Rows,
    limit: Rows,
    oldest: Option<Moment>,
}

impl NowFull {
    fn with<T>(self, item: T, now: Moment) -> Full<T> {
        let oldest_wait = self.oldest.map_or(Duration::ZERO, |since| now.since(since));
        Full { item, waiting: self.waiting, limit: self.limit, oldest_wait }
    }
}

fn narrow(rows: u64) -> Rows {
    Rows(u32::try_from(rows).unwrap_or(u32::MAX))
}
