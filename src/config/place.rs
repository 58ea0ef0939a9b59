//! Where in a TOML file the thing at a dotted path stands.

use std::ops::Range;

use toml_edit::{Array, ArrayOfTables, ImDocument, Item, TableLike, Value};

/// What of a path's last part is pointed at.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Part {
    /// The key, as when nobody knows it.
    Key,
    /// The value.
    Value,
}

/// The span of what stands at a path such as `experts.1.hidden_dim`, with a word about it. Where the path ends earlier
/// in the file, it is the section or list that lacks the rest; nothing where not even its beginning is there.
pub(super) fn locate(text: &str, path: &str, part: Part) -> Option<(Range<usize>, &'static str)> {
    let document = ImDocument::parse(text).ok()?;
    let mut place = Place::of_item(document.as_item());
    let mut found = None;
    for name in path.split('.') {
        let Some(step) = place.step(name) else {
            return Some((found.and_then(|step: Step| step.key.or(step.value))?, "missing here"));
        };
        place = step.place;
        found = Some(Step { place: Place::Leaf, ..step });
    }
    let step = found?;
    match part {
        Part::Key => Some((step.key.or(step.value)?, "unknown key")),
        Part::Value => Some((step.value.or(step.key)?, "this value")),
    }
}

/// What may have parts.
enum Place<'a> {
    Table(&'a dyn TableLike),
    Tables(&'a ArrayOfTables),
    Array(&'a Array),
    Leaf,
}

/// One part of a path.
struct Step<'a> {
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    place: Place<'a>,
}

impl<'a> Place<'a> {
    fn of_item(item: &'a Item) -> Self {
        match item {
            Item::Table(table) => Place::Table(table),
            Item::ArrayOfTables(tables) => Place::Tables(tables),
            Item::Value(value) => Place::of_value(value),
            Item::None => Place::Leaf,
        }
    }

    fn of_value(value: &'a Value) -> Self {
        match value {
            Value::InlineTable(table) => Place::Table(table),
            Value::Array(array) => Place::Array(array),
            _ => Place::Leaf,
        }
    }

    fn step(&self, name: &str) -> Option<Step<'a>> {
        match *self {
            Place::Table(table) => {
                let (key, item) = table.get_key_value(name)?;
                // A section is shown by its name, not by all it holds.
                let value = if item.is_value() { item.span() } else { None };
                Some(Step { key: key.span(), value, place: Place::of_item(item) })
            }
            Place::Tables(tables) => {
                let table = tables.get(name.parse().ok()?)?;
                Some(Step { key: None, value: table.span(), place: Place::Table(table) })
            }
            Place::Array(array) => {
                let value = array.get(name.parse().ok()?)?;
                Some(Step { key: None, value: value.span(), place: Place::of_value(value) })
            }
            Place::Leaf => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
[node]
host_maddrs = ["first", "second"]

[[experts]]
optimizer = "sgd"

[[experts]]
optimizer = "adam"
"#;

    fn shown(text: &'static str, path: &str, part: Part) -> Option<&'static str> {
        locate(text, path, part).map(|(span, _)| &text[span])
    }

    #[test]
    fn values_keys_and_elements_are_found() {
        assert_eq!(shown(TEXT, "node", Part::Value), Some("node"));
        assert_eq!(shown(TEXT, "node.host_maddrs", Part::Key), Some("host_maddrs"));
        assert_eq!(shown(TEXT, "node.host_maddrs", Part::Value), Some(r#"["first", "second"]"#));
        assert_eq!(shown(TEXT, "node.host_maddrs.1", Part::Value), Some(r#""second""#));
    }

    #[test]
    fn each_table_of_an_array_has_its_own_place() {
        assert_eq!(shown(TEXT, "experts.0.optimizer", Part::Value), Some(r#""sgd""#));
        assert_eq!(shown(TEXT, "experts.1.optimizer", Part::Value), Some(r#""adam""#));
        let inline = r#"experts = [{ optimizer = "sgd" }, { optimizer = "adam" }]"#;
        assert_eq!(shown(inline, "experts.1.optimizer", Part::Value), Some(r#""adam""#));
    }

    #[test]
    fn what_lacks_a_key_is_shown_in_its_stead() {
        let (span, word) = locate(TEXT, "experts.1.expert_pattern", Part::Value).expect("the group is there");
        assert_eq!((&TEXT[span], word), ("[[experts]]\noptimizer = \"adam\"", "missing here"));
        assert_eq!(locate(TEXT, "server.max_wait", Part::Value), None);
        assert_eq!(locate("[node", "node", Part::Value), None);
    }
}
