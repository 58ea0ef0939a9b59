//! The order in which batches pass through a device, on a scripted one.

use std::time::Duration;

use skep_expert::{Batch, Kind, Lane};
use skep_kernel::Rows;
use skep_testkit::{ScriptedBackend, ScriptedDevice, Sim, Span, Work};

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn batch(sim: &Sim) -> Batch {
    Batch { rows: Rows(1), inputs: vec![sim.rows(1, 4)], grad_outputs: Vec::new() }
}

fn span(spans: &[Span], batch: usize, work: Work) -> Span {
    *spans.iter().find(|span| span.batch == batch && span.work == work).unwrap()
}

const RUN: Work = Work::Run(Kind::Forward);

#[test]
fn the_next_batch_is_copied_while_one_runs_and_answers_leave_in_order() {
    Sim::with_seed(1).run(|sim| async move {
        let device = ScriptedDevice::new(sim.clock(), millis(4), millis(10));
        let (mut lane, mut expert) = (Lane::new(device.clone()), ScriptedBackend::scale(2.0));
        let (mut next, mut answers) = (0, Vec::new());
        // An executor's turns, once a millisecond.
        while answers.len() < 5 {
            while next < 5 && lane.stage(Kind::Forward, batch(&sim), next).is_ok() {
                next += 1;
                lane.launch(&mut expert);
            }
            lane.launch(&mut expert);
            while let Some((tag, outcome)) = lane.finished() {
                assert!(outcome.is_ok());
                answers.push((tag, sim.now()));
            }
            sim.advance(millis(1)).await;
        }
        let spans = device.spans();
        for (place, (tag, at)) in answers.iter().enumerate() {
            assert_eq!(*tag, place, "in the order of staging");
            let run = span(&spans, *tag, RUN);
            assert!(run.to <= *at && *at <= run.to + millis(1), "an answer leaves when its batch is done");
        }
        for later in 1..5 {
            let (one, other) = (span(&spans, later - 1, RUN), span(&spans, later, RUN));
            assert_eq!(one.to, other.from, "the stream is never idle and runs one batch at a time");
            let copy = span(&spans, later, Work::Stage);
            assert!(copy.to <= other.from, "a batch runs when it is there");
            assert!((0..later).any(|earlier| copy.overlaps(&span(&spans, earlier, RUN))), "copies overlap with runs");
        }
        assert!(lane.is_empty());
    });
}

#[test]
fn one_batch_is_staged_and_two_are_launched_at_the_most() {
    Sim::with_seed(1).run(|sim| async move {
        let device = ScriptedDevice::new(sim.clock(), millis(1), millis(10));
        let (mut lane, mut expert) = (Lane::new(device), ScriptedBackend::scale(2.0));
        for tag in 0..2 {
            assert!(lane.stage(Kind::Forward, batch(&sim), tag).is_ok());
            assert!(lane.launch(&mut expert));
        }
        assert!(lane.stage(Kind::Forward, batch(&sim), 2).is_ok());
        assert!(!lane.launch(&mut expert), "two are in the stream");
        assert_eq!(lane.stage(Kind::Forward, batch(&sim), 3).unwrap_err().1, 3);
        sim.advance(millis(11)).await;
        assert_eq!(lane.finished().unwrap().0, 0);
        assert!(lane.finished().is_none(), "the second one still runs");
        assert!(lane.launch(&mut expert));
    });
}

#[test]
fn a_batch_that_fails_takes_no_other_along() {
    Sim::with_seed(1).run(|sim| async move {
        let device = ScriptedDevice::new(sim.clock(), millis(1), millis(10));
        let (mut lane, mut expert) = (Lane::new(device), ScriptedBackend::scale(2.0).fail_on(1));
        for tag in ["bad", "good"] {
            assert!(lane.stage(Kind::Forward, batch(&sim), tag).is_ok());
            lane.launch(&mut expert);
        }
        sim.advance(millis(30)).await;
        let outcomes: Vec<_> = std::iter::from_fn(|| lane.finished()).map(|(tag, out)| (tag, out.is_ok())).collect();
        assert_eq!(outcomes, [("bad", false), ("good", true)]);
    });
}
