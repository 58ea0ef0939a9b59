//! [`Announcer`]: keeps a set of experts announced, again and again, until they are withdrawn.

mod schedule;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, WrapFuture};
use serde::Serialize;
use skep_kernel::{Deadline, Exit, Moment, Signal, Stop, Tombstone, WallTime, time::before};
use skep_wire::ExpertUid;
use tracing::{debug, warn};

use self::schedule::Schedule;
use crate::{Dht, DhtError, config::seconds};

/// How far announcing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Announced {
    /// Experts to announce.
    pub wanted: usize,
    /// Those whose record is held by this node or another.
    pub stored: usize,
    /// Those whose record another node holds.
    pub elsewhere: usize,
    /// The network is joined, every expert stored and, if there are other nodes, held by one of them.
    pub ready: bool,
}

/// What is announced, and how far that has come; outlives the actor.
struct Announcements {
    dht: Dht,
    state: Mutex<State>,
    /// Told of changes of the set.
    changes: Signal<()>,
    announced: Signal<Announced>,
}

struct State {
    schedule: Schedule,
    leaving: BTreeSet<ExpertUid>,
    is_stopping: bool,
}

/// Decides which experts of this process are announced. Cheap to clone; outlives restarts of the actor behind it.
#[derive(Clone)]
pub struct Announcer {
    shared: Arc<Announcements>,
}

impl Announcer {
    /// A handle without experts, and what makes the actor behind it: at first, and again after a crash. `seed` decides
    /// the jitter.
    pub fn new(
        dht: Dht,
        seed: u64,
    ) -> (Announcer, impl Fn(Tombstone) -> AnnouncerActor + Clone + Send + Sync + 'static) {
        let period = seconds(dht.config().update_period);
        let state = State { schedule: Schedule::new(period, seed), leaving: BTreeSet::new(), is_stopping: false };
        let shared = Arc::new(Announcements {
            dht,
            state: Mutex::new(state),
            changes: Signal::default(),
            announced: Signal::default(),
        });
        let announcer = Announcer { shared: shared.clone() };
        (announcer, move |tombstone| AnnouncerActor { shared: shared.clone(), tombstone })
    }

    /// Starts an announcer that nobody restarts. Must be called inside an actix system.
    pub fn start_unsupervised(dht: Dht, seed: u64) -> Announcer {
        let (announcer, make) = Self::new(dht, seed);
        make(Tombstone::unread()).start();
        announcer
    }

    /// Announces these experts, too, from now on.
    pub fn add(&self, uids: impl IntoIterator<Item = ExpertUid>) {
        let now = self.shared.dht.clock().now();
        self.shared.change(|state| {
            for uid in uids {
                state.leaving.remove(&uid);
                state.schedule.add(uid, now);
            }
        });
    }

    /// Announces these experts no more, and withdraws their records.
    pub fn remove(&self, uids: impl IntoIterator<Item = ExpertUid>) {
        self.shared.change(|state| {
            for uid in uids {
                if state.schedule.remove(&uid) {
                    state.leaving.insert(uid);
                }
            }
        });
    }

    /// The experts that are announced.
    pub fn uids(&self) -> Vec<ExpertUid> {
        self.shared.state().schedule.uids().cloned().collect()
    }

    /// Until when each announced expert's record holds. One that no node has taken yet is not there.
    pub fn until(&self) -> BTreeMap<ExpertUid, WallTime> {
        self.shared.state().schedule.until()
    }

    /// How far announcing has come.
    pub fn announced(&self) -> Announced {
        self.shared.announced.get()
    }

    /// Completes once every expert is announced where others find it; on the deadline the error says what is missing.
    pub async fn ready(&self, deadline: Deadline) -> Result<(), DhtError> {
        let dht = &self.shared.dht;
        let ready = self.shared.announced.until(|announced| announced.ready.then_some(()));
        match before(&**dht.clock(), deadline, ready).await {
            Ok(()) => Ok(()),
            Err(_) => {
                dht.joined(Deadline::at(Moment::START)).await?;
                let Announced { wanted, stored, elsewhere, .. } = self.announced();
                Err(DhtError::NotAnnounced { wanted, stored, elsewhere })
            }
        }
    }

    /// Stops announcing for good and withdraws every record (docs/wire.md §12). On the deadline records that were not
    /// reached stay until they expire.
    pub async fn stop(&self, deadline: Deadline) -> Result<(), DhtError> {
        let mut uids = BTreeSet::new();
        self.shared.change(|state| {
            uids = std::mem::take(&mut state.leaving);
            uids.extend(state.schedule.clear());
            state.is_stopping = true;
        });
        self.shared.dht.withdraw_experts(uids.into_iter().collect(), deadline).await
    }
}

