//! Expert uids and prefixes (docs/wire.md §7.1).

use std::{fmt, str::FromStr};

/// Why a text is no uid or prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UidError {
    /// Not `name.0.1…`.
    #[error("{0:?} is no expert uid; expected a name and one or more coordinates, as in \"expert.3\" or \"ffn.0.12\"")]
    Uid(String),
    /// Not `name.` or `name.0.`.
    #[error("{0:?} is no expert prefix; expected a name, coordinates and a final dot, as in \"expert.\" or \"ffn.0.\"")]
    Prefix(String),
}

/// An expert's name in the grid: a name without dots and one or more decimal coordinates, as in `ffn.0.12`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertUid(String);

/// The beginning of expert uids, ending in a dot: `ffn.` or `ffn.0.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertPrefix(String);

fn is_coordinate(part: &str) -> bool {
    part == "0" || (!part.is_empty() && !part.starts_with('0') && part.bytes().all(|b| b.is_ascii_digit()))
}

fn is_name(part: &str) -> bool {
    !part.is_empty()
}

impl ExpertUid {
    /// The text as on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The coordinates after the name; `None` where one does not fit 64 bits.
    pub fn coordinates(&self) -> Option<Vec<u64>> {
        self.0.split('.').skip(1).map(|c| c.parse().ok()).collect()
    }

    /// Number of coordinates.
    pub fn dimensions(&self) -> usize {
        self.0.matches('.').count()
    }

    /// Name with the trailing dot: `ffn.` of `ffn.0.12`.
    pub fn root_prefix(&self) -> ExpertPrefix {
        let end = self.0.find('.').expect("a uid has a dot") + 1;
        ExpertPrefix(self.0[..end].to_owned())
    }

    /// The uid cut before its last coordinate, and that coordinate: `ffn.0.` and 12 of `ffn.0.12`.
    pub fn split_last(&self) -> (ExpertPrefix, &str) {
        let dot = self.0.rfind('.').expect("a uid has a dot") + 1;
        (ExpertPrefix(self.0[..dot].to_owned()), &self.0[dot..])
    }
}

impl ExpertPrefix {
    /// The text as on the wire, with its final dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The uid one coordinate further.
    pub fn uid(&self, coordinate: u64) -> ExpertUid {
        ExpertUid(format!("{}{coordinate}", self.0))
    }

    /// The prefix one coordinate further.
    pub fn child(&self, coordinate: u64) -> ExpertPrefix {
        ExpertPrefix(format!("{}{coordinate}.", self.0))
    }

    /// Number of coordinates in the prefix: 0 for `ffn.`.
    pub fn dimensions(&self) -> usize {
        self.0.matches('.').count() - 1
    }

    /// The prefix without its last coordinate; `None` for a bare name.
    pub fn parent(&self) -> Option<(ExpertPrefix, &str)> {
        let body = &self.0[..self.0.len() - 1];
        let dot = body.rfind('.')? + 1;
        Some((ExpertPrefix(body[..dot].to_owned()), &body[dot..]))
    }
}

impl FromStr for ExpertUid {
    type Err = UidError;
    fn from_str(s: &str) -> Result<Self, UidError> {
        let mut parts = s.split('.');
        let name = parts.next().is_some_and(is_name);
        let mut coordinates = parts.peekable();
        if name && coordinates.peek().is_some() && coordinates.all(is_coordinate) {
            return Ok(Self(s.to_owned()));
        }
        Err(UidError::Uid(s.to_owned()))
    }
}

impl FromStr for ExpertPrefix {
    type Err = UidError;
    fn from_str(s: &str) -> Result<Self, UidError> {
        let bad = || UidError::Prefix(s.to_owned());
        let mut parts = s.strip_suffix('.').ok_or_else(bad)?.split('.');
        if parts.next().is_some_and(is_name) && parts.all(is_coordinate) {
            return Ok(Self(s.to_owned()));
        }
        Err(bad())
    }
}

impl fmt::Display for ExpertUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ExpertPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_a_name_and_coordinates_without_leading_zeros() {
        for good in ["expert.0", "ffn.0.12", "a b.7", "x.10.0.3"] {
            assert_eq!(good.parse::<ExpertUid>().unwrap().as_str(), good);
        }
        for bad in ["", "expert", "expert.", ".0", "expert.01", "expert.-1", "expert.1.", "e..1", "e.1x"] {
            assert!(bad.parse::<ExpertUid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_end_with_a_dot() {
        for good in ["expert.", "ffn.0.", "x.10.0."] {
            assert!(good.parse::<ExpertPrefix>().is_ok(), "{good}");
        }
        for bad in ["", ".", "expert", "expert.0", "e.01.", "e..", "e.x."] {
            assert!(bad.parse::<ExpertPrefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn uids_and_prefixes_take_each_other_apart() {
        let uid: ExpertUid = "ffn.3.12".parse().unwrap();
        assert_eq!(uid.coordinates(), Some(vec![3, 12]));
        assert_eq!(uid.split_last().0.as_str(), "ffn.3.");
        assert_eq!(uid.root_prefix().child(3).uid(12), uid);
        assert_eq!(uid.split_last().0.parent().unwrap().0, uid.root_prefix());
    }
}
