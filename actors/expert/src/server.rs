//! [`Server`]: hosts many experts, serves calls to them and keeps them visible in the DHT.

mod directory;
mod handler;
mod once;
mod placement;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::{Arc, OnceLock},
    time::Duration,
};

use actix::Actor;
use rand::RngCore;
use skep_dht::{Announcer, Dht};
use skep_kernel::{
    ChildSpec, Deadline, Guardian, GuardianHandle, GuardianSpec, Intensity, Restart, Seed, SharedClock, Signal,
    Spawner, Started, Strategy,
    guardian::{Escalation, SuperviseError},
    panics::contain_future,
    time::before,
};
use skep_rpc::Router;
use skep_wire::{ExpertUid, Method};
use tracing::{error, info, warn};

pub use placement::{ExpertPattern, PlacementError, TakePlaces, choose_uids};
pub use status::{ServerError, ServerStatus};

use crate::{
    BackendError, BackendFactory, Cost, ExpertActor, ExpertHandle, ExpertStatus, ServerConfig, SharedStore, Streams,
    checkpointer::CheckpointActor,
    executor::ExecutorGroup,
    handle::build::build,
    reviver::Reviver,
    saving::{Saving, end},
    task::InFlight,
};
use directory::Directory;
use handler::RequestHandler;
use once::Once;

/// The methods that a server serves.
const METHODS: [Method; 3] = [Method::Info, Method::Forward, Method::Backward];
/// What closing takes after the deadline for finishing has passed: errors to callers, threads that end.
const CLOSING: Duration = Duration::from_millis(500);
/// How long all experts together may take to be put to their checkpoints when the server starts.
const RESTORE_WITHIN: Duration = Duration::from_secs(3600);

/// What a server is made from.
pub struct ServerParts {
    /// Where time comes from.
    pub clock: SharedClock,
    /// Starts tasks on the actix system's thread.
    pub spawner: Spawner,
    /// Where experts are announced; without it they are served, but nobody finds them.
    pub dht: Option<Dht>,
    /// Where calls come from; the server adds its methods once the experts are built.
    pub router: Router,
    /// Seed of everything random.
    pub seed: u64,
    /// Where checkpoints are kept; without it there are none, and what experts learned ends with the process.
    pub checkpoints: Option<SharedStore>,
    /// How to batch, wait and announce.
    pub config: ServerConfig,
}

/// One expert to host.
pub struct HostedExpert {
    /// Its name in the grid.
    pub uid: ExpertUid,
    /// Makes its backend, on an executor.
    pub factory: BackendFactory,
}

/// Which streams of a device an expert is on; `None` for the CPU.
pub type Place = Box<dyn Fn(&ExpertUid) -> Option<Streams> + Send>;

/// What runs the experts.
pub enum Executors {
    /// Threads `skep-exec-cpu-n`, as many as the configuration says, and `skep-exec-disk-0` for checkpoints.
    Threads,
    /// Tasks on the spawner's thread, for virtual time: a batch takes its cost on the clock.
    Inline {
        /// What each batch costs.
        cost: Cost,
    },
    /// [`Threads`](Executors::Threads), and beside them those of devices for the experts that are on one.
    Placed {
        /// Asked once for each expert, which keeps its stream for life.
        place: Place,
    },
}

/// What the server is up to.
#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Building,
    /// Calls are served; the announcer's watch tells whether others can find the experts.
    Serving,
    Failed(ServerError),
    Stopping,
    Stopped,
}

/// See the module's documentation. Cheap to clone; stops by [`stop`](Server::stop) only.
#[derive(Clone)]
pub struct Server(Arc<Host>);

/// What hosts the experts: where they run, are found and are kept, and how far that has come.
struct Host {
    clock: SharedClock,
    spawner: Spawner,
    dht: Option<Dht>,
    router: Router,
    seed: Seed,
    config: ServerConfig,
    executors: ExecutorGroup,
    /// One thread each.
    streams: Vec<ExecutorGroup>,
    /// Experts that are on a stream.
    placed: BTreeMap<ExpertUid, ExecutorGroup>,
    saving: Option<Saving>,
    directory: Directory,
    calls: Arc<InFlight>,
    phase: Signal<Phase>,
    /// There once experts are built, given a DHT.
    announcer: OnceLock<Announcer>,
    /// There once experts are built.
    guardian: OnceLock<GuardianHandle>,
}

impl Server {
    /// Starts executors and begins to build the experts. Follow it by [`ready`](Server::ready).
    pub fn new(parts: ServerParts, experts: Vec<HostedExpert>) -> Result<Self, ServerError> {
        Self::with_executors(parts, experts, Executors::Threads)
    }

