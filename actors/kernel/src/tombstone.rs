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

#[cfg(test)]
mod tests {
    use super::*;

    fn end(life: impl FnOnce(Tombstone) + std::panic::UnwindSafe) -> Vec<Exit> {
        let reports = Arc::new(Mutex::new(Vec::new()));
        let seen = reports.clone();
        let tombstone = Tombstone::new(move |exit| seen.lock().unwrap().push(exit));
        let tombstone = std::panic::AssertUnwindSafe(tombstone);
        let _panicked = std::panic::catch_unwind(move || life({ tombstone }.0));
        reports.lock().unwrap().clone()
    }

    #[test]
    fn it_reports_once_how_its_actor_ended() {
        assert_eq!(end(drop), [Exit::Stopped]);
        assert_eq!(end(|tombstone| tombstone.write(Exit::Finished)), [Exit::Finished]);
        let first_word = |tombstone: Tombstone| {
            tombstone.write(Exit::Failed("first".into()));
            tombstone.write(Exit::Finished);
        };
        assert_eq!(end(first_word), [Exit::Failed("first".into())]);
    }

    #[test]
    fn a_panic_counts_whatever_was_written() {
        let life = |tombstone: Tombstone| {
            tombstone.write(Exit::Finished);
            let _tombstone = tombstone;
            panic!("a bug");
        };
        assert_eq!(end(life), [Exit::Panicked]);
    }
}
