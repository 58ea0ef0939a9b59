//! Many random schedules of replies, failures and silence, held against what waiting means in so many words.

use std::env;

use proptest::prelude::*;

use super::{
    tests::{at, choice, failure, plan},
    *,
};

/// Plays so many schedules, or as many as `SKEP_SCHEDULES` says.
fn schedules(usual: u32) -> ProptestConfig {
    let cases = env::var("SKEP_SCHEDULES").map_or(usual, |number| number.parse().expect("a number of schedules"));
    ProptestConfig { cases, ..ProptestConfig::default() }
}

/// What comes of one call.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answers { after: u64 },
    Fails { after: u64 },
    Silent,
}

impl Fate {
    /// When its outcome comes, in ms after the call was made, and whether it is an answer.
    fn outcome(self) -> Option<(u64, bool)> {
        match self {
            Fate::Answers { after } => Some((after, true)),
            Fate::Fails { after } => Some((after, false)),
            Fate::Silent => None,
        }
    }
}

const DEADLINE: u64 = 1000;

fn fate() -> impl Strategy<Value = Fate> {
    // Some are due at the deadline to the millisecond, some after it.
    prop_oneof![
        4 => (0..=DEADLINE + 100).prop_map(|after| Fate::Answers { after }),
        2 => (0..=DEADLINE + 100).prop_map(|after| Fate::Fails { after }),
        1 => Just(Fate::Silent),
        1 => Just(Fate::Answers { after: DEADLINE }),
    ]
}

/// A fan-out and everything that happens to it.
#[derive(Clone, Debug)]
struct Schedule {
    /// Experts by row, one per rank.
    rows: Vec<Vec<usize>>,
    k: usize,
    k_min: usize,
    /// `timeout_after_k_min` in ms.
    extra: Option<u64>,
    replan_at: Option<u64>,
    needs_every_row: bool,
    fates: Vec<Fate>,
    search_takes: u64,
}

prop_compose! {
    fn schedule()(k in 1usize..5)(
        rows in prop::collection::vec(prop::collection::btree_set(0usize..8, 0..=k), 1..7),
        k_min in 0..=k,
        extra in prop::option::of(0u64..600),
        replan_at in prop::option::of(0..DEADLINE),
        needs_every_row in any::<bool>(),
        fates in prop::collection::vec(fate(), 1..16),
        search_takes in 0u64..300,
        k in Just(k),
    ) -> Schedule {
        let rows = rows.into_iter().map(|row| row.into_iter().collect()).collect();
        Schedule { rows, k, k_min, extra, replan_at, needs_every_row, fates, search_takes }
    }
}

impl Schedule {
    fn plan(&self) -> Plan {
        let rows: Vec<&[usize]> = self.rows.iter().map(Vec::as_slice).collect();
        plan(&rows, self.k)
    }

    fn policy(&self) -> JoinPolicy {
        JoinPolicy {
            k_min: self.k_min,
            deadline: Deadline::at(at(DEADLINE)),
            timeout_after_k_min: self.extra.map(Duration::from_millis),
            replan_at: self.replan_at.map(at),
            needs_every_row: self.needs_every_row,
        }
    }

    fn fate(&self, slot: usize) -> Fate {
        self.fates[slot % self.fates.len()]
    }
}

/// What came of a schedule: when it ended, what was joined, how often each row was planned again.
struct Played {
    ended: u64,
    joined: Joined<usize>,
    /// Per place the first answer to come.
    first: Vec<Option<(Slot, usize)>>,
    replanned: Vec<usize>,
    plan: Plan,
}

