//! Which uids a server hosts: patterns over the grid and the choice of free places in them.

use std::{collections::BTreeSet, fmt, str::FromStr};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use skep_dht::{Dht, DhtError, Freshness};
use skep_kernel::Deadline;
use skep_wire::ExpertUid;

/// Patterns up to this many places are searched completely, larger ones by drawing at random.
const EXHAUSTIVE: u64 = 1 << 16;
/// Random draws for each expert wanted before a large pattern counts as full; hivemind gives up after 10.
const DRAWS_PER_EXPERT: usize = 100;
/// Candidates that are looked up in the DHT at once, at the most.
const LOOKUP_BATCH: usize = 256;

/// A part of the grid, as in `expert.[0:5]`, `ffn.[0:4].[0:16]` or `ffn.3.[0:5]`: after the name, fixed coordinates and
/// ranges `[from:to]` that exclude `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPattern {
    text: String,
    name: String,
    ranges: Vec<std::ops::Range<u64>>,
}

/// Why there are no uids to host.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// The text is no pattern.
    #[error(
        "expert pattern {pattern:?} has an invalid part {part:?}; expected a name followed by coordinates or ranges, as in \"ffn.[0:4].[0:16]\""
    )]
    Pattern {
        /// The pattern.
        pattern: String,
        /// The part that is wrong.
        part: String,
    },
    /// The pattern has fewer places than experts are wanted.
    #[error("expert pattern {pattern:?} has {places} places, {wanted} are wanted; widen it or host fewer experts")]
    TooSmall {
        /// The pattern.
        pattern: String,
        /// Places in it.
        places: u64,
        /// Experts wanted.
        wanted: usize,
    },
    /// Too many of its places are taken by other peers.
    #[error(
        "expert pattern {pattern:?} has only {free} free places for {wanted} experts, others are announced in the DHT; widen it or host fewer experts"
    )]
    Taken {
        /// The pattern.
        pattern: String,
        /// Free places found.
        free: usize,
        /// Experts wanted.
        wanted: usize,
    },
    /// More experts have checkpoints than are to be hosted.
    #[error(
        "{found} experts of {pattern:?} have checkpoints, {wanted} are wanted; host more, or move checkpoints away"
    )]
    TooManyKept {
        /// The pattern.
        pattern: String,
        /// Experts that have checkpoints.
        found: usize,
        /// Experts wanted.
        wanted: usize,
    },
    /// The DHT could not be asked.
    #[error("cannot look for free expert uids: {0}")]
    Dht(#[from] DhtError),
}

impl FromStr for ExpertPattern {
    type Err = PlacementError;

    fn from_str(text: &str) -> Result<Self, PlacementError> {
        let bad = |part: &str| PlacementError::Pattern { pattern: text.to_owned(), part: part.to_owned() };
        let (name, rest) = text.split_once('.').ok_or_else(|| bad(text))?;
        if name.is_empty() || name.contains(['[', ']']) {
            return Err(bad(name));
        }
        let ranges = rest.split('.').map(|part| range(part).ok_or_else(|| bad(part)));
        Ok(Self { text: text.to_owned(), name: name.to_owned(), ranges: ranges.collect::<Result<_, _>>()? })
    }
}

/// `3` or `[0:5]`; `None` for anything else and for empty ranges.
fn range(part: &str) -> Option<std::ops::Range<u64>> {
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if digits { text.parse().ok() } else { None }
    };
    let range = match part.strip_prefix('[') {
        Some(inner) => {
            let (from, to) = inner.strip_suffix(']')?.split_once(':')?;
            number(from)?..number(to)?
        }
        None => {
            let fixed = number(part).filter(|_| part == "0" || !part.starts_with('0'))?;
            fixed..fixed.checked_add(1)?
        }
    };
    (!range.is_empty()).then_some(range)
}

impl fmt::Display for ExpertPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl ExpertPattern {
    /// Number of places, at most `u64::MAX`.
    pub fn places(&self) -> u64 {
        self.ranges.iter().fold(1, |n: u64, range| n.saturating_mul(range.end - range.start))
    }