    /// Like [`new`](Server::new) on executors of another kind.
    pub fn with_executors(
        parts: ServerParts,
        experts: Vec<HostedExpert>,
        executors: Executors,
    ) -> Result<Self, ServerError> {
        let ServerParts { clock, spawner, dht, router, seed, checkpoints, config } = parts;
        config.validate()?;
        let mut uids = BTreeSet::new();
        if let Some(twice) = experts.iter().find(|expert| !uids.insert(&expert.uid)) {
            return Err(ServerError::DuplicateUid(twice.uid.clone()));
        }
        let group = |name, n| match &executors {
            Executors::Threads | Executors::Placed { .. } => {
                let group = ExecutorGroup::threads(clock.clone(), name, n, config.executor_niceness);
                group.map_err(|error| ServerError::Threads(error.to_string()))
            }
            Executors::Inline { cost } => Ok(ExecutorGroup::inline(clock.clone(), &spawner, n, cost.clone())),
        };
        let saving = match checkpoints {
            Some(store) => Some(Saving::new(store, config.keep_checkpoints, group("disk", 1)?)),
            None => None,
        };
        let executors_of_cpu = group("cpu", config.executor_threads())?;
        let place: &dyn Fn(&ExpertUid) -> Option<Streams> = match &executors {
            Executors::Placed { place } => &**place,
            Executors::Threads | Executors::Inline { .. } => &|_| None,
        };
        let (mut streams, mut placed) = (BTreeMap::<String, Vec<ExecutorGroup>>::new(), BTreeMap::new());
        for (i, HostedExpert { uid, .. }) in experts.iter().enumerate() {
            let Some(device) = place(uid) else { continue };
            let groups = match streams.entry(device.name().to_owned()) {
                Entry::Occupied(started) => started.into_mut(),
                Entry::Vacant(new) => {
                    let started = device.start(&clock, config.executor_niceness);
                    new.insert(started.map_err(|error| ServerError::Build { uid: uid.clone(), error })?)
                }
            };
            placed.insert(uid.clone(), groups[i % groups.len()].clone());
        }
        let server = Self(Arc::new(Host {
            clock,
            spawner: spawner.clone(),
            dht,
            router,
            seed: Seed::new(seed),
            config,
            executors: executors_of_cpu,
            streams: streams.into_values().flatten().collect(),
            placed,
            saving,
            directory: Directory::default(),
            calls: Arc::default(),
            phase: Signal::new(Phase::Building),
            announcer: OnceLock::new(),
            guardian: OnceLock::new(),
        }));
        if spawner.spawn(server.0.clone().live(experts)) { Ok(server) } else { Err(ServerError::RuntimeStopped) }
    }

    /// Completes once all experts are built, calls are served, and, given a DHT, the experts' records are stored.
    /// On the deadline the error says what is missing; the server goes on trying.
    pub async fn ready(&self, deadline: Deadline) -> Result<(), ServerError> {
        let built = self.0.phase.until(|phase| (*phase != Phase::Building).then(|| phase.clone()));
        match before(&*self.0.clock, deadline, built).await {
            Ok(Phase::Failed(error)) => return Err(error),
            Ok(Phase::Building | Phase::Serving) => {}
            Ok(Phase::Stopping | Phase::Stopped) => return Err(ServerError::Stopping),
            Err(_) => return Err(ServerError::NotReady("experts are still being built".to_owned())),
        }
        match self.0.announcer.get() {
            Some(announcer) => {
                announcer.ready(deadline).await.map_err(|error| ServerError::NotReady(error.to_string()))
            }
            None => Ok(()),
        }
    }

    /// One hosted expert.
    pub fn expert(&self, uid: &ExpertUid) -> Option<ExpertHandle> {
        self.0.directory.get(uid.as_str())
    }

    /// All hosted experts that are built, in the order of their names.
    pub fn experts(&self) -> Vec<ExpertHandle> {
        self.0.directory.all()
    }

    /// Why the server's guardian gave up, if it did: then it is not ready any more and does not become so again.
    pub fn escalation(&self) -> Option<Escalation> {
        self.0.guardian.get()?.status().escalation
    }

    /// A snapshot of the server and its experts.
    pub fn status(&self) -> ServerStatus {
        let missing = self.0.missing();
        let until = self.0.announcer.get().map(Announcer::until).unwrap_or_default();
        let experts = self.0.directory.all().into_iter().map(|expert| {
            let announced_until = until.get(expert.uid()).map(|until| until.0);
            ExpertStatus { announced_until, ..expert.status() }
        });
        ServerStatus {
            ready: missing.is_none(),
            trouble: missing,
            calls: self.0.calls.count(),
            experts: experts.collect(),
        }
    }

