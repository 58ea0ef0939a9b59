//! Full lines, deadlines, and callers who leave.

mod common;

use common::*;
use skep_expert::{Kind, ServerConfig};
use skep_rpc::ServeError;
use skep_testkit::Sim;

fn narrow() -> ServerConfig {
    ServerConfig { max_batch_size: 2, mailbox_rows: 2, ..Default::default() }
}

#[test]
fn a_full_line_refuses_those_who_understand_it_and_lets_the_others_wait() {
    Sim::with_seed(1).run(|sim| async move {
        let server = start(&sim, narrow(), vec![Closures::echo().hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let running = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let in_line = e.submit(Kind::Forward, vec![rows(2, 2, 1.0)], within(&sim, 1000)).unwrap();
        let refused = e.submit(Kind::Forward, vec![rows(1, 2, 2.0)], within(&sim, 1000)).err();
        assert!(matches!(refused, Some(ServeError::Overloaded { waiting: 2, limit: 2, .. })), "{refused:?}");
        let patient = e.submit_when_room(Kind::Forward, vec![rows(1, 2, 3.0)], within(&sim, 1000)).await.unwrap();
        assert_eq!(patient.answer().await.unwrap(), [rows(1, 2, 3.0)]);
        assert!(answers([running, in_line]).await.iter().all(Result::is_ok));
    });
}

#[test]
fn waiting_for_room_ends_at_the_deadline() {
    Sim::with_seed(1).run(|sim| async move {
        let server = start(&sim, narrow(), vec![Closures::echo().hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let _running = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let _in_line = e.submit(Kind::Forward, vec![rows(2, 2, 1.0)], within(&sim, 1000)).unwrap();
        let begun = sim.now();
        let refused = e.submit_when_room(Kind::Forward, vec![rows(1, 2, 3.0)], within(&sim, 5)).await.err();
        assert!(matches!(refused, Some(ServeError::Overloaded { .. })), "{refused:?}");
        assert_eq!(sim.now() - begun, millis(5));
    });
}

#[test]
fn a_task_past_its_deadline_never_runs() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let server = start(&sim, ServerConfig::default(), vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let running = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let begun = sim.now();
        let hasty = e.submit(Kind::Forward, vec![rows(7, 2, 1.0)], within(&sim, 5)).unwrap();
        assert_eq!(hasty.answer().await, Err(ServeError::Deadline));
        assert_eq!(sim.now() - begun, millis(5));
        running.answer().await.unwrap();
        sim.advance(millis(50)).await;
        assert_eq!(log.batches(), [(Kind::Forward, 1)]);
        assert_eq!((e.status().skipped, e.status().waiting_rows), (1, 0));
        let past = e.submit(Kind::Forward, vec![rows(1, 2, 1.0)], within(&sim, 0)).err();
        assert_eq!(past, Some(ServeError::Deadline));
    });
}

#[test]
fn a_caller_who_left_costs_nothing() {
    Sim::with_seed(1).run(|sim| async move {
        let log = Log::default();
        let server = start(&sim, ServerConfig::default(), vec![Closures::echo().logging_to(&log).hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let running = occupy(&sim, &e);
        sim.advance(millis(1)).await;
        let leaves = e.submit(Kind::Backward, vec![rows(1, 2, 1.0), rows(1, 2, 1.0)], within(&sim, 1000)).unwrap();
        let stays = e.submit(Kind::Backward, vec![rows(2, 2, 2.0), rows(2, 2, 2.0)], within(&sim, 1000)).unwrap();
        drop(leaves);
        running.answer().await.unwrap();
        assert_eq!(stays.answer().await.unwrap(), [rows(2, 2, 2.0)]);
        assert_eq!(log.batches(), [(Kind::Forward, 1), (Kind::Backward, 2)]);
    });
}
