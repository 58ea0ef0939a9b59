//! [`Net`]: the network of one node, on its own thread.

use std::{
    fmt, io,
    sync::{Arc, RwLock},
    thread,
    time::Duration,
};

use futures::future::BoxFuture;
use libp2p_identity::{Keypair, PeerId};
use multiaddr::{Multiaddr, Protocol};
use skep_kernel::{Deadline, SharedClock, ask::mark_runtime_thread, time::before};
use skep_rpc::{Answer, Bans, Call, Router, RpcError, Transport};
use skep_wire::frame::native::Pool;
use tokio::{
    runtime,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::{
    NetConfig, NetError, NetStatus, behaviour,
    budget::Budget,
    busy_poll::BusyPoll,
    inbound::{Door, Server},
    native_link,
    node::{Node, Wanted},
    outbound,
    peers::SharedBook,
    status::Counters,
    streams::{self, Connections},
};

/// Wishes to connect that may wait for the swarm.
const WANTED: usize = 1024;
/// How long the operating system may take to tell the addresses of sockets that it has bound.
const LISTEN_PATIENCE: Duration = Duration::from_secs(10);
/// How long tasks may take to notice that the network stops.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What calls, the swarm and the handle share.
pub(crate) struct Shared {
    pub(crate) local_peer: PeerId,
    pub(crate) config: NetConfig,
    pub(crate) clock: SharedClock,
    pub(crate) router: Router,
    pub(crate) connections: Arc<Connections>,
    pub(crate) book: SharedBook,
    pub(crate) bans: Bans,
    pub(crate) counters: Arc<Counters>,
    pub(crate) door: Arc<Door>,
    /// Memory for answers to our calls.
    pub(crate) answers: Arc<Budget>,
    pub(crate) listening: RwLock<Vec<Multiaddr>>,
    wanted: mpsc::Sender<Wanted>,
}

impl Shared {
    /// Waits until the peer is connected.
    pub(crate) async fn reach(&self, peer: PeerId) -> Result<(), RpcError> {
        let (reply, reached) = oneshot::channel();
        self.wanted.send(Wanted { peer, reply }).await.map_err(|_| RpcError::Cancelled)?;
        reached.await.map_err(|_| RpcError::Cancelled)?
    }
}

/// The network of one node: a libp2p swarm and all its streams on a thread and runtime of their own.
///
/// Futures it returns may be polled on any executor. Dropping it stops the network at once;
/// [`shutdown`](Net::shutdown) stops it in good order.
pub struct Net {
    shared: Arc<Shared>,
    runtime: runtime::Handle,
    stop: mpsc::Sender<Deadline>,
    stopped: watch::Receiver<()>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Net({})", self.shared.local_peer)
    }
}

impl Net {
    /// Starts the network and waits until its sockets are bound. Calls of others go to `router`; a handler is offered
    /// while the router has a route for it, in client mode never.
    ///
    /// Blocks the thread for the moment that this takes.
    pub fn start(config: NetConfig, identity: Keypair, router: Router, clock: SharedClock) -> Result<Net, NetError> {
        config.validate()?;
        let (wanted, received) = mpsc::channel(WANTED);
        let shared = Arc::new(Shared {
            local_peer: identity.public().to_peer_id(),
            clock: clock.clone(),
            router,
            connections: Arc::default(),
            book: SharedBook::new(config.limits.max_known_peers),
            bans: Bans::new(),
            counters: Arc::default(),
            door: Arc::new(Door::new(&config.limits)),
            answers: Arc::new(Budget::new(config.limits.max_answer_bytes)),
            listening: RwLock::default(),
            wanted,
            config,
        });
        let (stop, stops) = mpsc::channel(1);
        #[allow(clippy::disallowed_methods, reason = "never simulated")]
        let (running, stopped) = watch::channel(());
        let (started, outcome) = std::sync::mpsc::sync_channel(1);
        let inner = shared.clone();
        thread::Builder::new()
            .name("skep-net".to_owned())
            .spawn(move || {
                let started = |outcome| {
                    // Nobody waits only if the starting thread is gone.
                    let _starter_left = started.send(outcome);
                };
                run(inner, identity, received, stops, started);
                drop(running);
            })
            .map_err(NetError::Start)?;
        let died = |_| NetError::Start(io::Error::other("the network's thread ended while it started"));
        let runtime = outcome.recv().map_err(died)??;
        Ok(Net { shared, runtime, stop, stopped })
    }

    /// Peers that failed lately, shared with whoever chooses peers.
    pub fn bans(&self) -> &Bans {
        &self.shared.bans
    }

    /// Whether the peer failed lately and should be left alone.
    pub fn is_banned(&self, peer: PeerId) -> bool {
        self.shared.bans.is_banned(self.shared.clock.now(), &peer)
    }

    /// Stops: lets no call in, lets those being served end, closes connections; what is not done by the deadline is cut
    /// off. Completes when the network's thread has ended, shortly after the deadline at the latest.
    pub async fn shutdown(&self, deadline: Deadline) {
        self.shared.door.shut();
        // A full channel holds an earlier stop.
        let _stops_already = self.stop.try_send(deadline);
        let mut stopped = self.stopped.clone();
        while stopped.changed().await.is_ok() {}
    }