    /// Whether it names this uid.
    pub fn names(&self, uid: &ExpertUid) -> bool {
        self.index(uid).is_some()
    }

    /// The place of a uid; the inverse of [`place`](Self::place).
    fn index(&self, uid: &ExpertUid) -> Option<u64> {
        let (name, _) = uid.as_str().split_once('.')?;
        let coordinates = uid.coordinates()?;
        if name != self.name || coordinates.len() != self.ranges.len() {
            return None;
        }
        self.ranges.iter().zip(coordinates).try_fold(0u64, |index, (range, coordinate)| {
            let offset = range.contains(&coordinate).then(|| coordinate - range.start)?;
            index.checked_mul(range.end - range.start)?.checked_add(offset)
        })
    }

    /// The uid of a place, in the order of coordinates.
    fn place(&self, mut index: u64) -> ExpertUid {
        let mut coordinates = Vec::with_capacity(self.ranges.len());
        for range in self.ranges.iter().rev() {
            let size = range.end - range.start;
            coordinates.push(range.start + index % size);
            index /= size;
        }
        let coordinates: String = coordinates.iter().rev().map(|c| format!(".{c}")).collect();
        format!("{}{coordinates}", self.name).parse().expect("a name and decimal coordinates are a uid")
    }
}

/// Draws places of a pattern in a seeded order, each once. Pure: who hosts what is asked outside.
#[derive(Debug)]
struct Draw {
    pattern: ExpertPattern,
    wanted: usize,
    free: BTreeSet<u64>,
    source: Source,
}

/// In which order free places are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakePlaces {
    /// At random by this seed; all of them in order when they fit exactly.
    AtRandom(u64),
    /// The first ones.
    InOrder,
}

#[derive(Debug)]
enum Source {
    /// The next place that is not kept.
    InOrder {
        places: std::ops::Range<u64>,
        kept: BTreeSet<u64>,
    },
    /// Places left, drawn from the end.
    Shuffled(Vec<u64>),
    Random {
        random: Box<StdRng>,
        seen: BTreeSet<u64>,
        draws_left: usize,
    },
}

impl Draw {
    /// Draws so many places in all, `kept` among them without being asked about.
    fn new(
        pattern: ExpertPattern,
        kept: &[ExpertUid],
        wanted: usize,
        take: TakePlaces,
    ) -> Result<Self, PlacementError> {
        let places = pattern.places();
        if places < wanted as u64 {
            return Err(PlacementError::TooSmall { pattern: pattern.text, places, wanted });
        }
        let kept: BTreeSet<u64> = kept.iter().filter_map(|uid| pattern.index(uid)).collect();
        if kept.len() > wanted {
            return Err(PlacementError::TooManyKept { pattern: pattern.text, found: kept.len(), wanted });
        }
        let source = match take {
            TakePlaces::InOrder => Source::InOrder { places: 0..places, kept: kept.clone() },
            TakePlaces::AtRandom(seed) if places <= EXHAUSTIVE => {
                let mut order: Vec<u64> = (0..places).filter(|place| !kept.contains(place)).collect();
                order.shuffle(&mut StdRng::seed_from_u64(seed));
                Source::Shuffled(order)
            }
            TakePlaces::AtRandom(seed) => Source::Random {
                random: Box::new(StdRng::seed_from_u64(seed)),
                seen: kept.clone(),
                draws_left: (wanted - kept.len()).saturating_mul(DRAWS_PER_EXPERT),
            },
        };
        Ok(Self { pattern, wanted, free: kept, source })
    }

    /// Places to look at next; empty when enough are free, or when there are no more.
    fn candidates(&mut self) -> Vec<u64> {
        let missing = (self.wanted - self.free.len()).min(LOOKUP_BATCH);
        match &mut self.source {
            Source::InOrder { places, kept } => places.filter(|place| !kept.contains(place)).take(missing).collect(),
            Source::Shuffled(order) => order.split_off(order.len() - missing.min(order.len())),
            Source::Random { random, seen, draws_left } => {
                let (places, mut drawn) = (self.pattern.places(), Vec::new());
                while drawn.len() < missing && *draws_left > 0 {
                    *draws_left -= 1;
                    let place = random.random_range(0..places);
                    if seen.insert(place) {
                        drawn.push(place);
                    }
                }
                drawn
            }
        }
    }

