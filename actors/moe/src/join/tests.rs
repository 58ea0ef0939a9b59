use libp2p_identity::PeerId;

use super::*;
use crate::plan::Choice;

pub(super) fn at(millis: u64) -> Moment {
    Moment::START + Duration::from_millis(millis)
}

pub(super) fn choice(row: usize, rank: usize, expert: usize) -> Choice {
    let uid = format!("m.{expert}").parse().unwrap();
    Choice { place: Place { row, rank }, uid, peer: peer(expert), coordinates: vec![expert] }
}

fn peer(expert: usize) -> PeerId {
    let seed = [u8::try_from(expert % 251).unwrap(); 32];
    libp2p_identity::Keypair::ed25519_from_bytes(seed).unwrap().public().to_peer_id()
}

pub(super) fn failure(expert: usize) -> RpcError {
    RpcError::Malformed { peer: peer(expert), reason: "ordered".to_owned() }
}

fn policy() -> JoinPolicy {
    JoinPolicy {
        k_min: 1,
        deadline: Deadline::at(at(1000)),
        timeout_after_k_min: None,
        replan_at: Some(at(500)),
        needs_every_row: true,
    }
}

/// One row per list, whose experts stand on ranks 0, 1, …
pub(super) fn plan(rows: &[&[usize]], k: usize) -> Plan {
    let mut plan = Plan::new(rows.len(), k);
    let rows = rows.iter().enumerate();
    plan.add(
        rows.flat_map(|(row, experts)| {
            experts.iter().enumerate().map(move |(rank, expert)| choice(row, rank, *expert))
        }),
    );
    plan
}

const fn waiting(until: Moment) -> Progress {
    Progress::Waiting { until }
}

#[test]
fn all_answers_complete_it_at_once() {
    let mut join = Join::new(&plan(&[&[0, 1], &[0, 2]], 2), JoinPolicy { replan_at: None, ..policy() });
    assert_eq!(join.on_reply(at(1), Slot(0), Ok("a")), waiting(at(1000)));
    assert_eq!(join.on_reply(at(2), Slot(2), Ok("c")), waiting(at(1000)));
    assert_eq!(join.on_reply(at(3), Slot(1), Ok("b")), Progress::Done);
    let joined = join.finish();
    let winners = [Some((Slot(0), 0)), Some((Slot(1), 0)), Some((Slot(0), 1)), Some((Slot(2), 0))];
    assert_eq!(joined.winners, winners);
    assert!(joined.short.is_empty() && joined.failures.is_empty() && joined.unanswered.is_empty());
}

#[test]
fn after_k_min_it_waits_so_long_and_no_longer() {
    let policy = JoinPolicy { timeout_after_k_min: Some(Duration::from_millis(100)), ..policy() };
    let mut join = Join::new(&plan(&[&[0, 1], &[0, 1]], 2), policy);
    assert_eq!(join.on_time(at(0)), waiting(at(500)));
    assert_eq!(join.on_reply(at(50), Slot(0), Ok(())), waiting(at(150)));
    assert_eq!(join.on_time(at(149)), waiting(at(150)));
    assert_eq!(join.on_time(at(150)), Progress::Done);
    assert_eq!(join.on_reply(at(151), Slot(1), Ok(())), Progress::Done, "late answers are ignored");
    let joined = join.finish();
    assert_eq!(joined.winners, [Some((Slot(0), 0)), None, Some((Slot(0), 1)), None]);
    assert_eq!(joined.unanswered, [Slot(1)]);
}

#[test]
fn the_deadline_ends_it_whatever_is_missing() {
    let mut join = Join::<()>::new(&plan(&[&[0]], 1), JoinPolicy { replan_at: None, ..policy() });
    assert_eq!(join.on_time(at(999)), waiting(at(1000)));
    assert_eq!(join.on_time(at(1000)), Progress::Done);
    assert_eq!(join.finish().short, [0]);
}

#[test]
fn a_row_that_failures_leave_short_is_planned_again_once() {
    let mut plan = plan(&[&[0], &[1]], 1);
    let mut join = Join::new(&plan, policy());
    assert_eq!(join.on_reply(at(1), Slot(0), Err(failure(0))), Progress::Replan { rows: vec![0] });
    assert_eq!(join.on_time(at(1)), waiting(at(500)));
    assert_eq!(join.vacant(0), [0]);
    plan.add([choice(0, 0, 7)]);
    join.extend(&plan, &[0]);
    assert_eq!(join.on_reply(at(2), Slot(1), Ok("b")), waiting(at(1000)));
    assert_eq!(join.on_reply(at(3), Slot(2), Ok("z")), Progress::Done);
    let joined = join.finish();
    assert_eq!(joined.winners, [Some((Slot(2), 0)), Some((Slot(1), 0))]);
    assert_eq!(joined.failures, [(Slot(0), failure(0))]);
}

#[test]
fn a_row_that_cannot_be_saved_ends_a_batch_that_needs_every_row() {
    let mut join = Join::new(&plan(&[&[0], &[1]], 1), policy());
    assert_eq!(join.on_reply(at(1), Slot(0), Err::<(), _>(failure(0))), Progress::Replan { rows: vec![0] });
    join.extend(&plan(&[&[0], &[1]], 1), &[0]);
    assert_eq!(join.on_time(at(2)), Progress::Done);
    assert_eq!(join.finish().short, [0, 1]);
}

#[test]
fn a_row_that_cannot_be_saved_does_not_hold_up_the_others() {
    let policy = JoinPolicy {
        needs_every_row: false,
        replan_at: None,
        timeout_after_k_min: Some(Duration::from_millis(10)),
        ..policy()
    };
    let mut join = Join::new(&plan(&[&[0], &[1, 2]], 2), policy);
    assert_eq!(join.on_reply(at(1), Slot(0), Err(failure(0))), waiting(at(1000)));
    assert_eq!(join.on_reply(at(2), Slot(1), Ok(())), waiting(at(12)));
    assert_eq!(join.on_time(at(12)), Progress::Done);
}

#[test]
fn silent_experts_get_a_second_chance_and_a_rival() {
    let mut plan = plan(&[&[0]], 1);
    let mut join = Join::new(&plan, policy());
    assert_eq!(join.on_time(at(500)), Progress::Replan { rows: vec![0] });
    plan.add([choice(0, 0, 7)]);
    join.extend(&plan, &[0]);
    assert_eq!(join.on_time(at(501)), waiting(at(1000)));
    assert_eq!(join.on_reply(at(502), Slot(0), Ok("slow")), Progress::Done);
    assert_eq!(join.on_reply(at(503), Slot(1), Ok("rival")), Progress::Done);
    assert_eq!(join.finish().winners, [Some((Slot(0), 0))]);
}

#[test]
fn without_k_min_nothing_is_planned_again_and_the_wait_is_the_extra_one() {
    let policy = JoinPolicy { k_min: 0, timeout_after_k_min: Some(Duration::from_millis(10)), ..policy() };
    let mut join = Join::<()>::new(&plan(&[&[0]], 1), policy);
    assert_eq!(join.on_time(at(0)), waiting(at(10)));
    assert_eq!(join.on_time(at(10)), Progress::Done);
    assert!(join.finish().short.is_empty());
}

#[test]
fn a_search_that_found_too_few_is_not_repeated() {
    let mut join = Join::<()>::new(&plan(&[&[]], 1), policy());
    assert_eq!(join.on_time(at(0)), Progress::Done);
    assert_eq!(join.finish().short, [0]);
}
