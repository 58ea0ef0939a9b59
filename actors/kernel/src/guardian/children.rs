//! A guardian's children and the news of their ends.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Notify;

use super::{ChildSpec, ChildState, ChildStatus, Factory, Started};
use crate::{Exit, Moment, Tombstone, restart::History};

/// Ends of children, reported by their tombstones from whatever thread drops them. At most one an incarnation.
#[derive(Default)]
pub(super) struct Obituaries {
    reports: Mutex<VecDeque<Obituary>>,
    news: Notify,
}

pub(super) struct Obituary {
    pub child: u64,
    pub incarnation: u64,
    pub exit: Exit,
}

impl Obituaries {
    pub fn report(&self, obituary: Obituary) {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).push_back(obituary);
        self.news.notify_one();
    }

    pub fn next(&self) -> Option<Obituary> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Completes when there may be reports that [`Obituaries::next`] has not yet handed out.
    pub async fn news(&self) {
        self.news.notified().await;
    }
}

pub(super) struct Child {
    /// Unlike the name never used again.
    pub id: u64,
    pub spec: ChildSpec,
    pub state: ChildState,
    pub history: History,
    pub last_exit: Option<Exit>,
    incarnation: u64,
    factory: Factory,
    running: Option<Started>,
}

impl Child {
    pub fn new(id: u64, spec: ChildSpec, factory: Factory) -> Self {
        let history = History::new(spec.restart);
        let state = ChildState::Waiting;
        Self { id, spec, state, history, last_exit: None, incarnation: 0, factory, running: None }
    }

    /// Starts the next incarnation. A factory that panics drops its tombstone or has given it to an actor: either way
    /// the end is reported.
    pub fn start(&mut self, now: Moment, obituaries: &Arc<Obituaries>) {
        self.incarnation += 1;
        let (child, incarnation, reports) = (self.id, self.incarnation, obituaries.clone());
        let report = move |exit| reports.report(Obituary { child, incarnation, exit });
        let factory = &mut self.factory;
        let started = catch_unwind(AssertUnwindSafe(|| factory(Tombstone::new(report))));
        self.running = Some(started.unwrap_or_else(|_panic| Started::new(|| {})));
        self.history.on_start(now);
        self.state = ChildState::Running;
    }

    pub fn ask_to_stop(&self) {
        if let Some(running) = &self.running {
            // A child that cannot even be asked is found running at the deadline.
            let _panicked = catch_unwind(AssertUnwindSafe(|| (running.ask_to_stop)()));
        }
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the child counts as ended for good.
    pub fn is_over(&self) -> bool {
        matches!(self.state, ChildState::Stopped | ChildState::Escalated)
    }

    /// Notes the end of the present incarnation; `false` for an earlier one's.
    pub fn bury(&mut self, obituary: Obituary) -> bool {
        let present = obituary.incarnation == self.incarnation && self.running.is_some();
        if present {
            self.running = None;
            self.last_exit = Some(obituary.exit);
        }
        present
    }

    pub fn status(&self) -> ChildStatus {
        ChildStatus {
            name: self.spec.name.clone(),
            state: self.state,
            restarts: self.history.restarts(),
            last_exit: self.last_exit.clone(),
        }
    }
}