/// Plays a schedule as `fan_out` would: outcomes in the order of their time, searches for other experts, alarms.
fn play(schedule: &Schedule) -> Played {
    let mut plan = schedule.plan();
    let mut join = Join::new(&plan, schedule.policy());
    let mut replanned = vec![0; schedule.rows.len()];
    let mut first = vec![None; schedule.rows.len() * schedule.k];
    // What is to come: at which ms, and either the slot whose outcome it is or the rows of a search.
    let mut events: BTreeMap<(u64, usize), Option<Vec<usize>>> = BTreeMap::new();
    let outcome = |slot: usize, from: u64| schedule.fate(slot).outcome().map(|(after, _)| ((from + after, slot), None));
    events.extend((0..plan.calls().len()).filter_map(|slot| outcome(slot, 0)));
    let mut now = 0;
    let mut progress = join.on_time(at(now));
    for _step in 0..1000 {
        match progress {
            Progress::Done => return Played { ended: now, joined: join.finish(), first, replanned, plan },
            Progress::Replan { rows } => {
                rows.iter().for_each(|&row| replanned[row] += 1);
                events.insert((now + schedule.search_takes, usize::MAX - rows[0]), Some(rows));
                progress = join.on_time(at(now));
            }
            Progress::Waiting { until } => {
                assert!(at(now) < until && until <= at(DEADLINE), "at {now} ms it would wait until {until:?}");
                let due = events.first_entry().filter(|entry| at(entry.key().0) <= until);
                progress = match due.map(|entry| entry.remove_entry()) {
                    None => {
                        now = until.as_nanos() / 1_000_000;
                        join.on_time(at(now))
                    }
                    Some(((when, slot), None)) => {
                        now = when;
                        let answers = matches!(schedule.fate(slot), Fate::Answers { .. });
                        for (index, place) in plan.calls()[slot].places.iter().enumerate().filter(|_| answers) {
                            first[place.row * schedule.k + place.rank].get_or_insert((Slot(slot), index));
                        }
                        join.on_reply(at(now), Slot(slot), if answers { Ok(slot) } else { Err(failure(slot)) })
                    }
                    Some(((when, _), Some(rows))) => {
                        now = when;
                        let vacant = rows.iter().filter_map(|&row| Some((row, *join.vacant(row).first()?)));
                        let added = plan.add(vacant.map(|(row, rank)| choice(row, rank, 100 + row)));
                        events.extend(added.into_iter().filter_map(|slot| outcome(slot.0, now)));
                        join.extend(&plan, &rows);
                        join.on_time(at(now))
                    }
                };
            }
        }
    }
    panic!("it comes to no end");
}

/// When a pass that is never planned again has to end, and the answers per row that it then has, counted anew at each
/// step from nothing but the outcomes so far.
fn in_so_many_words(schedule: &Schedule) -> (u64, Vec<usize>) {
    let plan = schedule.plan();
    let outcomes = |slot: &usize| schedule.fate(*slot).outcome().map(|(after, answer)| (after, *slot, answer));
    let mut outcomes: Vec<(u64, usize, bool)> = (0..plan.calls().len()).filter_map(|slot| outcomes(&slot)).collect();
    outcomes.sort_unstable();
    let places = |row: usize, slots: &[usize]| {
        let calls = slots.iter().flat_map(|&slot| &plan.call(Slot(slot)).places);
        calls.filter(|place| place.row == row).count()
    };
    let (mut answered, mut pending): (Vec<usize>, Vec<usize>) = (Vec::new(), (0..plan.calls().len()).collect());
    let (mut quorum_since, mut next, mut now) = (None, 0, 0);
    loop {
        let won: Vec<usize> = (0..plan.rows).map(|row| places(row, &answered)).collect();
        let lost = |row: usize| won[row] + places(row, &pending) < schedule.k_min;
        let satisfied = |row: usize| won[row] >= schedule.k_min;
        let given_up = schedule.needs_every_row && (0..plan.rows).any(lost);
        if now >= DEADLINE || pending.is_empty() || given_up {
            return (now.min(DEADLINE), won);
        }
        if quorum_since.is_none() && (0..plan.rows).all(|row| satisfied(row) || lost(row)) {
            quorum_since = Some(now);
        }
        let alarm = schedule.extra.zip(quorum_since).map_or(DEADLINE, |(extra, since)| DEADLINE.min(since + extra));
        if now >= alarm {
            return (now, won);
        }
        match outcomes.get(next).filter(|(when, ..)| *when <= alarm) {
            None => now = alarm,
            // What comes at the very moment of an alarm is still taken in.
            Some(&(when, slot, answer)) => {
                (now, next) = (when, next + 1);
                pending.retain(|&other| other != slot);
                answered.extend(answer.then_some(slot));
            }
        }
    }
}

