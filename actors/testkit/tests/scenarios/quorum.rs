//! `k_min` is per row, and `timeout_after_k_min` begins when the last row has its `k_min` answers: forward and backward
//! end at the very moment that follows from what each expert takes.

use rand::{Rng, seq::SliceRandom};
use skep_moe::{GridScores, MoeError};
use skep_testkit::{ScriptedBackend, Sim};

use crate::common::*;

/// Experts in all; each row of a batch asks `K` of its own.
const EXPERTS: usize = 12;
const K: usize = 4;
const ROWS: usize = EXPERTS / K;
/// Timeouts of the passes, in ms.
const TIMEOUT: u64 = 1000;

/// What each expert takes in ms; `None` never answers.
type Takes = [Option<u64>; EXPERTS];

struct Rule {
    k_min: usize,
    extra: Option<u64>,
    /// Rows that cannot have `k_min` answers make the pass end: backward goes on without them.
    gives_up: bool,
}

impl Rule {
    /// When a pass ends and which experts have answered by then, if only `asked` are asked.
    fn ends(&self, takes: &Takes, asked: &[bool; EXPERTS]) -> (u64, [bool; EXPERTS]) {
        let answers = |row: usize| {
            let experts = (row * K..(row + 1) * K).filter(|&expert| asked[expert]);
            let mut times: Vec<u64> = experts.map(|expert| takes[expert].unwrap_or(u64::MAX)).collect();
            times.sort_unstable();
            times
        };
        // Rows of which too few were asked are not waited for.
        let rows = (0..ROWS).map(answers).filter(|times| self.gives_up || times.len() >= self.k_min);
        let rows: Vec<Vec<u64>> = rows.collect();
        let quorum = |times: &Vec<u64>| if self.k_min == 0 { 0 } else { times[self.k_min - 1] };
        let quorum = rows.iter().map(quorum).max().unwrap_or(0);
        let everything = (0..ROWS).flat_map(answers).max().unwrap_or(0);
        let patience = self.extra.map_or(u64::MAX, |extra| quorum.saturating_add(extra));
        let end = TIMEOUT.min(everything).min(patience);
        (end, std::array::from_fn(|expert| asked[expert] && takes[expert].is_some_and(|takes| takes <= end)))
    }
}

#[test]
fn every_row_gets_its_k_min_answers_and_waits_so_long_after_them() {
    let watch = Stopwatch::start("2, quorums");
    let (mut passes, mut errors) = (0, 0);
    for seed in 0..size(60, 3_000) {
        Sim::with_seed(seed).run(schedule).iter().for_each(|ok| {
            passes += 1;
            errors += usize::from(!ok);
        });
    }
    assert!(errors * 10 > passes && errors * 3 < passes * 2, "{errors} errors in {passes} passes");
    watch.report(format!("{passes} passes, {errors} of them without a quorum"));
}