    /// Withdraws the experts from the DHT, refuses new calls with [`ServeError::Stopping`](skep_rpc::ServeError),
    /// finishes what was accepted until the deadline, answers the rest with an error, takes last checkpoints, which may
    /// go on for [`LAST_CHECKPOINT`](crate::LAST_CHECKPOINT) more, and ends the executors. Every accepted call is
    /// answered. A second call waits for nothing and fails with [`ServerError::Stopping`].
    pub async fn stop(&self, deadline: Deadline) -> Result<(), ServerError> {
        let begins = self.0.phase.update_if(|phase| {
            let begins = !matches!(phase, Phase::Stopping | Phase::Stopped);
            if begins {
                *phase = Phase::Stopping;
            }
            begins
        });
        if !begins {
            return Err(ServerError::Stopping);
        }
        self.0.stop(deadline).await
    }
}

impl Host {
    /// The server's task: builds, serves, announces until it stops.
    async fn live(self: Arc<Self>, experts: Vec<HostedExpert>) {
        let work = contain_future(self.host(experts));
        tokio::select! {
            biased;
            () = self.phase.until(|phase| matches!(phase, Phase::Stopping | Phase::Stopped).then_some(())) => {}
            outcome = work => {
                let outcome = outcome.unwrap_or_else(|panic| Err(ServerError::Panicked(panic)));
                if let Err(error) = outcome {
                    error!(%error, "server failed");
                    self.enter(Phase::Failed(error));
                }
            }
        }
    }

    async fn host(&self, experts: Vec<HostedExpert>) -> Result<(), ServerError> {
        self.build(experts).await?;
        let handler = RequestHandler {
            directory: self.directory.clone(),
            executors: self.executors.clone(),
            legacy_deadline: self.config.legacy_deadline,
            calls: self.calls.clone(),
            once: Once::new(&self.config, self.spawner.clone()),
        };
        self.router.route(&METHODS, Arc::new(handler));
        self.supervise().await.map_err(|error| ServerError::Supervision(error.to_string()))?;
        self.enter(Phase::Serving);
        if let Some(announcer) = self.announcer.get() {
            self.follow_changes(announcer).await;
        }
        Ok(())
    }

    /// Starts the actors under a guardian: one an expert, the one that takes checkpoints, and the announcer.
    async fn supervise(&self) -> Result<(), SuperviseError> {
        let spec = GuardianSpec {
            name: "server".to_owned(),
            strategy: Strategy::OneForOne,
            intensity: Intensity::default(),
            seed: self.seed.derive("guardian"),
        };
        let guardian = self.guardian.get_or_init(|| Guardian::start(spec, self.clock.clone()));
        for expert in self.directory.all() {
            let child = ChildSpec::new(expert.uid().as_str(), Restart::Transient);
            let reviver = self.saving.clone().map(|saving| {
                let seed = self.seed.derive("reviver").derive(expert.uid().as_str());
                Reviver { saving, clock: self.clock.clone(), seed }
            });
            let start = move |tombstone| {
                let actor = ExpertActor::new(expert.clone(), tombstone);
                Started::actor(match reviver.clone() {
                    Some(reviver) => actor.reviving(reviver).start(),
                    None => actor.start(),
                })
            };
            guardian.supervise(child, start).await?;
        }
        if let Some(saving) = self.saving.clone() {
            let (experts, clock, period) = (self.directory.all(), self.clock.clone(), self.config.checkpoint_period);
            let child = ChildSpec::new("checkpoints", Restart::Permanent);
            let start = move |tombstone| {
                let actor = CheckpointActor::new(experts.clone(), saving.clone(), clock.clone(), period, tombstone);
                Started::actor(actor.start())
            };
            guardian.supervise(child, start).await?;
        }
        if let Some(dht) = self.dht.clone() {
            let seed = self.seed.derive("announcer").rng().next_u64();
            let (announcer, make) = Announcer::new(dht, seed);
            announcer.add(self.directory.serving());
            // Known before it starts, so that a stop that comes between withdraws what it announced.
            self.announcer.get_or_init(|| announcer);
            let child = ChildSpec::new("announcer", Restart::Transient);
            guardian.supervise(child, move |tombstone| Started::actor(make(tombstone).start())).await?;
        }
        Ok(())
    }

    /// Keeps those announced that serve: poisoned experts leave, reloaded ones come back.
    async fn follow_changes(&self, announcer: &Announcer) {
        loop {
            self.directory.changed().await;
            let serving = self.directory.serving();
            announcer.remove(announcer.uids().into_iter().filter(|uid| !serving.contains(uid)));
            announcer.add(serving);
        }
    }

