//! Every kind of actor is killed by a panic, again and again: it is ready within a second, and only the task at hand is
//! lost. The sixth crash within a minute escalates.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::Actor;
use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use libp2p_identity::PeerId;
use multiaddr::Multiaddr;
use skep_dht::{Announcer, Dht, DhtConfig, DhtError, DhtId, DhtParts, Freshness};
use skep_expert::{Executors, ExpertMessage, HostedExpert, Server, ServerConfig, ServerParts};
use skep_kernel::{
    AskError, ChildSpec, Clock, Guardian, GuardianHandle, GuardianSpec, Intensity, Moment, Restart, Seed, SharedClock,
    Started, Strategy, WallTime,
};
use skep_rpc::{Answer, Bans, Call, Router, RpcError, SharedTransport, Transport};
use skep_testkit::{ScriptedBackend, Sim};
use skep_wire::ExpertUid;

use crate::common::*;

/// Apart by more than the window of the restart intensity.
const APART: Duration = Duration::from_secs(61);
/// Questions put in line with each kill.
const IN_LINE: usize = 5;

/// Panics once when it is armed.
#[derive(Clone, Default)]
struct Bomb(Arc<AtomicBool>);

impl Bomb {
    fn arm(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn went_off(&self) -> bool {
        !self.0.load(Ordering::Relaxed)
    }

    fn here(&self) {
        assert!(!self.0.swap(false, Ordering::Relaxed), "a crash was ordered");
    }
}

/// A transport with a bomb in it.
struct Trapped {
    inner: SharedTransport,
    bomb: Bomb,
}

impl Transport for Trapped {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Answer, RpcError>> {
        self.bomb.here();
        self.inner.call(call)
    }

    fn local_peer(&self) -> PeerId {
        self.inner.local_peer()
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        self.inner.addresses()
    }

    fn add_addresses(&self, peer: PeerId, addresses: Vec<Multiaddr>) {
        self.inner.add_addresses(peer, addresses);
    }
}

/// A clock with bombs in it.
struct TrappedClock {
    inner: SharedClock,
    now: Bomb,
    wall: Bomb,
}

impl Clock for TrappedClock {
    fn now(&self) -> Moment {
        self.now.here();
        self.inner.now()
    }

    fn wall(&self) -> WallTime {
        self.wall.here();
        self.inner.wall()
    }

    fn sleep_until(&self, at: Moment) -> BoxFuture<'static, ()> {
        self.inner.sleep_until(at)
    }
}

/// A DHT node and its announcer under one guardian, and what kills each.
struct Supervised {
    sim: Sim,
    dht: Dht,
    announcer: Announcer,
    guardian: GuardianHandle,
    kills_dht: Bomb,
    kills_announcer: Bomb,
}

impl Supervised {
    async fn start(sim: &Sim) -> Self {
        let first = sim.dht_node(&[]);
        let router = Router::new();
        let (kills_dht, kills_announcer) = (Bomb::default(), Bomb::default());
        let inner: SharedTransport = Arc::new(sim.network().node(router.clone()));
        let clock = TrappedClock { inner: sim.clock(), now: Bomb::default(), wall: kills_announcer.clone() };
        let (dht, make_dht) = Dht::new(DhtParts {
            transport: Arc::new(Trapped { inner, bomb: kills_dht.clone() }),
            router,
            bans: Bans::new(),
            clock: Arc::new(clock),
            seed: sim.seed(),
            config: DhtConfig::default(),
            initial_peers: vec![first.peer()],
        });
        let (announcer, make_announcer) = Announcer::new(dht.clone(), sim.seed());
        let spec = GuardianSpec {
            name: "test".to_owned(),
            strategy: Strategy::OneForOne,
            intensity: Intensity::default(),
            seed: Seed::new(sim.seed()),
        };
        let guardian = Guardian::start(spec, sim.clock());
        let start = move |tombstone| Started::actor(make_dht(tombstone).start());
        guardian.supervise(ChildSpec::new("dht", Restart::Permanent), start).await.unwrap();
        let start = move |tombstone| Started::actor(make_announcer(tombstone).start());
        guardian.supervise(ChildSpec::new("announcer", Restart::Transient), start).await.unwrap();
        announcer.add(["e.0.0".parse().unwrap()]);
        announcer.ready(within(sim, secs(10))).await.unwrap();
        let (ends, clock, stopped) = (guardian.clone(), sim.clock(), dht.clone());
        sim.at_end(async move {
            stopped.stop().await;
            ends.stop(skep_kernel::Deadline::after(clock.now(), secs(10))).await.unwrap();
        });
        Self { sim: sim.clone(), dht, announcer, guardian, kills_dht, kills_announcer }
    }

