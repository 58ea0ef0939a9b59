//! The knobs of the simulated network: what each does to calls.

mod echo;

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use echo::{Echo, SECOND, TENTH, asks, call};
use futures::future::join_all;
use skep_rpc::{Body, RpcError, Step, Transport};
use skep_testkit::{Latency, Sim};
use skep_wire::Method;

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn jitter_adds_up_to_so_much_to_each_message() {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().latency(Latency::constant(TENTH)).jitter(TENTH / 2);
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        let mut took = BTreeSet::new();
        for _ in 0..50 {
            let start = sim.now();
            assert!(asks(&sim, &client, &server).await);
            took.insert(sim.now() - start);
        }
        assert!(took.len() > 25, "{took:?}");
        assert!(*took.first().unwrap() >= 2 * TENTH && *took.last().unwrap() <= 3 * TENTH, "{took:?}");
    });
}

#[test]
fn lost_messages_cost_the_deadline_requests_and_answers_alike() {
    Sim::with_seed(2).run(|sim| async move {
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        sim.network().loss(0.5);
        let mut answered = 0;
        for _ in 0..200 {
            answered += u32::from(asks(&sim, &client, &server).await);
        }
        let arrived = sim.network().delivered(Method::Ping);
        assert!(
            (80..=120).contains(&arrived) && (30..=70).contains(&answered),
            "{arrived} of 200, {answered} answered"
        );
        sim.network().loss(1.0);
        let lost = client.call(call(&sim, server.local_peer(), "hi")).await;
        assert!(matches!(lost, Err(RpcError::Deadline { waited: SECOND, .. })), "{lost:?}");
        assert_eq!(sim.network().delivered(Method::Ping), arrived);
    });
}

#[test]
fn a_duplicated_call_arrives_twice_and_is_answered_once() {
    Sim::with_seed(3).run(|sim| async move {
        sim.network().duplication(1.0);
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        assert!(asks(&sim, &client, &server).await);
        sim.advance(SECOND).await;
        assert_eq!(sim.network().delivered(Method::Ping), 2);
    });
}

/// The order in which thirty calls arrive that leave a millisecond after each other.
async fn order_of_arrival(sim: &Sim) -> Vec<Body> {
    let service = Echo::new(sim, Duration::ZERO);
    let (server, client) = (service.serve(sim), sim.network().client());
    let calls = (0..30).map(|number: u64| {
        let mut call = call(sim, server.local_peer(), "");
        call.body = Body::Message(number.to_string().into());
        let client = &client;
        async move {
            sim.advance(millis(number)).await;
            client.call(call).await.unwrap();
        }
    });
    join_all(calls).await;
    let heard = service.heard.lock().unwrap();
    heard.clone()
}

#[test]
fn reordered_messages_are_overtaken_by_later_ones() {
    Sim::with_seed(4).run(|sim| async move {
        sim.network().latency(Latency::constant(TENTH));
        let sent: Vec<Body> = (0..30).map(|number| Body::Message(number.to_string().into())).collect();
        assert_eq!(order_of_arrival(&sim).await, sent);
        sim.network().reordering(0.3, TENTH);
        let mut arrived = order_of_arrival(&sim).await;
        assert_ne!(arrived, sent);
        let number = |body: &Body| match body {
            Body::Message(text) => std::str::from_utf8(text).unwrap().parse::<u32>().unwrap(),
            Body::Tensors(_) => unreachable!("messages were sent"),
        };
        arrived.sort_by_key(number);
        assert_eq!(arrived, sent, "none is lost");
    });
}

#[test]
fn messages_wait_for_the_bytes_before_them() {
    Sim::with_seed(5).run(|sim| async move {
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        sim.network().one_way(client.local_peer(), server.local_peer()).bandwidth(1000);
        let start = sim.now();
        let calls = (0..3).map(|_| async {
            let mut call = call(&sim, server.local_peer(), "");
            call.body = Body::Message(Bytes::from(vec![0; 200]));
            client.call(call).await.unwrap();
            sim.now() - start
        });
        assert_eq!(join_all(calls).await, [millis(200), millis(400), millis(600)]);
    });
}