/// Forward and backward over rows that share no expert; tells of each whether it gave a result.
async fn schedule(sim: Sim) -> Vec<bool> {
    let told = format!("seed {}", sim.seed());
    let random = &mut random(sim.seed());
    // No two moments coincide: experts end at …3 ms, waits at …8 ms.
    let mut moments: Vec<u64> = (0..90).map(|step| 10 * step + 3).collect();
    moments.shuffle(random);
    let costs: [u64; EXPERTS] = std::array::from_fn(|expert| moments[expert]);
    let backend = move |uid: &skep_wire::ExpertUid| {
        let expert = uid.coordinates().unwrap()[0] as usize;
        ScriptedBackend::scale(2.0).costing(millis(costs[expert]))
    };
    let hive = sim.servers(EXPERTS).experts("m.[0:12]").backend_by_uid(backend).start().await;
    let extra = random.random_bool(0.7).then(|| 10 * random.random_range(0..60) + 5);
    let (k_min, backward_k_min) = (random.random_range(1..=K), random.random_range(0..=K));
    let timeout = millis(TIMEOUT);
    let mut moe = sim.client(&hive).moe("m.", [EXPERTS]).k_best(K).k_min(k_min).backward_k_min(backward_k_min);
    moe = moe.forward_timeout(timeout).backward_timeout(timeout);
    if let Some(extra) = extra {
        moe = moe.timeout_after_k_min(millis(extra));
    }
    let moe = moe.build().await;

    let silent = random.random_range(0.0..0.4);
    let takes: Takes = std::array::from_fn(|expert| (!random.random_bool(silent)).then_some(costs[expert]));
    let node = |expert: usize| hive.hosting(&format!("m.{expert}")).node().clone();
    (0..EXPERTS).filter(|&expert| takes[expert].is_none()).for_each(|expert| node(expert).freeze());

    let asked = [true; EXPERTS];
    let (end, answered) = Rule { k_min, extra, gives_up: true }.ends(&takes, &asked);
    let started = sim.now();
    let forward = moe.mixture().forward(vec![column(&[1.0; ROWS])], own_experts()).await;
    assert_eq!(sim.now() - started, millis(end), "{told}: forward");
    let enough = |row: usize| answered[row * K..(row + 1) * K].iter().filter(|answered| **answered).count() >= k_min;
    let mut ends = vec![forward.is_ok()];
    match &forward {
        Ok(gather) => {
            assert!((0..ROWS).all(enough), "{told}");
            assert_eq!(gather.mask, answered, "{told}: forward");
        }
        Err(MoeError::TooFewAnswers { rows, .. }) => {
            let short: Vec<usize> = (0..ROWS).filter(|row| !enough(*row)).collect();
            assert_eq!(*rows, short, "{told}: forward");
        }
        Err(other) => panic!("{told}: {other}"),
    }
    let Ok(gather) = forward else { return ends };

    // Some are silent by now, some twice as slow.
    sim.advance(secs(60)).await;
    let factor = random.random_range(1..=2);
    let takes: Takes = std::array::from_fn(|expert| {
        let takes = takes[expert].filter(|_| !random.random_bool(0.2));
        takes.map(|takes| takes * factor)
    });
    for (expert, takes) in takes.iter().enumerate() {
        match takes {
            None => node(expert).freeze(),
            Some(_) => node(expert).slow(factor as f64),
        }
    }
    let asked: [bool; EXPERTS] = gather.mask.clone().try_into().unwrap();
    let (end, answered) = Rule { k_min: backward_k_min, extra, gives_up: false }.ends(&takes, &asked);
    let gradients = skep_wire::HostTensor::from_f32([ROWS, K, 1], &[1.0; EXPERTS]).unwrap();
    let started = sim.now();
    let backward = moe.mixture().backward(&gather, vec![column(&[1.0; ROWS])], vec![gradients]).await;
    assert_eq!(sim.now() - started, millis(end), "{told}: backward");
    ends.push(backward.is_ok());
    let won = |row: usize| answered[row * K..(row + 1) * K].iter().filter(|answered| **answered).count();
    match backward {
        Ok(backward) => {
            assert_eq!(backward.mask, answered, "{told}: backward");
            let sums: Vec<f32> = (0..ROWS).map(|row| 2.0 * won(row) as f32).collect();
            assert_eq!(backward.grad_inputs[0].to_f32().unwrap(), sums, "{told}: missing gradients count as zero");
        }
        // An error only when no row that was asked has enough.
        Err(MoeError::TooFewAnswers { .. }) => {
            let short = |row: usize| won(row) < backward_k_min;
            assert!((0..ROWS).filter(|row| asked[row * K..(row + 1) * K].contains(&true)).all(short), "{told}");
        }
        Err(other) => panic!("{told}: {other}"),
    }
    ends
}

/// Row 0 wants experts 0 to 3, row 1 experts 4 to 7, and so on, in this order.
fn own_experts() -> GridScores {
    let score = |row: usize, expert: usize| {
        if expert / K == row { -((expert % K) as f32) } else { f32::NEG_INFINITY }
    };
    let scores = (0..ROWS).flat_map(|row| (0..EXPERTS).map(move |expert| score(row, expert))).collect();
    GridScores { rows: ROWS, dimensions: vec![(EXPERTS, scores)] }
}