    /// Kills the DHT actor over the first of several questions; tells how many were answered, and after what time all.
    async fn kill_dht(&self) -> (Vec<Result<(), DhtError>>, Duration) {
        let start = self.sim.now();
        self.kills_dht.arm();
        let questions = (0..IN_LINE).map(|n| async move {
            let key = DhtId::of_bytes(&Bytes::from(vec![n as u8]));
            self.dht.get_many(vec![key], Freshness::Latest, within(&self.sim, secs(20))).await.map(drop)
        });
        let answers = join_all(questions).await;
        assert!(self.kills_dht.went_off());
        (answers, self.sim.now() - start)
    }

    /// Kills the announcer over a new expert; tells after what time that is announced all the same.
    async fn kill_announcer(&self, number: usize) -> Duration {
        let start = self.sim.now();
        let uid: ExpertUid = format!("e.1.{number}").parse().unwrap();
        self.kills_announcer.arm();
        self.announcer.add([uid.clone()]);
        self.sim.advance(millis(1)).await;
        assert!(self.kills_announcer.went_off());
        assert!(!self.announcer.announced().ready);
        self.announcer.ready(within(&self.sim, secs(60))).await.unwrap();
        let took = self.sim.now() - start;
        let found = find(&self.sim, &self.dht, std::slice::from_ref(&uid)).await;
        assert!(found[0].is_some(), "{uid}");
        self.announcer.remove([uid]);
        self.sim.advance(secs(1)).await;
        took
    }

    fn restarts(&self, child: &str) -> u64 {
        let children = self.guardian.status().children;
        children.iter().find(|status| status.name == child).unwrap().restarts
    }
}

#[test]
fn a_dht_actor_that_panics_is_ready_within_a_second_and_loses_only_the_question_at_hand() {
    let watch = Stopwatch::start("6, DHT actor");
    let kills = size(50, 1000);
    let slowest = Sim::with_seed(6).run(|sim| async move {
        let node = Supervised::start(&sim).await;
        let mut slowest = Duration::ZERO;
        for kill in 1..=kills {
            sim.advance(APART).await;
            let (answers, took) = node.kill_dht().await;
            assert_eq!(answers[0], Err(DhtError::Stopped));
            assert!(answers[1..].iter().all(Result::is_ok), "kill {kill}: {answers:?}");
            assert!(took <= secs(1) && node.dht.status().joined, "kill {kill}: {took:?}");
            assert_eq!(node.restarts("dht"), kill);
            slowest = slowest.max(took);
        }
        assert_eq!(node.restarts("announcer"), 0);
        assert_eq!(node.guardian.status().escalation, None);
        slowest
    });
    watch.report(format!("{kills} crashes, ready after {slowest:?} at the latest"));
}

#[test]
fn an_announcer_that_panics_announces_again_within_a_second_and_forgets_nobody() {
    let watch = Stopwatch::start("6, announcer");
    let kills = size(50, 1000);
    let slowest = Sim::with_seed(7).run(|sim| async move {
        let node = Supervised::start(&sim).await;
        let mut slowest = Duration::ZERO;
        for kill in 1..=kills {
            sim.advance(APART).await;
            let took = node.kill_announcer(kill).await;
            assert!(took <= secs(1), "kill {kill}: {took:?}");
            assert_eq!(node.restarts("announcer"), kill as u64);
            slowest = slowest.max(took);
        }
        let found = find(&sim, &node.dht, &["e.0.0".parse().unwrap()]).await;
        assert!(found[0].is_some());
        assert_eq!((node.restarts("dht"), node.guardian.status().escalation), (0, None));
        slowest
    });
    watch.report(format!("{kills} crashes, announced after {slowest:?} at the latest"));
}

/// A server of two experts without a DHT, whose clock kills whoever reads it next.
async fn trapped_server(sim: &Sim) -> (Server, Bomb) {
    let bomb = Bomb::default();
    let clock = TrappedClock { inner: sim.clock(), now: bomb.clone(), wall: Bomb::default() };
    let parts = ServerParts {
        clock: Arc::new(clock),
        spawner: sim.spawner(),
        dht: None,
        router: Router::new(),
        seed: sim.seed(),
        config: ServerConfig { executors: 1, ..ServerConfig::default() },
        checkpoints: None,
    };
    let hosted = ["e.0", "e.1"].map(|uid| HostedExpert {
        uid: uid.parse().unwrap(),
        factory: Box::new(|| Ok(Box::new(ScriptedBackend::scale(2.0)))),
    });
    let cost = Arc::new(|_: &ExpertUid, _, _| Duration::ZERO);
    let server = Server::with_executors(parts, hosted.into(), Executors::Inline { cost }).unwrap();
    server.ready(within(sim, secs(10))).await.unwrap();
    let (ends, now) = (server.clone(), sim.clock());
    sim.at_end(async move {
        let deadline = skep_kernel::Deadline::after(now.now(), secs(10));
        ends.stop(deadline).await.unwrap();
    });
    (server, bomb)
}

