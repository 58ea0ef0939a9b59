//! Searches against those of Python hivemind 1.1.12, and what is mended.

use libp2p_identity::Keypair;
use serde_json::Value;

use super::*;

/// Everything declared, as the DHT would answer it.
struct World {
    peer: PeerId,
    declared: BTreeMap<ExpertUid, PeerId>,
    lookups: usize,
}

impl World {
    fn new<'a>(uids: impl IntoIterator<Item = &'a str>) -> Self {
        let peer = peer(1);
        let declared = uids.into_iter().map(|uid| (uid.parse().unwrap(), peer)).collect();
        Self { peer, declared, lookups: 0 }
    }

    /// Who is under a prefix; the exemplar of a coordinate is the expert declared last.
    fn successors(&self, prefix: &ExpertPrefix) -> Successors {
        let mut found = Successors::new();
        for (uid, peer) in &self.declared {
            let is_flat = uid.dimensions() == 1 && prefix.as_str() == format!("{uid}.");
            let coordinates = uid.coordinates().unwrap();
            if is_flat {
                found.insert(coordinates[0], (uid.clone(), *peer));
            } else if prefix.dimensions() > 0 && uid.as_str().starts_with(prefix.as_str()) {
                found.insert(coordinates[prefix.dimensions()], (uid.clone(), *peer));
            }
        }
        found
    }

    fn run(&mut self, mut search: BeamSearch) -> Vec<Vec<Candidate>> {
        loop {
            let wanted = search.wanted();
            if wanted.is_empty() {
                return search.finish();
            }
            self.lookups += 1;
            for prefix in wanted {
                search.learn(&prefix, &self.successors(&prefix));
            }
        }
    }
}

fn peer(seed: u8) -> PeerId {
    Keypair::ed25519_from_bytes([seed; 32]).unwrap().public().to_peer_id()
}

fn grid(prefix: &str, sizes: &[usize], k_best: usize) -> Grid {
    Grid { prefix: prefix.parse().unwrap(), sizes: sizes.to_vec(), k_best }
}

fn search(grid: Grid, rows: &[Vec<Vec<f32>>], excluded: &[PeerId]) -> BeamSearch {
    let dimensions = grid.sizes.iter().enumerate();
    let dimensions = dimensions.map(|(d, &size)| (size, rows.iter().flat_map(|row| row[d].clone()).collect()));
    let scores = GridScores { rows: rows.len(), dimensions: dimensions.collect() };
    scores.check(&grid.sizes).unwrap();
    let indices: Vec<usize> = (0..rows.len()).collect();
    BeamSearch::new(grid, Arc::new(scores), &indices, excluded.iter().copied().collect())
}

