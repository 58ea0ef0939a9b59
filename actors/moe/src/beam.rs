//! [`BeamSearch`]: the k best experts of every row of a batch, without I/O: it says which prefixes it needs to know and is
//! told their successors (docs/wire.md §7.3).
//!
//! Rows search independently, as in hivemind, but look up together: one round asks for what any row needs next. Unlike
//! hivemind's, a prefix without successors ends that branch and nothing else.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use libp2p_identity::PeerId;
use skep_dht::Successors;
use skep_wire::{ExpertPrefix, ExpertUid};

use crate::GridScores;

/// An expert that a search found for a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate<U = ExpertUid, C = Vec<usize>> {
    pub uid: U,
    pub peer: PeerId,
    pub coordinates: C,
    pub score: f64,
}

/// What is searched: the grid and how many experts a row wants.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    pub prefix: ExpertPrefix,
    pub sizes: Vec<usize>,
    pub k_best: usize,
}

/// An entry under a prefix: it leads to deeper prefixes through `coordinate`, and proves the expert `uid`.
#[derive(Debug)]
struct Branch {
    coordinate: usize,
    uid: ExpertUid,
    peer: PeerId,
    /// Of the expert; `None` where it is not in the grid.
    place: Option<Vec<usize>>,
}

/// A prefix on a row's beam.
#[derive(Clone, Debug)]
struct Entry {
    prefix: ExpertPrefix,
    score: f64,
}

struct Row {
    /// Row of the scores.
    index: usize,
    /// Coordinates of dimension 0, best first, and how many of them have been seen to.
    order: Vec<usize>,
    seen: usize,
    /// Dimension whose coordinate the beam's prefixes end in.
    depth: usize,
    beam: Vec<Entry>,
    found: Vec<Candidate>,
    done: bool,
}

/// A search for several rows of a batch.
pub(crate) struct BeamSearch {
    grid: Grid,
    scores: Arc<GridScores>,
    excluded: BTreeSet<PeerId>,
    known: BTreeMap<ExpertPrefix, Vec<Branch>>,
    rows: Vec<Row>,
    /// Doubles per round, so a sparse grid takes few rounds.
    stride: usize,
}

impl BeamSearch {
    /// A search for `rows` of checked `scores`, leaving out experts at `excluded` peers.
    pub fn new(grid: Grid, scores: Arc<GridScores>, rows: &[usize], excluded: BTreeSet<PeerId>) -> Self {
        let start = |&index: &usize| {
            let mut order: Vec<usize> =
                (0..grid.sizes[0]).filter(|&i| scores.at(index, 0, i) > f64::NEG_INFINITY).collect();
            order.sort_by(|&a, &b| scores.at(index, 0, b).total_cmp(&scores.at(index, 0, a)).then(b.cmp(&a)));
            Row { index, order, seen: 0, depth: 0, beam: Vec::new(), found: Vec::new(), done: false }
        };
        let rows = rows.iter().map(start).collect();
        Self { grid, scores, excluded, known: BTreeMap::new(), rows, stride: 1 }
    }

    /// Prefixes whose successors are needed to go on; none when the search is over.
    pub fn wanted(&mut self) -> Vec<ExpertPrefix> {
        let mut wanted = BTreeSet::new();
        let mut rows = std::mem::take(&mut self.rows);
        for row in &mut rows {
            self.advance(row, &mut wanted);
        }
        self.rows = rows;
        self.stride = self.stride.saturating_mul(2);
        wanted.into_iter().collect()
    }

    /// Takes in what is under a prefix.
    pub fn learn(&mut self, prefix: &ExpertPrefix, successors: &Successors) {
        let branches = successors.iter().filter_map(|(&coordinate, (uid, peer))| {
            let coordinate = usize::try_from(coordinate).ok()?;
            let ours = self.is_flat(prefix, uid) || is_under(prefix, coordinate, uid);
            ours.then(|| Branch { coordinate, uid: uid.clone(), peer: *peer, place: self.place(uid) })
        });
        let branches = branches.collect();
        self.known.insert(prefix.clone(), branches);
    }

    /// Candidates of each row, best first, at most k.
    pub fn finish(self) -> Vec<Vec<Candidate>> {
        self.rows.into_iter().map(|row| row.found).collect()
    }

    /// Goes on with a row until it is done or needs a prefix that is not known.
    fn advance(&self, row: &mut Row, wanted: &mut BTreeSet<ExpertPrefix>) {
        if row.depth == 0 && !row.done {
            if !self.fill_initial_beam(row, wanted) {
                return;
            }
            self.descend(row);
        }
        while !row.done {
            let unknown = row.beam.iter().map(|entry| &entry.prefix).filter(|prefix| !self.known.contains_key(*prefix));
            let unknown: Vec<ExpertPrefix> = unknown.cloned().collect();
            if !unknown.is_empty() {
                wanted.extend(unknown);
                return;
            }
            row.beam.retain(|entry| !self.known[&entry.prefix].is_empty());
            self.descend(row);
        }
    }