proptest! {
    #![proptest_config(schedules(10_000))]

    #[test]
    fn a_join_ends_by_its_deadline_under_any_mix_of_answers_failures_and_silence(schedule in schedule()) {
        let Played { ended, joined, first, replanned, plan } = play(&schedule);
        prop_assert_eq!(&joined.winners, &first);
        prop_assert!(ended <= DEADLINE, "it ended at {} ms", ended);
        prop_assert!(replanned.iter().all(|&times| times <= usize::from(schedule.replan_at.is_some())));
        for (row, places) in joined.winners.chunks(schedule.k).enumerate() {
            let won = places.iter().flatten().count();
            prop_assert_eq!(joined.short.contains(&row), won < schedule.k_min);
        }
        for (slot, index) in joined.winners.iter().flatten() {
            prop_assert!(joined.answers.contains_key(slot) && *index < plan.call(*slot).places.len());
        }
        // Whoever is not heard of is not forgotten either: every call has exactly one end.
        let ends = joined.answers.len() + joined.failures.len() + joined.unanswered.len();
        prop_assert_eq!(ends, plan.calls().len());
    }
}

/// Played, a schedule ends when the rules in so many words say, and each row has as many answers.
fn ends_as_said(schedule: &Schedule) -> Result<(), TestCaseError> {
    let (ends, answers) = in_so_many_words(schedule);
    let Played { ended, joined, .. } = play(schedule);
    prop_assert_eq!(ended, ends);
    let won: Vec<usize> = joined.winners.chunks(schedule.k).map(|row| row.iter().flatten().count()).collect();
    prop_assert_eq!(won, answers);
    Ok(())
}

proptest! {
    #![proptest_config(schedules(2_000))]

    #[test]
    fn forward_waits_for_k_min_answers_per_row_and_so_long_after_them(schedule in schedule()) {
        // Nobody else can be found, and a row that is lost makes the others worthless.
        let schedule = Schedule { replan_at: None, needs_every_row: true, ..schedule };
        ends_as_said(&schedule)?;
    }

    #[test]
    fn backward_waits_for_rows_that_can_have_backward_k_min_answers_and_so_long_after_them(schedule in schedule()) {
        let schedule = Schedule { replan_at: None, needs_every_row: false, ..schedule };
        ends_as_said(&schedule)?;
    }

    /// A row that is short when it may be planned again gets its other experts, and their answers count.
    #[test]
    fn no_row_is_short_that_was_planned_again_with_an_expert_that_answers(schedule in schedule()) {
        let schedule = Schedule { k: 1, k_min: 1, replan_at: Some(500), search_takes: 100, ..schedule };
        let rows = schedule.rows.iter().map(|row| row.iter().copied().take(1).collect()).collect();
        let schedule = Schedule { rows, needs_every_row: false, ..schedule };
        let Played { joined, replanned, plan, .. } = play(&schedule);
        for (row, &times) in replanned.iter().enumerate() {
            let first = schedule.plan().calls().len();
            let rival = plan.calls().iter().enumerate().skip(first).find(|(_, call)| call.places[0].row == row);
            let answers = rival.is_some_and(|(slot, _)| {
                matches!(schedule.fate(slot), Fate::Answers { after } if after < DEADLINE - 600)
            });
            prop_assert!(times == 0 || !answers || !joined.short.contains(&row), "row {} stays short", row);
        }
    }
}
