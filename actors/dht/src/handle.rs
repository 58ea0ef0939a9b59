//! [`Dht`]: the handle through which everybody talks to the node's actor.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use actix::Actor;
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, Inbox, SharedClock, Signal, Tombstone, WallTime, time::before};
use skep_rpc::{Bans, Router, SharedTransport};
use skep_wire::ExpertUid;

use crate::{
    DhtConfig, DhtError, DhtKey, DhtStatus, Freshness, StoreItem, Stored, Timed, Validators,
    actor::DhtActor,
    core::node::{JoinState, Outcome},
    messages::{Command, InboundCall},
    serve::{DhtService, METHODS},
};

/// What a DHT node is made of.
pub struct DhtParts {
    /// Carries its calls.
    pub transport: SharedTransport,
    /// Brings the calls of others; a node in client mode takes none.
    pub router: Router,
    /// Peers that failed lately; the runtime's one list.
    pub bans: Bans,
    /// Its time.
    pub clock: SharedClock,
    /// Decides node id, jitter and request ids. Two nodes of one network need different ones.
    pub seed: u64,
    /// Its behaviour and limits.
    pub config: DhtConfig,
    /// Nodes to join, whose addresses the transport knows; empty for the first node of a network.
    pub initial_peers: Vec<PeerId>,
}

/// What outlives the actor: its settings, its inboxes, and what it publishes.
pub(crate) struct NodeContext {
    pub clock: SharedClock,
    pub seed: u64,
    pub config: DhtConfig,
    pub initial_peers: Vec<PeerId>,
    pub bans: Bans,
    pub commands: Inbox<Command>,
    pub inbound: Inbox<InboundCall>,
    pub status: Signal<DhtStatus>,
    pub join: Signal<JoinState>,
    /// Times the actor was started.
    pub starts: Signal<u32>,
    pub validators: Validators,
    /// Experts that this process announced, and until when.
    pub declared: Mutex<BTreeMap<ExpertUid, WallTime>>,
    local_peer: PeerId,
    router: Router,
}

/// Talks to the DHT node of this process, from any thread. Cheap to clone; outlives restarts of the actor behind it.
///
/// Every operation ends by its deadline; dropping a future abandons the operation.
#[derive(Clone)]
pub struct Dht {
    pub(crate) shared: Arc<NodeContext>,
}

impl Dht {
    /// A handle, and what makes the actor behind it: at first, and again with the same handle after a crash. Nothing
    /// happens before the actor starts, but messages may already be put in line.
    ///
    /// Inbound calls are routed from now on, unless the node is in client mode.
    pub fn new(parts: DhtParts) -> (Dht, impl Fn(Tombstone) -> DhtActor + Clone + Send + Sync + 'static) {
        Self::with_validators(parts, Validators::default())
    }

    /// [`new`](Self::new) with validators of one's own, which decide what the node believes and sign what it stores.
    pub fn with_validators(
        parts: DhtParts,
        validators: Validators,
    ) -> (Dht, impl Fn(Tombstone) -> DhtActor + Clone + Send + Sync + 'static) {
        let DhtParts { transport, router, bans, clock, seed, config, initial_peers } = parts;
        let join = JoinState { joined: initial_peers.is_empty(), ..JoinState::default() };
        let status = DhtStatus { joined: join.joined, ..DhtStatus::default() };
        let shared = Arc::new(NodeContext {
            local_peer: transport.local_peer(),
            bans,
            commands: Inbox::bounded(config.max_commands),
            inbound: Inbox::bounded(config.max_inbound),
            status: Signal::new(status),
            join: Signal::new(join),
            starts: Signal::new(0),
            validators,
            declared: Mutex::default(),
            clock,
            seed,
            config,
            initial_peers,
            router,
        });
        if !shared.config.client_mode {
            shared.router.route(&METHODS, Arc::new(DhtService { shared: shared.clone() }));
        }
        let dht = Dht { shared: shared.clone() };
        (dht, move |tombstone| DhtActor::new(shared.clone(), transport.clone(), tombstone))
    }

    /// Starts a node that nobody restarts. Must be called inside an actix system.
    pub fn start_unsupervised(parts: DhtParts) -> Dht {
        let (dht, make) = Self::new(parts);
        make(Tombstone::unread()).start();
        dht
    }

    /// Our peer id.
    pub fn local_peer(&self) -> PeerId {
        self.shared.local_peer
    }

    /// What the node says of itself now.
    pub fn status(&self) -> DhtStatus {
        self.shared.status.get()
    }

    /// The node's behaviour and limits.
    pub fn config(&self) -> &DhtConfig {
        &self.shared.config
    }

    /// Peers that failed lately. Whoever calls peers should report failures and successes here.
    pub fn bans(&self) -> &Bans {
        &self.shared.bans
    }

    /// The clock that deadlines of this handle count on.
    pub fn clock(&self) -> &SharedClock {
        &self.shared.clock
    }

    /// Looks up several keys at once, in order; `None` where nothing valid was found.
    pub async fn get_many(
        &self,
        keys: Vec<DhtKey>,
        freshness: Freshness,
        deadline: Deadline,
    ) -> Result<Vec<Option<Timed<Stored>>>, DhtError> {
        let mut found = Vec::with_capacity(keys.len());
        for keys in keys.chunks(KEYS_PER_COMMAND) {
            let ask = |reply| Command::Get { keys: keys.to_vec(), freshness, deadline, reply };
            found.extend(self.shared.commands.ask(&*self.shared.clock, deadline, ask).await?);
        }
        Ok(found)
    }

    /// Stores several items at once; tells for each, in order, whether a node took it.
    pub async fn store_many(&self, items: Vec<StoreItem>, deadline: Deadline) -> Result<Vec<bool>, DhtError> {
        let outcomes = self.put_many(items, deadline).await?;
        Ok(outcomes.into_iter().map(|outcome| outcome.stored).collect())
    }

    pub(crate) async fn put_many(&self, items: Vec<StoreItem>, deadline: Deadline) -> Result<Vec<Outcome>, DhtError> {
        let mut outcomes = Vec::with_capacity(items.len());
        for items in items.chunks(KEYS_PER_COMMAND) {
            let ask = |reply| Command::Store { items: items.to_vec(), deadline, reply };
            outcomes.extend(self.shared.commands.ask(&*self.shared.clock, deadline, ask).await?);
        }
        Ok(outcomes)
    }

    /// Completes once the node has joined: at once without initial peers, else when one of them has answered. On the
    /// deadline the error names the step that fails; a clock that is off fails as soon as every initial peer was asked,
    /// since waiting does not mend it.
    pub async fn joined(&self, deadline: Deadline) -> Result<(), DhtError> {
        let settled = self.shared.join.until(|state| {
            let hopeless = matches!(state.problem, Some(DhtError::ClockSkew { .. })) && state.failed_rounds > 0;
            (state.joined || hopeless).then_some(())
        });
        let _in_time = before(&*self.shared.clock, deadline, settled).await;
        match self.shared.join.get() {
            state if state.joined => Ok(()),
            JoinState { problem: Some(problem), .. } => Err(problem),
            _ => Err(DhtError::Deadline),
        }
    }

    /// Stops the node for good: it serves nobody any more, finishes no command, and its actor ends. Records that it
    /// announced stay with other nodes; see [`withdraw_experts`](Self::withdraw_experts).
    pub async fn stop(&self) {
        self.shared.router.withdraw(&METHODS);
        self.shared.commands.close();
        self.shared.inbound.close();
    }
}

/// Keys or items in one command; longer lists become several, one after the other.
const KEYS_PER_COMMAND: usize = 1024;