    /// Whether the beam of dimension 0 is complete.
    fn fill_initial_beam(&self, row: &mut Row, wanted: &mut BTreeSet<ExpertPrefix>) -> bool {
        while row.beam.len() < self.grid.k_best && row.seen < row.order.len() {
            let coordinate = row.order[row.seen];
            let prefix = self.grid.prefix.child(coordinate as u64);
            let Some(branches) = self.known.get(&prefix) else {
                let ahead = (self.grid.k_best - row.beam.len()).saturating_mul(self.stride);
                let next = row.order[row.seen..].iter().take(ahead);
                let prefixes = next.map(|&coordinate| self.grid.prefix.child(coordinate as u64));
                wanted.extend(prefixes.filter(|prefix| !self.known.contains_key(prefix)));
                return false;
            };
            if branches.iter().any(|branch| self.leads_somewhere(branch, 0)) {
                row.beam.push(Entry { prefix, score: self.scores.at(row.index, 0, coordinate) });
            }
            row.seen += 1;
        }
        true
    }

    /// A branch of the last lookup is worth no more than the expert it proves.
    fn leads_somewhere(&self, branch: &Branch, depth: usize) -> bool {
        let is_last = depth + 2 >= self.grid.sizes.len();
        !is_last || (branch.place.is_some() && !self.excluded.contains(&branch.peer))
    }

    /// Collects the experts that the beam proves, then moves the beam one dimension on.
    fn descend(&self, row: &mut Row) {
        self.collect(row);
        let next = row.depth + 1;
        if next + 1 >= self.grid.sizes.len() || row.beam.is_empty() {
            row.done = true;
            return;
        }
        let mut beam = Vec::new();
        for entry in &row.beam {
            let inside = self.known[&entry.prefix].iter().filter(|branch| branch.coordinate < self.grid.sizes[next]);
            for branch in inside {
                let score = entry.score + self.scores.at(row.index, next, branch.coordinate);
                if score > f64::NEG_INFINITY {
                    beam.push(Entry { prefix: entry.prefix.child(branch.coordinate as u64), score });
                }
            }
        }
        beam.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| b.prefix.cmp(&a.prefix)));
        beam.truncate(self.grid.k_best);
        row.beam = beam;
        row.depth = next;
    }

    fn collect(&self, row: &mut Row) {
        let mut proofs = Vec::new();
        for branch in row.beam.iter().flat_map(|entry| &self.known[&entry.prefix]) {
            let Some(place) = branch.place.as_ref().filter(|_| !self.excluded.contains(&branch.peer)) else { continue };
            let score = self.scores.of(row.index, place);
            if score > f64::NEG_INFINITY {
                proofs.push(Candidate { uid: &branch.uid, peer: branch.peer, coordinates: place, score });
            }
        }
        proofs.sort_by(best_first);
        proofs.dedup_by(|a, b| a.uid == b.uid);
        proofs.truncate(self.grid.k_best);
        row.found.extend(proofs.into_iter().map(|proof| Candidate {
            uid: proof.uid.clone(),
            peer: proof.peer,
            coordinates: proof.coordinates.clone(),
            score: proof.score,
        }));
        row.found.sort_by(best_first);
        row.found.dedup_by(|a, b| a.uid == b.uid);
        row.found.truncate(self.grid.k_best);
    }

    /// The record of a one-dimensional expert lies under its own uid and a dot.
    fn is_flat(&self, prefix: &ExpertPrefix, uid: &ExpertUid) -> bool {
        self.grid.sizes.len() == 1 && prefix.as_str().strip_suffix('.') == Some(uid.as_str())
    }

    fn place(&self, uid: &ExpertUid) -> Option<Vec<usize>> {
        let coordinates = uid.coordinates().filter(|c| c.len() == self.grid.sizes.len())?;
        let inside = coordinates.iter().zip(&self.grid.sizes).map(|(&c, &size)| {
            let coordinate = usize::try_from(c).ok()?;
            (coordinate < size).then_some(coordinate)
        });
        inside.collect()
    }
}

/// Ties go to the larger uid, then to the larger peer id, as hivemind's heap of tuples has it.
fn best_first<U: Ord, C>(a: &Candidate<U, C>, b: &Candidate<U, C>) -> Ordering {
    b.score.total_cmp(&a.score).then_with(|| b.uid.cmp(&a.uid)).then_with(|| b.peer.cmp(&a.peer))
}

fn is_under(prefix: &ExpertPrefix, coordinate: usize, uid: &ExpertUid) -> bool {
    let rest = uid.as_str().strip_prefix(prefix.as_str());
    rest.and_then(|rest| rest.split('.').next()).and_then(|c| c.parse().ok()) == Some(coordinate)
}

#[cfg(test)]
mod tests;