#[test]
fn a_refused_call_never_arrives_and_costs_no_time() {
    Sim::with_seed(6).run(|sim| async move {
        sim.network().refusal(1.0);
        let (server, client) = (echo::echo(&sim, TENTH), sim.network().client());
        let start = sim.now();
        let refused = client.call(call(&sim, server.local_peer(), "hi")).await;
        assert!(matches!(refused, Err(RpcError::Unreachable { step: Step::Dial, .. })), "{refused:?}");
        assert_eq!((sim.now(), sim.network().delivered(Method::Ping)), (start, 0));
    });
}

#[test]
fn a_reset_breaks_a_call_that_was_served() {
    Sim::with_seed(7).run(|sim| async move {
        sim.network().reset(1.0);
        let (server, client) = (echo::echo(&sim, TENTH), sim.network().client());
        let start = sim.now();
        let broken = client.call(call(&sim, server.local_peer(), "hi")).await;
        assert!(matches!(broken, Err(RpcError::Unreachable { step: Step::Exchange, .. })), "{broken:?}");
        assert_eq!((sim.now() - start, sim.network().delivered(Method::Ping)), (TENTH, 1));
    });
}

#[test]
fn silence_is_a_call_that_was_served_and_never_answered() {
    Sim::with_seed(8).run(|sim| async move {
        sim.network().silence(1.0);
        let (server, client) = (echo::echo(&sim, TENTH), sim.network().client());
        let late = client.call(call(&sim, server.local_peer(), "hi")).await;
        assert!(matches!(late, Err(RpcError::Deadline { waited: SECOND, .. })), "{late:?}");
        assert_eq!(sim.network().delivered(Method::Ping), 1);
    });
}

#[test]
fn held_messages_wait_and_none_is_lost() {
    Sim::with_seed(9).run(|sim| async move {
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        let (a, b) = (client.local_peer(), server.local_peer());
        sim.network().hold(a, b);
        let start = sim.now();
        let releasing = async {
            sim.advance(3 * TENTH).await;
            assert_eq!(sim.network().delivered(Method::Ping), 0);
            sim.network().release(a, b);
        };
        let calls = join_all((0..5).map(|_| asks(&sim, &client, &server)));
        let (answered, ()) = futures::join!(calls, releasing);
        assert_eq!((answered, sim.now() - start), (vec![true; 5], 3 * TENTH));
    });
}

#[test]
fn knobs_turn_while_calls_are_under_way() {
    Sim::with_seed(10).run(|sim| async move {
        sim.network().latency(Latency::constant(TENTH));
        let (server, client) = (echo::echo(&sim, Duration::ZERO), sim.network().client());
        let (a, b) = (client.local_peer(), server.local_peer());
        // Cut while the request travels, mended before it would have arrived: it arrives.
        let cutting = async {
            sim.advance(TENTH / 4).await;
            sim.network().partition(&[a], &[b]);
            sim.advance(TENTH / 4).await;
            sim.network().heal();
        };
        assert!(futures::join!(asks(&sim, &client, &server), cutting).0);
        // Cut while the answer travels: it vanishes.
        let cutting = async {
            sim.advance(3 * TENTH / 2).await;
            sim.network().one_way(b, a).cut();
        };
        assert!(!futures::join!(asks(&sim, &client, &server), cutting).0);
        assert_eq!(sim.network().delivered(Method::Ping), 2);
        sim.network().one_way(b, a).mend();
        assert!(asks(&sim, &client, &server).await);
    });
}

#[test]
fn what_is_set_for_one_link_wins_over_the_whole_network_and_touches_no_other() {
    Sim::with_seed(11).run(|sim| async move {
        sim.network().latency(Latency::constant(TENTH));
        let servers = [echo::echo(&sim, Duration::ZERO), echo::echo(&sim, Duration::ZERO)];
        let client = sim.network().client();
        sim.network().link(client.local_peer(), servers[0].local_peer()).latency(Latency::constant(TENTH / 2));
        sim.network().one_way(servers[1].local_peer(), client.local_peer()).latency(Latency::constant(3 * TENTH));
        for (server, takes) in servers.iter().zip([TENTH, 4 * TENTH]) {
            let start = sim.now();
            assert!(asks(&sim, &client, server).await);
            assert_eq!(sim.now() - start, takes);
        }
    });
}