impl Announcements {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the experts")
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.report();
        self.changes.set(());
    }

    fn report(&self) {
        let joined = self.dht.status().joined;
        let (counts, settled) = {
            let state = self.state();
            (state.schedule.counts(), state.schedule.is_settled())
        };
        let (wanted, stored, elsewhere) = counts;
        let ready = joined && settled;
        self.announced.set(Announced { wanted, stored, elsewhere, ready });
    }

    /// Announces and withdraws until stopped.
    async fn run(self: Arc<Self>) {
        let mut changes = self.changes.follow();
        let mut joins = self.dht.shared.join.follow();
        let mut starts = self.dht.shared.starts.follow();
        loop {
            changes.catch_up();
            self.report();
            if self.state().is_stopping {
                return;
            }
            let wake = self.next_wake();
            tokio::select! {
                biased;
                () = changes.changed() => {}
                // Whoever joined late, or lost its records in a crash, should not wait for the next period.
                () = joins.changed() => self.announce_all_again(),
                () = starts.changed() => self.announce_all_again(),
                () = self.dht.clock().sleep_until(wake) => {
                    tokio::select! {
                        biased;
                        () = changes.changed() => {}
                        () = self.turn() => {}
                    }
                }
            }
        }
    }

    fn next_wake(&self) -> Moment {
        let state = self.state();
        let now = self.dht.clock().now();
        if !state.leaving.is_empty() {
            return now;
        }
        state.schedule.next().unwrap_or(now + IDLE)
    }

    fn announce_all_again(&self) {
        if self.dht.status().joined {
            self.state().schedule.start_anew(self.dht.clock().now());
        }
    }

    /// Withdraws who left, then announces who is due.
    async fn turn(&self) {
        self.withdraw().await;
        let clock = self.dht.clock();
        let nodes = self.dht.status().nodes;
        let due = self.state().schedule.take_due(clock.now(), nodes);
        if due.is_empty() {
            return;
        }
        let config = self.dht.config();
        let expiration = clock.wall() + config.announced_for();
        let deadline = Deadline::after(clock.now(), seconds(config.update_period));
        let declared = self.dht.declare(&due, expiration, deadline).await;
        let now = clock.now();
        match declared {
            Ok(outcomes) => {
                let alone = self.dht.status().nodes == 0;
                self.state().schedule.announced(&outcomes, expiration, alone, now);
                let refused = outcomes.values().filter(|outcome| !outcome.stored).count();
                debug!(experts = outcomes.len(), refused, %expiration, "announced experts");
            }
            Err(error) => {
                warn!(%error, experts = due.len(), "announcing failed; trying again");
                due.iter().for_each(|uid| self.state().schedule.failed(uid, now));
            }
        }
        self.report();
    }

    async fn withdraw(&self) {
        let leaving: Vec<ExpertUid> = self.state().leaving.iter().cloned().collect();
        if leaving.is_empty() {
            return;
        }
        let deadline = Deadline::after(self.dht.clock().now(), seconds(self.dht.config().update_period));
        if let Err(error) = self.dht.withdraw_experts(leaving.clone(), deadline).await {
            warn!(%error, experts = leaving.len(), "withdrawing failed; the records will expire");
        }
        let mut state = self.state();
        leaving.iter().for_each(|uid| _ = state.leaving.remove(uid));
    }
}

/// How long an announcer without experts sleeps; any change wakes it.
const IDLE: Duration = Duration::from_secs(3600);

/// The actor behind an [`Announcer`].
pub struct AnnouncerActor {
    shared: Arc<Announcements>,
    tombstone: Tombstone,
}

impl Actor for AnnouncerActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        self.shared.state().schedule.start_anew(self.shared.dht.clock().now());
        ctx.spawn(self.shared.clone().run().into_actor(self).map(|(), actor, ctx| actor.finish(ctx)));
    }
}

impl AnnouncerActor {
    fn finish(&mut self, ctx: &mut Context<Self>) {
        self.tombstone.write(Exit::Finished);
        ctx.stop();
    }
}

impl Handler<Stop> for AnnouncerActor {
    type Result = ();

    /// The records stay until they expire: whoever stops for good calls [`Announcer::stop`] first.
    fn handle(&mut self, _stop: Stop, ctx: &mut Context<Self>) {
        self.finish(ctx);
    }
}
