//! Which experts others find, and which places are free.

mod common;

use std::{sync::Arc, time::Duration};

use common::*;
use libp2p_identity::PeerId;
use skep_dht::{Dht, DhtConfig, DhtParts, Freshness};
use skep_expert::{
    Backend, BackendError, ExpertPattern, HostedExpert, Kind, MemoryCheckpoints, PlacementError, Server, ServerConfig,
    TakePlaces, choose_uids,
};
use skep_kernel::Deadline;
use skep_rpc::{Bans, Router};
use skep_testkit::Sim;
use skep_wire::ExpertUid;

fn node(sim: &Sim, seed: u64, initial_peers: Vec<PeerId>) -> Dht {
    let router = Router::new();
    let transport = Arc::new(sim.network().node(router.clone()));
    let (config, bans) = (DhtConfig::default(), Bans::new());
    let parts = DhtParts { transport, router, bans, clock: sim.clock(), seed, config, initial_peers };
    let dht = Dht::start_unsupervised(parts);
    let ending = dht.clone();
    sim.at_end(async move { ending.stop().await });
    dht
}

async fn server(sim: &Sim, dht: &Dht, experts: Vec<HostedExpert>) -> Server {
    let mut parts = server_parts(sim, ServerConfig::default());
    parts.dht = Some(dht.clone());
    start_parts(sim, parts, experts).await
}

fn soon(sim: &Sim) -> Deadline {
    Deadline::after(sim.now(), Duration::from_secs(10))
}

async fn hosts(sim: &Sim, dht: &Dht, uids: &[&str]) -> Vec<Option<PeerId>> {
    let uids = uids.iter().map(|uid| uid.parse::<ExpertUid>().unwrap()).collect();
    let found = dht.find_experts(uids, Freshness::Latest, soon(sim)).await.unwrap();
    found.into_iter().map(|hosted| hosted.map(|hosted| hosted.value)).collect()
}

/// An expert whose steps fail half way; it can be made again.
fn torn(uid: &str) -> HostedExpert {
    let factory = || {
        let torn = Closures::echo().on_backward(|_| Err(BackendError::Torn("half a step".to_owned())));
        Ok(Box::new(torn) as Box<dyn Backend>)
    };
    HostedExpert { uid: uid.parse().unwrap(), factory: Box::new(factory) }
}

fn announced_until(server: &Server) -> Vec<Option<f64>> {
    server.status().experts.iter().map(|expert| expert.announced_until).collect()
}

#[test]
fn a_ready_server_is_found_by_others_until_it_stops() {
    Sim::with_seed(1).run(|sim| async move {
        let first = node(&sim, 1, vec![]);
        let second = node(&sim, 2, vec![first.local_peer()]);
        let server = server(&sim, &second, vec![Closures::echo().hosted("e.0"), Closures::echo().hosted("e.1")]).await;
        assert!(server.status().ready);
        let (now, until) = (sim.clock().wall().0, announced_until(&server));
        assert!(until.iter().all(|until| until.is_some_and(|until| until > now && until <= now + 60.0)), "{until:?}");
        assert_eq!(hosts(&sim, &first, &["e.0", "e.1"]).await, [Some(second.local_peer()); 2]);
        sim.advance(Duration::from_secs(300)).await;
        assert_eq!(
            hosts(&sim, &first, &["e.0", "e.1"]).await,
            [Some(second.local_peer()); 2],
            "it was announced again"
        );
        server.stop(soon(&sim)).await.unwrap();
        assert_eq!(hosts(&sim, &first, &["e.0", "e.1"]).await, [None; 2]);
        assert!(!server.status().ready);
    });
}

