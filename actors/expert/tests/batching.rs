//! What runs together, in which order, and when.

mod common;

use common::*;
use skep_expert::{Kind, ServerConfig};
use skep_testkit::Sim;

const FORWARD: Kind = Kind::Forward;
const BACKWARD: Kind = Kind::Backward;

#[test]
fn what_queued_up_while_the_device_was_busy_is_one_batch() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let server = start(&sim, ServerConfig::default(), vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let first = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let tasks = [3, 1, 2].map(|n| e.submit(FORWARD, vec![rows(n, 2, n as f32)], within(&sim, 1000)).unwrap());
        first.answer().await.unwrap();
        for (result, n) in answers(tasks).await.into_iter().zip([3, 1, 2]) {
            assert_eq!(result.unwrap(), vec![rows(n, 2, n as f32)], "each caller gets its own rows");
        }
        assert_eq!(log.batches(), [(FORWARD, 1), (FORWARD, 6)]);
    });
}

#[test]
fn two_widths_at_once_hurt_nobody() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let server = start(&sim, ServerConfig::default(), vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let first = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let widths = [2, 3, 2, 3];
        let tasks = widths.map(|width| e.submit(FORWARD, vec![rows(1, width, 1.0)], within(&sim, 1000)).unwrap());
        first.answer().await.unwrap();
        for (result, width) in answers(tasks).await.into_iter().zip(widths) {
            assert_eq!(result.unwrap(), vec![rows(1, width, 1.0)]);
        }
        assert_eq!(log.batches(), [(FORWARD, 1), (FORWARD, 2), (FORWARD, 2)]);
    });
}

#[test]
fn a_batch_never_exceeds_max_batch_size_and_a_larger_request_is_refused() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let config = ServerConfig { max_batch_size: 4, ..Default::default() };
        let server = start(&sim, config, vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let refused = e.submit(FORWARD, vec![rows(5, 2, 0.0)], within(&sim, 1000)).err().unwrap();
        assert_eq!(refused.to_string(), "a request of 5 rows is over this server's max_batch_size of 4");
        let first = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let tasks = [3, 2, 2].map(|n| e.submit(FORWARD, vec![rows(n, 2, 0.0)], within(&sim, 1000)).unwrap());
        first.answer().await.unwrap();
        assert!(answers(tasks).await.iter().all(Result::is_ok));
        assert_eq!(log.batches(), [(FORWARD, 1), (FORWARD, 3), (FORWARD, 4)]);
    });
}

#[test]
fn forward_and_backward_take_turns_by_age() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let config = ServerConfig { max_batch_size: 1, ..Default::default() };
        let server = start(&sim, config, vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let mut tasks = vec![occupy(&sim, &e)];
        for kind in [BACKWARD, FORWARD, FORWARD, BACKWARD] {
            sim.advance(millis(1)).await;
            let tensors = vec![rows(1, 2, 0.0); if kind == FORWARD { 1 } else { 2 }];
            let deadline = within(&sim, 1000);
            tasks.push(e.submit(kind, tensors, deadline).unwrap());
        }
        assert!(answers(tasks).await.iter().all(Result::is_ok));
        let kinds: Vec<Kind> = log.batches().into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [FORWARD, BACKWARD, FORWARD, FORWARD, BACKWARD]);
    });
}

#[test]
fn a_hot_expert_does_not_starve_a_cold_one() {
    Sim::with_seed(1).run(|sim| async move {
        let config = ServerConfig { max_batch_size: 1, mailbox_rows: 100, ..Default::default() };
        let hosted = vec![Closures::echo().hosted("hot.0"), Closures::echo().hosted("cold.0")];
        let server = start(&sim, config, hosted).await;
        let (hot, cold) = (expert(&server, "hot.0"), expert(&server, "cold.0"));
        let crowd: Vec<_> = (0..50).map(|_| occupy(&sim, &hot)).collect();
        let begun = sim.now();
        occupy(&sim, &cold).answer().await.unwrap();
        let waited = sim.now() - begun;
        assert!(waited <= millis(30), "cold expert waited {waited:?} behind 500 ms of work for the hot one");
        assert!(answers(crowd).await.iter().all(Result::is_ok));
    });
}

#[test]
fn a_small_batch_waits_for_more_but_never_longer_than_max_wait() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let config = ServerConfig { min_batch_size: 3, ..Default::default() };
        let server = start(&sim, config, vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let begun = sim.now();
        occupy(&sim, &e).answer().await.unwrap();
        assert_eq!(sim.now() - begun, millis(60), "50 ms of waiting and 10 ms of work");

        let begun = sim.now();
        let one = occupy(&sim, &e);
        sim.advance(millis(20)).await;
        let two = e.submit(FORWARD, vec![rows(2, 2, 0.0)], within(&sim, 1000)).unwrap();
        assert!(answers([one, two]).await.iter().all(Result::is_ok));
        assert_eq!(sim.now() - begun, millis(30), "it ran as soon as three rows were there");
        assert_eq!(log.batches(), [(FORWARD, 1), (FORWARD, 3)]);
    });
}
