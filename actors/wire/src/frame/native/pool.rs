//! Memory of large bodies, kept for the next ones.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

/// Bodies from this size on are worth keeping memory for: less comes cheap from the allocator.
pub(super) const POOLED: usize = 256 << 10;

/// Buffers of bodies that have been dropped. Fresh memory must be made by the system, a page at a time, which costs more
/// than what travels in it; these have been used before.
///
/// Keeps so many bytes at the most; over that the buffers unused for longest go. A body gets a buffer of at most twice its
/// size.
#[derive(Debug)]
pub struct Pool {
    limit: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// In the order in which they came back.
    buffers: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Pool {
    /// A pool of at most `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, kept: Mutex::default() })
    }

    /// Bytes of the buffers that wait for their next use.
    pub fn kept(&self) -> usize {
        self.lock().bytes
    }

    /// The smallest buffer that suits a body of `bytes`. What is in it are bytes of an earlier body.
    fn take(&self, bytes: usize) -> Option<Vec<u8>> {
        let mut kept = self.lock();
        let suits = |buffer: &Vec<u8>| (bytes..=bytes.saturating_mul(2)).contains(&buffer.len());
        let suited = kept.buffers.iter().enumerate().filter(|(_, buffer)| suits(buffer));
        let (at, _) = suited.min_by_key(|(_, buffer)| buffer.len())?;
        let buffer = kept.buffers.remove(at)?;
        kept.bytes -= buffer.len();
        Some(buffer)
    }

    fn keep(&self, buffer: Vec<u8>) {
        if buffer.len() > self.limit {
            return;
        }
        let mut dropped = Vec::new();
        let mut kept = self.lock();
        kept.bytes += buffer.len();
        kept.buffers.push_back(buffer);
        while kept.bytes > self.limit {
            let oldest = kept.buffers.pop_front().expect("bytes are of buffers");
            kept.bytes -= oldest.len();
            dropped.push(oldest);
        }
        // Given back to the system without the lock.
        drop(kept);
        drop(dropped);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory for one body; goes back to its pool when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    memory: Vec<u8>,
    pool: Option<Arc<Pool>>,
}

impl Buffer {
    /// Kept memory for a body of `bytes`, if there is some that suits it.
    pub fn kept(pool: &Arc<Pool>, bytes: usize) -> Option<Self> {
        let memory = if bytes >= POOLED { pool.take(bytes)? } else { return None };
        Some(Self { memory, pool: Some(pool.clone()) })
    }

    /// Fresh memory, zeroed, that is not kept: for the beginning of a body.
    pub fn part(bytes: usize) -> Self {
        Self { memory: vec![0; bytes], pool: None }
    }

    /// Fresh memory, zeroed.
    pub fn fresh(pool: &Arc<Pool>, bytes: usize) -> Self {
        Self { memory: vec![0; bytes], pool: (bytes >= POOLED).then(|| pool.clone()) }
    }

    pub fn memory(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// The first `bytes` of it, shared from now on.
    pub fn freeze(mut self, bytes: usize) -> Bytes {
        match self.pool {
            Some(_) => Bytes::from_owner(Frozen { buffer: self, bytes }),
            None => {
                let mut memory = std::mem::take(&mut self.memory);
                memory.truncate(bytes);
                memory.into()
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.keep(std::mem::take(&mut self.memory));
        }
    }
}

struct Frozen {
    buffer: Buffer,
    bytes: usize,
}

impl AsRef<[u8]> for Frozen {
    fn as_ref(&self) -> &[u8] {
        &self.buffer.memory[..self.bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_when_the_last_view_of_it_goes() {
        let pool = Pool::new(8 * POOLED);
        assert!(Buffer::kept(&pool, POOLED).is_none());
        let bytes = Buffer::fresh(&pool, 2 * POOLED).freeze(2 * POOLED);
        let (at, view) = (bytes.as_ptr(), bytes.slice(7..));
        drop(bytes);
        assert_eq!(pool.kept(), 0);
        drop(view);
        assert_eq!(pool.kept(), 2 * POOLED);
        let mut again = Buffer::kept(&pool, 2 * POOLED - 5).unwrap();
        assert_eq!((again.memory().as_ptr(), pool.kept()), (at, 0));
        assert_eq!(again.freeze(2 * POOLED - 5).len(), 2 * POOLED - 5);
    }

    #[test]
    fn a_body_gets_the_smallest_buffer_that_suits_and_none_over_twice_its_size() {
        let pool = Pool::new(64 * POOLED);
        let made = [5, 3, 4].map(|times| Buffer::fresh(&pool, times * POOLED));
        drop(made);
        assert!(Buffer::kept(&pool, POOLED).is_none(), "all are over twice its size");
        assert_eq!(Buffer::kept(&pool, 2 * POOLED).unwrap().len(), 3 * POOLED);
        assert_eq!(Buffer::kept(&pool, 4 * POOLED).unwrap().len(), 4 * POOLED);
        assert!(Buffer::kept(&pool, 6 * POOLED).is_none());
    }

    #[test]
    fn no_more_is_kept_than_the_limit_and_the_oldest_go() {
        let pool = Pool::new(3 * POOLED);
        for times in [1, 2, 1] {
            drop(Buffer::fresh(&pool, times * POOLED));
        }
        assert_eq!(pool.kept(), 3 * POOLED);
        let newer = Buffer::kept(&pool, 2 * POOLED).expect("the newer ones are there");
        drop(Buffer::fresh(&pool, 4 * POOLED));
        assert_eq!(pool.kept(), POOLED, "one over the limit is not kept, and drives no other out");
        drop(newer);
        assert_eq!(pool.kept(), 3 * POOLED);
    }

    #[test]
    fn small_bodies_leave_the_pool_alone() {
        let pool = Pool::new(8 * POOLED);
        drop(Buffer::fresh(&pool, POOLED - 1).freeze(POOLED - 1));
        assert_eq!(pool.kept(), 0);
        drop(Buffer::fresh(&pool, POOLED));
        assert!(Buffer::kept(&pool, POOLED - 1).is_none());
    }
}
