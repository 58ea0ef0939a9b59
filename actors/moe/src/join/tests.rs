use libp2p_identity::PeerId;
use proptest::prelude::*;

use super::*;
use crate::plan::Choice;

fn at(millis: u64) -> Moment {
    Moment::START + Duration::from_millis(millis)
}

fn choice(row: usize, rank: usize, expert: usize) -> Choice {
    let uid = format!("m.{expert}").parse().unwrap();
    Choice { place: Place { row, rank }, uid, peer: peer(expert), coordinates: vec![expert] }
}

fn peer(expert: usize) -> PeerId {
    let seed = [u8::try_from(expert % 251).unwrap(); 32];
    libp2p_identity::Keypair::ed25519_from_bytes(seed).unwrap().public().to_peer_id()
}

fn failure(expert: usize) -> RpcError {
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
fn plan(rows: &[&[usize]], k: usize) -> Plan {
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

/// When a call ends, and how.
#[derive(Clone, Debug)]
struct Fate {
    after: u64,
    ok: bool,
}

fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = (0u64..1500, any::<bool>()).prop_map(|(after, ok)| Fate { after, ok });
    prop::collection::vec(fate, 12)
}

#[derive(Clone, Debug)]
struct Script {
    /// Experts by row, one per rank.
    rows: Vec<Vec<usize>>,
    k: usize,
    policy: JoinPolicy,
    fates: Vec<Fate>,
    search_takes: u64,
}

prop_compose! {
    fn script()(k in 1usize..4)(
        rows in prop::collection::vec(prop::collection::btree_set(0usize..6, 0..=k), 1..6),
        k_min in 0..=k,
        extra in prop::option::of(0u64..600),
        replan in prop::option::of(0u64..1000),
        needs_every_row in any::<bool>(),
        fates in fates(),
        search_takes in 0u64..300,
        k in Just(k),
    ) -> Script {
        let policy = JoinPolicy {
            k_min,
            deadline: Deadline::at(at(1000)),
            timeout_after_k_min: extra.map(Duration::from_millis),
            replan_at: replan.map(at),
            needs_every_row,
        };
        Script { rows: rows.into_iter().map(|row| row.into_iter().collect()).collect(), k, policy, fates, search_takes }
    }
}

proptest! {
    /// Plays a script out and holds what comes of it against the script.
    #[test]
    fn every_schedule_ends_by_the_deadline_with_the_winners_it_had(script in script()) {
        let rows: Vec<&[usize]> = script.rows.iter().map(Vec::as_slice).collect();
        let mut plan = plan(&rows, script.k);
        let mut join = Join::new(&plan, script.policy);
        let mut now = Moment::START;
        // Outcomes to come, by time and slot; searches to come, by time.
        let outcome = |slot: usize, from: Moment| {
            let fate = &script.fates[slot % script.fates.len()];
            (from + Duration::from_millis(fate.after), slot)
        };
        let mut outcomes: Vec<_> = (0..plan.calls().len()).map(|slot| outcome(slot, now)).collect();
        let mut searches: Vec<(Moment, Vec<usize>)> = Vec::new();
        let mut replanned = vec![0; script.rows.len()];
        let mut expected = vec![None; script.rows.len() * script.k];
        let mut progress = join.on_time(now);
        let mut steps = 0;
        loop {
            steps += 1;
            prop_assert!(steps < 200, "it comes to an end");
            let until = match progress {
                Progress::Done => break,
                Progress::Replan { rows } => {
                    rows.iter().for_each(|&row| replanned[row] += 1);
                    searches.push((now + Duration::from_millis(script.search_takes), rows));
                    progress = join.on_time(now);
                    continue;
                }
                Progress::Waiting { until } => until,
            };
            prop_assert!(until > now && until <= script.policy.deadline.moment());
            outcomes.sort();
            let next_outcome = outcomes.first().map(|(when, _)| *when).filter(|when| *when <= until);
            let next_search = searches.first().map(|(when, _)| *when).filter(|when| *when <= until);
            progress = match (next_outcome, next_search) {
                (Some(when), search) if search.is_none_or(|search| when <= search) => {
                    now = now.max(when);
                    let (_, slot) = outcomes.remove(0);
                    let ok = script.fates[slot % script.fates.len()].ok;
                    if ok && !script.policy.deadline.has_passed(now) {
                        for (index, place) in plan.calls()[slot].places.iter().enumerate() {
                            expected[place.row * script.k + place.rank].get_or_insert((Slot(slot), index));
                        }
                    }
                    join.on_reply(now, Slot(slot), if ok { Ok(slot) } else { Err(failure(slot)) })
                }
                (_, Some(when)) => {
                    now = now.max(when);
                    let (_, rows) = searches.remove(0);
                    let vacant = rows.iter().filter_map(|&row| Some((row, *join.vacant(row).first()?)));
                    let added = plan.add(vacant.map(|(row, rank)| choice(row, rank, 100 + row)));
                    outcomes.extend(added.into_iter().map(|slot| outcome(slot.0, now)));
                    join.extend(&plan, &rows);
                    join.on_time(now)
                }
                (None, None) => {
                    now = until;
                    join.on_time(now)
                }
                (Some(_), None) => unreachable!("an outcome without a rival search comes first"),
            };
        }
        prop_assert!(now <= script.policy.deadline.moment());
        prop_assert!(replanned.iter().all(|&times| times <= 1));
        if script.policy.replan_at.is_none() {
            prop_assert!(replanned.iter().all(|&times| times == 0));
        }
        let joined = join.finish();
        // At the deadline itself an answer may still be taken in, or not.
        if now < script.policy.deadline.moment() {
            prop_assert_eq!(&joined.winners, &expected);
        }
        for (row, places) in joined.winners.chunks(script.k).enumerate() {
            let won = places.iter().flatten().count();
            prop_assert_eq!(joined.short.contains(&row), won < script.policy.k_min);
        }
        for (slot, index) in joined.winners.iter().flatten() {
            prop_assert!(joined.answers.contains_key(slot) && *index < plan.call(*slot).places.len());
        }
    }
}
