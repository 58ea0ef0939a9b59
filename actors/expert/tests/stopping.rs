//! Nobody's work is lost when a server stops.

mod common;

use common::*;
use skep_expert::{ExpertMessage, ExpertState, Kind, ServerConfig, ServerError};
use skep_rpc::ServeError;
use skep_testkit::Sim;

#[test]
fn what_was_accepted_is_finished_before_a_server_stops() {
    Sim::with_seed(1).run(|sim| async move {
        let config = ServerConfig { max_batch_size: 1, mailbox_rows: 100, ..Default::default() };
        let server = start(&sim, config, vec![Closures::echo().hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let accepted: Vec<_> = (0..20).map(|_| occupy(&sim, &e)).collect();
        let answering = actix_rt::spawn(answers(accepted));
        server.stop(within(&sim, 1000)).await.unwrap();
        assert!(answering.await.unwrap().iter().all(Result::is_ok));
        let refused = e.submit(Kind::Forward, vec![rows(1, 2, 0.0)], within(&sim, 1000)).err();
        assert_eq!(refused, Some(ServeError::Stopping));
        assert_eq!(e.state(), ExpertState::Stopped);
        assert_eq!(server.stop(within(&sim, 1000)).await, Err(ServerError::Stopping));
    });
}

#[test]
fn what_cannot_be_finished_in_time_is_answered_with_an_error() {
    Sim::with_seed(1).run(|sim| async move {
        let config = ServerConfig { max_batch_size: 1, mailbox_rows: 4, ..Default::default() };
        let server = start(&sim, config, vec![Closures::echo().hosted("e.0")]).await;
        let e = expert(&server, "e.0");
        let accepted: Vec<_> = (0..4).map(|_| occupy(&sim, &e)).collect();
        let answering = actix_rt::spawn(answers(accepted));
        let waits_for_room = actix_rt::spawn({
            let (e, deadline) = (e.clone(), within(&sim, 60_000));
            async move { e.submit_when_room(Kind::Forward, vec![rows(3, 2, 0.0)], deadline).await.err() }
        });
        let begun = sim.now();
        let stopped = server.stop(within(&sim, 25)).await;
        assert_eq!(stopped, Err(ServerError::Unfinished { unfinished: 1 }));
        assert!(sim.now() - begun < millis(600));
        let results = answering.await.unwrap();
        let finished = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(finished, 3, "two before the deadline and the one that was running");
        assert_eq!(results[3], Err(ServeError::Stopping));
        assert!(waits_for_room.await.unwrap().is_some());
    });
}

#[test]
fn one_expert_can_stop_while_the_others_go_on() {
    Sim::with_seed(1).run(|sim| async move {
        let hosted = vec![Closures::echo().hosted("e.0"), Closures::echo().hosted("e.1")];
        let server = start(&sim, ServerConfig::default(), hosted).await;
        let task = occupy(&sim, &expert(&server, "e.0"));
        assert!(expert(&server, "e.0").stop(within(&sim, 1000)).await);
        task.answer().await.unwrap();
        occupy(&sim, &expert(&server, "e.1")).answer().await.unwrap();
    });
}

#[test]
fn an_experts_actor_answers_questions_and_ends_with_its_expert() {
    Sim::with_seed(1).run(|sim| async move {
        let server = start(&sim, ServerConfig::default(), vec![Closures::echo().hosted("e.0")]).await;
        let (e, clock) = (expert(&server, "e.0"), sim.clock());
        let inbox = e.inbox();
        let info = inbox.ask(&*clock, within(&sim, 1000), ExpertMessage::Info).await.unwrap();
        assert_eq!(&info, e.info());
        occupy(&sim, &e).answer().await.unwrap();
        let stats = inbox.ask(&*clock, within(&sim, 1000), ExpertMessage::Stats).await.unwrap();
        assert_eq!((stats.forward_tasks, stats.rows), (1, 1));
        let deadline = within(&sim, 1000);
        let saved = inbox.ask(&*clock, deadline, |reply| ExpertMessage::Save(deadline, reply)).await.unwrap();
        assert_eq!(saved.unwrap().step, 0);
        let finished = inbox.ask(&*clock, deadline, |reply| ExpertMessage::Stop(deadline, reply)).await.unwrap();
        assert!(finished);
        assert_eq!(e.state(), ExpertState::Stopped);
        sim.advance(millis(10)).await;
        let unheard = inbox.ask(&*clock, within(&sim, 50), ExpertMessage::Stats).await;
        assert!(unheard.is_err(), "nobody reads the inbox any more");
    });
}