    /// Builds all experts on the executors, as many at once as there are, and puts them to their checkpoints.
    async fn build(&self, experts: Vec<HostedExpert>) -> Result<(), ServerError> {
        let builds = experts.into_iter().map(|HostedExpert { uid, factory }| async move {
            let signal = self.directory.change_signal();
            let failed = |error| ServerError::Build { uid: uid.clone(), error };
            let executors = self.placed.get(&uid).unwrap_or(&self.executors);
            let expert = build(executors, uid.clone(), factory, &self.config, signal).await.map_err(failed)?;
            if let Some(saving) = &self.saving {
                let within = Deadline::after(self.clock.now(), RESTORE_WITHIN);
                let restored = saving.restore(&expert, within).await;
                restored.map_err(|error| failed(BackendError::Failed(error.to_string())))?;
            }
            Ok::<_, ServerError>(expert)
        });
        let built = futures::future::try_join_all(builds).await?;
        for expert in built {
            let status = expert.status();
            info!("{}: {}, {} parameters", status.uid, status.class, status.parameters);
            self.directory.insert(expert);
        }
        Ok(())
    }

    /// Moves on, unless the server is stopping.
    fn enter(&self, next: Phase) {
        self.phase.update_if(|phase| {
            let moves = !matches!(phase, Phase::Stopping | Phase::Stopped);
            if moves {
                *phase = next;
            }
            moves
        });
    }

    /// What keeps the server from being ready.
    fn missing(&self) -> Option<String> {
        match self.phase.get() {
            Phase::Building => Some("experts are being built".to_owned()),
            Phase::Failed(error) => Some(error.to_string()),
            Phase::Stopping | Phase::Stopped => Some("the server is stopping".to_owned()),
            Phase::Serving => {
                if let Some(escalation) = self.guardian.get().and_then(|guardian| guardian.status().escalation) {
                    return Some(escalation.to_string());
                }
                let announced = self.announcer.get()?.announced();
                let text = format!("{} of {} experts are announced", announced.stored, announced.wanted);
                (!announced.ready).then_some(text)
            }
        }
    }

    async fn stop(&self, deadline: Deadline) -> Result<(), ServerError> {
        self.directory.stop_accepting();
        let experts = self.directory.all();
        let finishing = async {
            let stops = experts.iter().map(|expert| end(expert, self.saving.as_ref(), deadline));
            let ends = futures::future::join_all(stops).await;
            let abandoned = ends.iter().map(|end| end.abandoned).sum::<usize>();
            let unsaved = experts.iter().zip(ends).filter_map(|(expert, end)| Some((expert, end.saved.err()?)));
            (abandoned, unsaved.map(|(expert, error)| (expert.uid().clone(), error)).collect::<Vec<_>>())
        };
        let ((abandoned, unsaved), ()) = futures::future::join(finishing, self.withdraw(deadline)).await;
        let closed = deadline.moment().max(self.clock.now()) + CLOSING;
        let calls_done = before(&*self.clock, Deadline::at(closed), self.calls.idle()).await;
        if calls_done.is_err() {
            warn!(calls = self.calls.count(), "calls are still open");
        }
        if let Some(guardian) = self.guardian.get()
            && let Err(late) = guardian.stop(Deadline::at(closed)).await
        {
            warn!(%late, "actors are still running");
        }
        let groups = std::iter::once(&self.executors).chain(&self.streams);
        let ends = groups.map(|group| group.stop(Deadline::at(closed)));
        let ended = futures::future::try_join_all(ends).await;
        if let Some(saving) = &self.saving
            && let Err(late) = saving.stop(Deadline::at(closed)).await
        {
            warn!(%late, "a checkpoint is still being written");
        }
        self.router.withdraw(&METHODS);
        self.phase.set(Phase::Stopped);
        // An executor that did not end still runs a batch, or what stands in the way of one.
        let running = match ended {
            Ok(_) => 0,
            Err(_) => experts.iter().map(|expert| expert.expert().in_flight.count()).sum::<usize>().max(1),
        };
        if abandoned + running > 0 {
            return Err(ServerError::Unfinished { unfinished: abandoned + running });
        }
        if let Some((_, first)) = unsaved.first() {
            let reason = first.to_string();
            return Err(ServerError::Unsaved { uids: unsaved.into_iter().map(|(uid, _)| uid).collect(), reason });
        }
        Ok(())
    }

    async fn withdraw(&self, deadline: Deadline) {
        if let Some(announcer) = self.announcer.get()
            && let Err(error) = announcer.stop(deadline).await
        {
            warn!(%error, "experts are not withdrawn; their records expire");
        }
    }
}
