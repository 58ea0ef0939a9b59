//! [`ExpertNames`]: ways to say which experts a test is about.

use skep_wire::ExpertUid;

/// Names of experts: a pattern as in `"ffn.[0:5].[0:4]"`, which stands for all its places in order, or a list of names.
///
/// ```
/// use skep_testkit::ExpertNames;
///
/// let names = "ffn.[0:2].7".uids();
/// assert_eq!(names, ["ffn.0.7", "ffn.1.7"].uids());
/// ```
pub trait ExpertNames {
    /// The uids, in order.
    ///
    /// # Panics
    /// When one is no uid.
    fn uids(self) -> Vec<ExpertUid>;
}

impl ExpertNames for &str {
    fn uids(self) -> Vec<ExpertUid> {
        let mut names = vec![String::new()];
        for (index, part) in self.split('.').enumerate() {
            let dot = if index == 0 { "" } else { "." };
            let values = places(part);
            let longer = names.iter().flat_map(|name| values.iter().map(move |value| format!("{name}{dot}{value}")));
            names = longer.collect();
        }
        names.uids()
    }
}

/// What a part of a pattern stands for.
fn places(part: &str) -> Vec<String> {
    let Some(range) = part.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else {
        return vec![part.to_owned()];
    };
    let bounds = range.split_once(':').and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
    let (from, to): (u64, u64) = bounds.unwrap_or_else(|| panic!("{part:?} is no range as in [0:4]"));
    (from..to).map(|value| value.to_string()).collect()
}

fn uid(name: &str) -> ExpertUid {
    name.parse().unwrap_or_else(|error| panic!("{name:?} names no expert: {error}"))
}

impl ExpertNames for &[&str] {
    fn uids(self) -> Vec<ExpertUid> {
        self.iter().map(|name| uid(name)).collect()
    }
}

impl<const N: usize> ExpertNames for [&str; N] {
    fn uids(self) -> Vec<ExpertUid> {
        self.as_slice().uids()
    }
}

impl ExpertNames for Vec<String> {
    fn uids(self) -> Vec<ExpertUid> {
        self.iter().map(|name| uid(name)).collect()
    }
}

impl ExpertNames for Vec<ExpertUid> {
    fn uids(self) -> Vec<ExpertUid> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: impl ExpertNames) -> Vec<String> {
        names.uids().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_pattern_stands_for_all_its_places() {
        assert_eq!(names("ffn.[0:2].7.[3:5]"), ["ffn.0.7.3", "ffn.0.7.4", "ffn.1.7.3", "ffn.1.7.4"]);
        assert_eq!(names("expert.3"), ["expert.3"]);
        assert_eq!(names(["a.1", "b.0"]), ["a.1", "b.0"]);
    }
}
