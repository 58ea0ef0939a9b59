//! Which experts this server hosts.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use skep_rpc::ServeError;
use skep_wire::ExpertUid;
use tokio::sync::Notify;

use crate::{ExpertHandle, ExpertState};

/// Experts by uid, shared by handler, announcer and status.
#[derive(Clone, Default)]
pub(crate) struct Directory {
    experts: Arc<RwLock<BTreeMap<String, ExpertHandle>>>,
    stopping: Arc<AtomicBool>,
    changed: Arc<Notify>,
}

impl Directory {
    pub fn insert(&self, expert: ExpertHandle) {
        let mut experts = self.experts.write().unwrap_or_else(PoisonError::into_inner);
        experts.insert(expert.uid().to_string(), expert);
    }

    /// The expert of this name, for a call; an error that the caller is told if there is none.
    pub fn find(&self, uid: &str) -> Result<ExpertHandle, ServeError> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(ServeError::Stopping);
        }
        self.get(uid).ok_or_else(|| ServeError::UnknownExpert { uid: uid.to_owned() })
    }

    /// The expert of this name, whatever its state.
    pub fn get(&self, uid: &str) -> Option<ExpertHandle> {
        self.experts.read().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// All experts in the order of their names.
    pub fn all(&self) -> Vec<ExpertHandle> {
        self.experts.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Names of the experts that take work: those to announce.
    pub fn serving(&self) -> Vec<ExpertUid> {
        let serving = |expert: &ExpertHandle| expert.state() == ExpertState::Serving;
        self.all().into_iter().filter(serving).map(|expert| expert.uid().clone()).collect()
    }

    /// Told when an expert's state changes; experts are built with it.
    pub fn change_signal(&self) -> Arc<Notify> {
        self.changed.clone()
    }

    /// Completes when an expert's state has changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes no new calls; experts finish what is in line.
    pub fn stop_accepting(&self) {
        self.stopping.store(true, Ordering::Release);
        for expert in self.all() {
            expert.expert().set_state(ExpertState::Stopping);
        }
    }
}