fn uids(candidates: &[Candidate]) -> Vec<&str> {
    candidates.iter().map(|candidate| candidate.uid.as_str()).collect()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

fn matrix(value: &Value) -> Vec<Vec<f32>> {
    let rows = value.as_array().unwrap().iter();
    rows.map(|row| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()).collect()
}

#[test]
fn every_recorded_search_finds_what_hivemind_found() {
    let worlds: Value = serde_json::from_str(include_str!("../../tests/vectors/beam_search.json")).unwrap();
    let mut searches = 0;
    for recorded in worlds.as_array().unwrap() {
        let mut world = World::new(strings(&recorded["declared"]));
        let sizes: Vec<usize> = serde_json::from_value(recorded["grid_size"].clone()).unwrap();
        let prefix = recorded["prefix"].as_str().unwrap();
        for one in recorded["searches"].as_array().unwrap() {
            let k = one["beam_size"].as_u64().unwrap() as usize;
            let found = world.run(search(grid(prefix, &sizes, k), &[matrix(&one["scores"])], &[]));
            assert_eq!(uids(&found[0]), strings(&one["chosen_best_first"]), "{prefix} {sizes:?} k {k}");
            searches += 1;
        }
        // All rows of one beam size at once find the same.
        let all = recorded["searches"].as_array().unwrap().iter().filter(|one| one["beam_size"] == 3);
        let (rows, expected): (Vec<_>, Vec<_>) =
            all.map(|one| (matrix(&one["scores"]), strings(&one["chosen_best_first"]))).unzip();
        let found = world.run(search(grid(prefix, &sizes, 3), &rows, &[]));
        assert_eq!(found.iter().map(|row| uids(row)).collect::<Vec<_>>(), expected);
    }
    assert_eq!(searches, 96);
}

#[test]
fn a_batch_looks_up_once_per_dimension_when_the_grid_is_full() {
    let all: Vec<String> =
        (0..4).flat_map(|i| (0..4).flat_map(move |j| (0..4).map(move |k| format!("m.{i}.{j}.{k}")))).collect();
    let mut world = World::new(all.iter().map(String::as_str));
    let rows: Vec<Vec<Vec<f32>>> = (0..64)
        .map(|row| (0..3).map(|d| (0..4).map(|i| ((row * 7 + d * 3 + i * 5) % 11) as f32).collect()).collect())
        .collect();
    let found = world.run(search(grid("m.", &[4, 4, 4], 2), &rows, &[]));
    assert_eq!(world.lookups, 2, "the last dimension needs none");
    assert!(found.iter().all(|row| row.len() == 2));
}

#[test]
fn a_sparse_grid_takes_few_rounds() {
    let mut world = World::new(["m.0.0"]);
    let scores = vec![(0..256).map(|i| i as f32).collect(), vec![0.0]];
    let found = world.run(search(grid("m.", &[256, 1], 1), &[scores], &[]));
    assert_eq!(uids(&found[0]), ["m.0.0"]);
    assert!(world.lookups <= 9, "{} rounds", world.lookups);
}

#[test]
fn missing_prefixes_of_a_deep_grid_end_their_branch_only() {
    let mut world = World::new(["m.0.0.0", "m.2.1.1"]);
    // The exemplar of m.0. is gone by the time its own prefix is read.
    let mut search = search(grid("m.", &[3, 2, 2], 2), &[vec![vec![3., 2., 1.], vec![1., 0.], vec![1., 0.]]], &[]);
    let mut rounds = 0;
    let found = loop {
        let wanted = search.wanted();
        if wanted.is_empty() {
            break search.finish();
        }
        rounds += 1;
        for prefix in wanted {
            let gone = rounds > 1 && prefix.as_str().starts_with("m.0.");
            let successors = if gone { Successors::new() } else { world.successors(&prefix) };
            search.learn(&prefix, &successors);
        }
    };
    world.lookups = rounds;
    assert_eq!(uids(&found[0]), ["m.0.0.0", "m.2.1.1"], "the exemplar still proves its expert");
}

#[test]
fn an_empty_grid_finds_nobody_and_raises_nothing() {
    for sizes in [vec![3], vec![3, 3], vec![3, 3, 3]] {
        let row = sizes.iter().map(|&size| vec![0.0; size]).collect();
        let found = World::new([]).run(search(grid("m.", &sizes, 2), &[row], &[]));
        assert_eq!(found, [vec![]]);
    }
}

#[test]
fn experts_at_excluded_peers_are_left_out_and_others_take_their_place() {
    let mut world = World::new(["m.0.0", "m.1.0", "m.2.0"]);
    let bad = peer(9);
    world.declared.insert("m.0.0".parse().unwrap(), bad);
    let row = vec![vec![3., 2., 1.], vec![0.]];
    let found = world.run(search(grid("m.", &[3, 1], 2), std::slice::from_ref(&row), &[bad]));
    assert_eq!(uids(&found[0]), ["m.1.0", "m.2.0"]);
    assert_eq!(world.run(search(grid("m.", &[3, 1], 2), &[row], &[bad, world.peer])), [vec![]]);
}

#[test]
fn coordinates_that_are_ruled_out_are_never_chosen() {
    let mut world = World::new(["m.0.0", "m.0.1", "m.1.1"]);
    let row = vec![vec![0., f32::NEG_INFINITY], vec![f32::NEG_INFINITY, 0.]];
    let found = world.run(search(grid("m.", &[2, 2], 4), &[row], &[]));
    assert_eq!(uids(&found[0]), ["m.0.1"]);
}

#[test]
fn records_that_name_an_expert_elsewhere_are_ignored() {
    let mut search = search(grid("m.", &[2, 2], 2), &[vec![vec![1., 0.], vec![0., 0.]]], &[]);
    for prefix in search.wanted() {
        let liar = ("m.1.1".parse().unwrap(), peer(1));
        search.learn(&prefix, &Successors::from([(0, liar)]));
    }
    assert!(search.wanted().is_empty());
    assert_eq!(search.finish(), [vec![]]);
}