    /// The chosen uids in the order of their coordinates.
    fn finish(self) -> Result<Vec<ExpertUid>, PlacementError> {
        if self.free.len() < self.wanted {
            let (free, wanted) = (self.free.len(), self.wanted);
            return Err(PlacementError::Taken { pattern: self.pattern.text, free, wanted });
        }
        Ok(self.free.iter().map(|place| self.pattern.place(*place)).collect())
    }
}

/// Chooses `wanted` places of a pattern that no other peer announces. Places announced by this very peer, before a
/// restart say, count as free. Those of `kept` that the pattern names are chosen first, whoever announces them: they are
/// experts that this server has checkpoints of.
///
/// Two servers that choose at the same time may take the same place; the DHT then shows the later announcement.
/// Dropping the future has no effect elsewhere.
pub async fn choose_uids(
    pattern: &ExpertPattern,
    kept: &[ExpertUid],
    wanted: usize,
    dht: Option<&Dht>,
    take: TakePlaces,
    deadline: Deadline,
) -> Result<Vec<ExpertUid>, PlacementError> {
    let mut draw = Draw::new(pattern.clone(), kept, wanted, take)?;
    loop {
        let candidates = draw.candidates();
        if candidates.is_empty() {
            return draw.finish();
        }
        let Some(dht) = dht else {
            draw.free.extend(candidates);
            continue;
        };
        let uids = candidates.iter().map(|place| pattern.place(*place)).collect();
        let hosts = dht.find_experts(uids, Freshness::Latest, deadline).await?;
        let ours = dht.local_peer();
        let free = candidates.into_iter().zip(hosts).filter(|(_, host)| host.as_ref().is_none_or(|h| h.value == ours));
        draw.free.extend(free.map(|(place, _)| place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> ExpertPattern {
        text.parse().unwrap()
    }

    fn choose(text: &str, wanted: usize, seed: u64, taken: &[&str]) -> Result<Vec<String>, PlacementError> {
        take(text, &[], wanted, TakePlaces::AtRandom(seed), taken)
    }

    fn take(
        text: &str,
        kept: &[&str],
        wanted: usize,
        order: TakePlaces,
        taken: &[&str],
    ) -> Result<Vec<String>, PlacementError> {
        let kept: Vec<ExpertUid> = kept.iter().map(|uid| uid.parse().unwrap()).collect();
        let mut draw = Draw::new(pattern(text), &kept, wanted, order)?;
        loop {
            let candidates = draw.candidates();
            if candidates.is_empty() {
                return Ok(draw.finish()?.iter().map(ToString::to_string).collect());
            }
            let is_free = |place: &u64| !taken.contains(&pattern(text).place(*place).as_str());
            draw.free.extend(candidates.into_iter().filter(is_free));
        }
    }

    #[test]
    fn an_exact_fit_takes_all_places_in_order() {
        assert_eq!(choose("expert.[0:3]", 3, 7, &[]).unwrap(), ["expert.0", "expert.1", "expert.2"]);
        assert_eq!(choose("ffn.[0:2].[8:10]", 4, 7, &[]).unwrap(), ["ffn.0.8", "ffn.0.9", "ffn.1.8", "ffn.1.9"]);
        assert_eq!(choose("ffn.3.[0:2]", 2, 7, &[]).unwrap(), ["ffn.3.0", "ffn.3.1"]);
    }

    #[test]
    fn the_choice_follows_the_seed_and_avoids_taken_places() {
        let chosen = choose("e.[0:20]", 5, 1, &["e.3", "e.4"]).unwrap();
        assert_eq!(chosen, choose("e.[0:20]", 5, 1, &["e.3", "e.4"]).unwrap());
        assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), 5);
        assert!(!chosen.iter().any(|uid| uid == "e.3" || uid == "e.4"));
        assert!((2..9).any(|seed| choose("e.[0:20]", 5, seed, &["e.3", "e.4"]).unwrap() != chosen));
    }

    #[test]
    fn places_in_order_are_the_first_free_ones() {
        let chosen = take("e.[0:1000000000000]", &[], 4, TakePlaces::InOrder, &["e.0", "e.2", "e.3"]).unwrap();
        assert_eq!(chosen, ["e.1", "e.4", "e.5", "e.6"]);
    }

    #[test]
    fn places_that_are_kept_come_first_also_when_others_announce_them() {
        for seed in 0..5 {
            let chosen =
                take("e.[0:100]", &["e.7", "e.50", "other.3", "e.0.7"], 3, TakePlaces::AtRandom(seed), &["e.7"])
                    .unwrap();
            assert_eq!(chosen.len(), 3);
            assert!(chosen.contains(&"e.7".to_owned()) && chosen.contains(&"e.50".to_owned()), "{chosen:?}");
        }
        assert_eq!(take("e.[0:2]", &["e.1"], 2, TakePlaces::AtRandom(0), &[]).unwrap(), ["e.0", "e.1"]);
        assert_eq!(take("e.[0:9]", &["e.1"], 1, TakePlaces::AtRandom(0), &["e.1"]).unwrap(), ["e.1"]);
        let huge = take("e.[0:1000000000].[0:9]", &["e.123456789.4"], 5, TakePlaces::AtRandom(0), &[]).unwrap();
        assert!(huge.len() == 5 && huge.contains(&"e.123456789.4".to_owned()));
        let error = take("e.[0:9]", &["e.1", "e.2"], 1, TakePlaces::AtRandom(0), &[]).unwrap_err();
        assert!(error.to_string().contains("2 experts of \"e.[0:9]\" have checkpoints, 1 are wanted"), "{error}");
    }

    #[test]
    fn a_pattern_names_its_places_and_no_others() {
        let wide = pattern("ffn.[2:5].3.[0:2]");
        for index in 0..wide.places() {
            assert_eq!(wide.index(&wide.place(index)), Some(index));
        }
        for other in [
            "ffn.1.3.0",
            "ffn.5.3.0",
            "ffn.2.4.0",
            "ffn.2.3",
            "ffn.2.3.0.0",
            "fn.2.3.0",
            "ffn.2.3.99999999999999999999",
        ] {
            assert!(!wide.names(&other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn the_last_free_places_of_a_small_pattern_are_found() {
        let taken: Vec<String> = (0..99).map(|i| format!("e.{i}")).collect();
        let taken: Vec<&str> = taken.iter().map(String::as_str).collect();
        assert_eq!(choose("e.[0:100]", 1, 3, &taken).unwrap(), ["e.99"]);
        assert!(matches!(choose("e.[0:100]", 2, 3, &taken), Err(PlacementError::Taken { free: 1, wanted: 2, .. })));
    }

    #[test]
    fn huge_patterns_are_drawn_from_without_listing_them() {
        let chosen = choose("e.[0:1000000000].[0:1000000000].[0:1000000000]", 300, 3, &[]).unwrap();
        assert_eq!(chosen.len(), 300);
        assert!(chosen.iter().all(|uid| uid.parse::<ExpertUid>().is_ok()));
    }

    #[test]
    fn a_pattern_without_room_says_so() {
        let error = choose("e.[0:3]", 4, 0, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "expert pattern \"e.[0:3]\" has 3 places, 4 are wanted; widen it or host fewer experts"
        );
    }

    #[test]
    fn malformed_patterns_name_the_wrong_part() {
        for (text, part) in [
            ("expert", "expert"),
            (".[0:3]", ""),
            ("e.[0:3", "[0:3"),
            ("e.[3:3]", "[3:3]"),
            ("e.0.[a:b]", "[a:b]"),
            ("e.03", "03"),
            ("e.", ""),
            ("e.[-1:4]", "[-1:4]"),
            ("[0:3].1", "[0:3]"),
        ] {
            match text.parse::<ExpertPattern>() {
                Err(PlacementError::Pattern { part: found, .. }) => assert_eq!(found, part, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