/// Kills the actor of `e.0` over the first of several questions.
async fn kill_expert(sim: &Sim, server: &Server, bomb: &Bomb) -> (Vec<Result<(), AskError>>, Duration) {
    let (start, clock) = (sim.now(), sim.clock());
    let inbox = server.expert(&"e.0".parse().unwrap()).unwrap().inbox();
    bomb.arm();
    let questions =
        (0..IN_LINE).map(|_| async { inbox.ask(&*clock, within(sim, secs(20)), ExpertMessage::Stats).await.map(drop) });
    let answers = join_all(questions).await;
    assert!(bomb.went_off());
    (answers, sim.now() - start)
}

#[test]
fn an_expert_actor_that_panics_is_ready_within_a_second_and_loses_only_the_question_at_hand() {
    let watch = Stopwatch::start("6, expert actor");
    let kills = size(50, 1000);
    let slowest = Sim::with_seed(8).run(|sim| async move {
        let (server, bomb) = trapped_server(&sim).await;
        let mut slowest = Duration::ZERO;
        for kill in 1..=kills {
            sim.advance(APART).await;
            let (answers, took) = kill_expert(&sim, &server, &bomb).await;
            assert_eq!(answers[0], Err(AskError::Gone));
            assert!(answers[1..].iter().all(Result::is_ok), "kill {kill}: {answers:?}");
            assert!(took <= secs(1), "kill {kill}: {took:?}");
            assert!(server.escalation().is_none() && server.status().ready);
            slowest = slowest.max(took);
        }
        slowest
    });
    watch.report(format!("{kills} crashes, ready after {slowest:?} at the latest"));
}

#[test]
fn the_sixth_crash_within_a_minute_escalates() {
    Sim::with_seed(9).run(|sim| async move {
        let node = Supervised::start(&sim).await;
        let start = sim.now();
        for _ in 0..5 {
            let (answers, _) = node.kill_dht().await;
            assert!(answers[1..].iter().all(Result::is_ok), "{answers:?}");
        }
        assert!(sim.now() - start < secs(60) && node.guardian.status().escalation.is_none());
        node.kills_dht.arm();
        let key = vec![DhtId::of_bytes(b"key")];
        let lost = node.dht.get_many(key, Freshness::Latest, within(&sim, secs(1))).await;
        assert_eq!(lost.map(drop), Err(DhtError::Stopped));
        let escalation = node.guardian.escalated().await.expect("it gives up");
        assert_eq!(escalation.child, "dht");
        sim.advance(secs(120)).await;
        assert_eq!(node.restarts("dht"), 5, "it is not started any more");
    });
    Sim::with_seed(10).run(|sim| async move {
        let node = Supervised::start(&sim).await;
        for kill in 0..5 {
            node.kill_announcer(kill).await;
        }
        node.kills_announcer.arm();
        node.announcer.add(["e.2.0".parse().unwrap()]);
        let escalation = node.guardian.escalated().await.expect("it gives up");
        assert_eq!(escalation.child, "announcer");
    });
    Sim::with_seed(11).run(|sim| async move {
        let (server, bomb) = trapped_server(&sim).await;
        for _ in 0..5 {
            kill_expert(&sim, &server, &bomb).await;
        }
        assert!(server.escalation().is_none());
        bomb.arm();
        let inbox = server.expert(&"e.0".parse().unwrap()).unwrap().inbox();
        let lost = inbox.ask(&*sim.clock(), within(&sim, secs(1)), ExpertMessage::Stats).await;
        assert_eq!(lost.map(drop), Err(AskError::Gone));
        sim.advance(millis(10)).await;
        assert_eq!(server.escalation().expect("it gives up").child, "e.0");
        assert!(!server.status().ready);
    });
}

#[test]
fn a_backend_that_panics_costs_only_the_call_at_hand() {
    let watch = Stopwatch::start("6, backend");
    let kills: u64 = size(50, 1000);
    Sim::with_seed(12).run(|sim| async move {
        let backend = (1..=kills).fold(ScriptedBackend::scale(2.0), |backend, kill| backend.panic_on(2 * kill));
        let hive = sim.servers(1).experts(["m.0", "m.1"]).backend(backend).start().await;
        let client = sim.client(&hive).await;
        let peer = hive.servers()[0].peer();
        let uid: ExpertUid = "m.0".parse().unwrap();
        for number in 1..=2 * kills {
            let call = ExpertCall::forward(peer, &uid, 1.0, number.into());
            let start = sim.now();
            let outcome = call.send(&client.transport, within(&sim, secs(1))).await;
            assert_eq!(outcome.is_ok(), number % 2 == 1, "batch {number}: {outcome:?}");
            assert_eq!(sim.now(), start, "a crash in forward costs no time");
        }
        sim.advance(secs(1)).await;
        let status = hive.servers()[0].server().status();
        assert!(status.ready, "{:?}", status.trouble);
    });
    watch.report(format!("{kills} crashes"));
}