#[test]
fn a_server_whose_bootstrap_is_down_is_not_ready_and_says_why() {
    Sim::with_seed(1).run(|sim| async move {
        let first = node(&sim, 1, vec![]);
        sim.network().refuse(first.local_peer());
        let second = node(&sim, 2, vec![first.local_peer()]);
        let mut parts = server_parts(&sim, ServerConfig::default());
        parts.dht = Some(second);
        let executors = skep_expert::Executors::Inline { cost: Arc::new(|_: &_, _, _| millis(1)) };
        let server = Server::with_executors(parts, vec![Closures::echo().hosted("e.0")], executors).unwrap();
        stop_at_end(&sim, &server);
        let error = server.ready(soon(&sim)).await.unwrap_err();
        assert!(error.to_string().contains("cannot join"), "{error}");
        assert!(!server.status().ready);
        sim.network().restore(first.local_peer());
        server.ready(Deadline::after(sim.now(), Duration::from_secs(600))).await.unwrap();
    });
}

#[test]
fn a_poisoned_expert_is_withdrawn_and_a_reloaded_one_comes_back() {
    Sim::with_seed(1).run(|sim| async move {
        let first = node(&sim, 1, vec![]);
        let second = node(&sim, 2, vec![first.local_peer()]);
        let server = server(&sim, &second, vec![torn("e.0"), Closures::echo().hosted("e.1")]).await;
        let e = expert(&server, "e.0");
        let snapshot = e.save(soon(&sim)).await.unwrap();
        let task = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], soon(&sim)).unwrap();
        assert!(task.answer().await.is_err());
        sim.advance(Duration::from_secs(5)).await;
        assert_eq!(hosts(&sim, &first, &["e.0", "e.1"]).await, [None, Some(second.local_peer())]);
        assert!(matches!(announced_until(&server)[..], [None, Some(_)]));
        e.reload(snapshot, soon(&sim)).await.unwrap();
        sim.advance(Duration::from_secs(5)).await;
        assert_eq!(hosts(&sim, &first, &["e.0", "e.1"]).await, [Some(second.local_peer()); 2]);
    });
}

#[test]
fn a_poisoned_expert_with_a_checkpoint_is_soon_announced_again() {
    Sim::with_seed(1).run(|sim| async move {
        let first = node(&sim, 1, vec![]);
        let second = node(&sim, 2, vec![first.local_peer()]);
        let mut parts = server_parts(&sim, ServerConfig::default());
        parts.dht = Some(second.clone());
        parts.checkpoints = Some(Arc::new(MemoryCheckpoints::new()));
        let server = start_parts(&sim, parts, vec![torn("e.0")]).await;
        let e = expert(&server, "e.0");
        let task = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], soon(&sim)).unwrap();
        assert!(task.answer().await.is_err());
        sim.advance(millis(100)).await;
        assert_eq!(hosts(&sim, &first, &["e.0"]).await, [None], "withdrawn at once");
        sim.advance(Duration::from_secs(5)).await;
        assert_eq!(hosts(&sim, &first, &["e.0"]).await, [Some(second.local_peer())]);
    });
}

#[test]
fn places_of_other_peers_are_taken_and_our_own_are_free() {
    Sim::with_seed(1).run(|sim| async move {
        let first = node(&sim, 1, vec![]);
        let second = node(&sim, 2, vec![first.local_peer()]);
        let _server = server(&sim, &second, vec![Closures::echo().hosted("e.0"), Closures::echo().hosted("e.2")]).await;
        let pattern: ExpertPattern = "e.[0:4]".parse().unwrap();
        let names = |uids: Vec<ExpertUid>| uids.iter().map(ToString::to_string).collect::<Vec<_>>();
        let take = TakePlaces::AtRandom(5);
        let chosen = choose_uids(&pattern, &[], 2, Some(&first), take, soon(&sim)).await.unwrap();
        assert_eq!(names(chosen), ["e.1", "e.3"]);
        let ours = choose_uids(&pattern, &[], 4, Some(&second), take, soon(&sim)).await.unwrap();
        assert_eq!(names(ours), ["e.0", "e.1", "e.2", "e.3"]);
        let full = choose_uids(&pattern, &[], 3, Some(&first), take, soon(&sim)).await.unwrap_err();
        assert!(matches!(full, PlacementError::Taken { free: 2, wanted: 3, .. }), "{full}");
    });
}
