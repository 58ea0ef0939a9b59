//! Results as a table for people and as JSON for programs.

use serde::Serialize;

use crate::error::Error;

/// Rows of a name and what is said of it.
#[derive(Default)]
pub struct Table(Vec<(String, String)>);

impl Table {
    /// One more row.
    pub fn row(mut self, name: &str, value: impl Into<String>) -> Self {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    /// One more row where there is something to say.
    pub fn row_if(self, name: &str, value: Option<String>) -> Self {
        match value {
            Some(value) => self.row(name, value),
            None => self,
        }
    }

    /// The table, names flush left.
    pub fn text(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let line = |(name, value): &(String, String)| format!("{name:width$}  {value}");
        self.0.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// Prints one or the other.
pub fn print(json: bool, report: &impl Serialize, table: impl FnOnce() -> String) {
    let text = if json { serde_json::to_string_pretty(report).expect("numbers, texts and lists") } else { table() };
    println!("{text}");
}

/// Seconds above zero from an option.
pub fn seconds(option: &str, value: f64) -> Result<std::time::Duration, Error> {
    let wait = std::time::Duration::try_from_secs_f64(value).ok().filter(|wait| !wait.is_zero());
    wait.ok_or_else(|| Error::Invalid(format!("{option} {value}: give a number of seconds above 0")))
}

/// A number with three significant digits, as in 28 100 or 0.153.
pub fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let digits = (2 - value.abs().log10().floor() as i32).clamp(0, 9);
    let scale = 10f64.powi((value.abs().log10().floor() as i32 - 2).max(0));
    let text = format!("{:.*}", usize::try_from(digits).unwrap_or(0), (value / scale).round_if(scale > 1.0) * scale);
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), ""), |(whole, rest)| (whole, rest));
    let grouped = group(whole);
    if rest.is_empty() { grouped } else { format!("{grouped}.{rest}") }
}

trait RoundIf {
    fn round_if(self, condition: bool) -> Self;
}

impl RoundIf for f64 {
    fn round_if(self, condition: bool) -> Self {
        if condition { self.round() } else { self }
    }
}

/// Thousands apart, from five digits on.
fn group(digits: &str) -> String {
    if digits.len() < 5 {
        return digits.to_owned();
    }
    let first = digits.len() % 3;
    let mut groups: Vec<&str> = Vec::new();
    if first > 0 {
        groups.push(&digits[..first]);
    }
    groups.extend((first..digits.len()).step_by(3).map(|at| &digits[at..at + 3]));
    groups.join(" ")
}

/// Bytes in binary units.
pub fn bytes(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v >= (1u64 << 30) as f64 => format!("{} GiB", number(v / (1u64 << 30) as f64)),
        v if v >= (1u64 << 20) as f64 => format!("{} MiB", number(v / (1u64 << 20) as f64)),
        v if v >= 1024.0 => format!("{} KiB", number(v / 1024.0)),
        v => format!("{v} B"),
    }
}

/// Microseconds in the unit that suits them.
pub fn microseconds(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{} s", number(v / 1e6)),
        v if v >= 1e3 => format!("{} ms", number(v / 1e3)),
        v => format!("{} µs", number(v)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_that_count() {
        let shown = [0.01534, 0.5, 4.5, 145.2, 1453.0, 28_149.0, 2_000_000.0].map(number);
        assert_eq!(shown, ["0.0153", "0.500", "4.50", "145", "1450", "28 100", "2 000 000"]);
        assert_eq!((number(0.0), number(f64::NAN)), ("0".to_owned(), "NaN".to_owned()));
        assert_eq!((bytes(1536), microseconds(4500.0)), ("1.50 KiB".to_owned(), "4.50 ms".to_owned()));
    }

    #[test]
    fn names_of_a_table_are_flush_left() {
        let table = Table::default().row("a", "1").row("long", "2").row_if("none", None);
        assert_eq!(table.text(), "a     1\nlong  2");
    }
}
