//! A drop guard that tells a supervisor how an actor ended, panics included.

use std::sync::{Arc, Mutex};

/// How an actor's life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It said that its work is done.
    Finished,
    /// It was stopped without having said anything.
    Stopped,
    /// It failed and said why.
    Failed(String),
    /// It panicked.
    Panicked,
}

/// Kept inside an actor; whatever way the actor goes, dropping it reports the [`Exit`] once.
pub struct Tombstone {
    epitaph: Mutex<Option<Exit>>,
    report: Arc<dyn Fn(Exit) + Send + Sync>,
}

impl Tombstone {
    /// Reports through `report`, which must not panic.
    pub fn new(report: impl Fn(Exit) + Send + Sync + 'static) -> Self {
        Self { epitaph: Mutex::new(None), report: Arc::new(report) }
    }

    /// A tombstone nobody reads, for actors outside any supervision.
    pub fn unread() -> Self {
        Self::new(|_| {})
    }

    /// Writes how the actor is about to end; the first word counts.
    pub fn write(&self, exit: Exit) {
        if let Ok(mut epitaph) = self.epitaph.lock() {
            epitaph.get_or_insert(exit);
        }
    }
}

impl Drop for Tombstone {
    fn drop(&mut self) {
        let written = self.epitaph.get_mut().ok().and_then(Option::take);
        let exit = if std::thread::panicking() { Exit::Panicked } else { written.unwrap_or(Exit::Stopped) };
        (self.report)(exit);
    }
}