    /// The inside, for tests that behave badly on purpose.
    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What the network is doing.
    pub fn status(&self) -> NetStatus {
        let shared = &self.shared;
        let (connections, streams_out) = shared.connections.count();
        let (peers_known, peers_ours) = shared.book.with(|book| book.count());
        let counters = &shared.counters;
        NetStatus {
            peer_id: shared.local_peer.to_base58(),
            addresses: self.addresses().iter().map(Multiaddr::to_string).collect(),
            connected: shared.connections.peers().iter().map(|peer| peer.to_base58()).collect(),
            connections,
            peers_known,
            peers_ours,
            streams_out,
            serving: shared.door.inside(),
            calls_out: Counters::get(&counters.calls_out),
            calls_out_failed: Counters::get(&counters.calls_out_failed),
            calls_out_native: Counters::get(&counters.calls_out_native),
            calls_in: Counters::get(&counters.calls_in),
            calls_in_native: Counters::get(&counters.calls_in_native),
            calls_in_refused: Counters::get(&counters.calls_in_refused),
            calls_in_left: Counters::get(&counters.calls_in_left),
            streams_in_refused: shared.connections.refused_streams(),
            banned: shared.bans.banned(shared.clock.now()).iter().map(|peer| peer.to_base58()).collect(),
        }
    }
}

impl Transport for Net {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        let (shared, runtime) = (self.shared.clone(), self.runtime.clone());
        Box::pin(async move {
            // With a link at hand the connection's task does everything.
            let call = match outbound::call_on_link(&shared, call).await {
                Ok(ended) => return ended,
                Err(call) => call,
            };
            let mut task = Task(runtime.spawn(outbound::call(shared, call)));
            // The task ends early only when the network stops.
            let received = (&mut task.0).await.unwrap_or(Err(RpcError::Cancelled))?;
            drop(received.held);
            Ok(received.answer)
        })
    }

    fn local_peer(&self) -> PeerId {
        self.shared.local_peer
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        let config = &self.shared.config;
        if config.client_mode {
            return Vec::new();
        }
        let mut addresses = match config.announce.is_empty() {
            true => self.shared.listening.read().expect("no panic while addresses are held").clone(),
            false => config.announce.clone(),
        };
        addresses.sort_by_key(|address| !is_loopback(address));
        let local = Protocol::P2p(self.shared.local_peer);
        addresses
            .into_iter()
            .map(|address| match address.iter().last() {
                Some(Protocol::P2p(_)) => address,
                _ => address.with(local.clone()),
            })
            .collect()
    }

    fn add_addresses(&self, peer: PeerId, addresses: Vec<Multiaddr>) {
        self.shared.book.with(|book| book.name(peer, addresses));
    }
}

/// Reads an address that ends in `/p2p/<peer id>`.
pub fn parse_peer_address(text: &str) -> Result<(PeerId, Multiaddr), NetError> {
    let parsed: Result<Multiaddr, _> = text.trim().parse();
    let address = parsed.map_err(|error| NetError::Parse { address: text.to_owned(), reason: error.to_string() })?;
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => Ok((peer, address)),
        _ => Err(NetError::NoPeerId { address }),
    }
}

/// A task that ends with whoever waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn is_loopback(address: &Multiaddr) -> bool {
    match address.iter().next() {
        Some(Protocol::Ip4(ip)) => ip.is_loopback(),
        Some(Protocol::Ip6(ip)) => ip.is_loopback(),
        _ => false,
    }
}

/// The network's thread.
fn run(
    shared: Arc<Shared>,
    identity: Keypair,
    wanted: mpsc::Receiver<Wanted>,
    stop: mpsc::Receiver<Deadline>,
    started: impl FnOnce(Result<runtime::Handle, NetError>),
) {
    mark_runtime_thread();
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(shared.config.threads)
        .thread_name("skep-net-worker")
        .on_thread_start(mark_runtime_thread)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return started(Err(NetError::Start(error))),
    };
    let busy_poll = Arc::new(BusyPoll::new(shared.clock.clone(), shared.config.busy_poll));
    let awake = busy_poll.clone();
    runtime.spawn(async move { awake.keep_awake().await });
    runtime.block_on(async {
        let streams = serve_streams(&shared, runtime.handle().clone(), busy_poll);
        let swarm = match behaviour::swarm(&shared.config, &identity, shared.book.clone(), streams) {
            Ok(swarm) => swarm,
            Err(error) => return started(Err(error)),
        };
        let clock = shared.clock.clone();
        let deadline = Deadline::after(clock.now(), LISTEN_PATIENCE);
        let node = before(&*clock, deadline, Node::listen(swarm, shared, wanted)).await;
        match node.unwrap_or_else(|_| Err(NetError::Start(io::ErrorKind::TimedOut.into()))) {
            Ok(node) => {
                started(Ok(runtime.handle().clone()));
                node.run(stop).await;
            }
            Err(error) => started(Err(error)),
        }
    });
    runtime.shutdown_timeout(LAST_WORDS);
}

fn serve_streams(shared: &Arc<Shared>, runtime: runtime::Handle, busy_poll: Arc<BusyPoll>) -> streams::Shared {
    let config = &shared.config;
    let server = Arc::new(Server {
        router: shared.router.clone(),
        clock: shared.clock.clone(),
        limits: config.limits.clone(),
        timeouts: config.timeouts.clone(),
        book: shared.book.clone(),
        counters: shared.counters.clone(),
        door: shared.door.clone(),
    });
    streams::Shared {
        connections: shared.connections.clone(),
        router: (!config.client_mode).then(|| shared.router.clone()),
        max_inbound_streams: config.limits.max_inbound_streams,
        negotiation_timeout: config.timeouts.negotiation,
        native: config.native.then(|| {
            let (server, answers) = (server.clone(), shared.answers.clone());
            let pool = Pool::new(native_link::POOL_BYTES);
            Arc::new(native_link::Context { server, answers, serves: !config.client_mode, pool })
        }),
        busy_poll,
        accept: Box::new(move |accepted| drop(runtime.spawn(server.clone().serve(accepted)))),
    }
}
