//! Errors of the configuration, shown with file, line, caret and the nearest key.

use std::path::Path;

use figment::{Figment, error::Kind};
use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceSpan};

use super::validate::Bad;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    message: String,
    help: Option<String>,
    source_code: Option<Box<NamedSource<String>>>,
    label: Option<(SourceSpan, String)>,
}

impl Diagnostic for ConfigError {
    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn std::fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source_code.as_deref().map(|code| code as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let (span, text) = self.label.as_ref()?;
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(Some(text.clone()), *span))))
    }
}

impl ConfigError {
    /// An error without a place in a file.
    pub fn plain(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: Some(help.into()), source_code: None, label: None }
    }

    pub(super) fn read(path: &Path, source: &std::io::Error) -> Self {
        Self::plain(
            format!("cannot read the configuration {}: {source}", path.display()),
            "give the path of a readable TOML file with --config, or leave --config out to use the defaults",
        )
    }

    pub(super) fn syntax(path: &Path, text: &str, error: &toml_edit::TomlError) -> Self {
        let label = error.span().map(|span| (span.into(), error.message().to_owned()));
        Self {
            message: format!("{} is not valid TOML: {}", path.display(), error.message()),
            help: Some("config/skep.toml shows every key in its place".to_owned()),
            source_code: Some(source(path, text)),
            label,
        }
    }

    /// What serde made of a value or key.
    pub(super) fn value(error: &figment::Error, file: Option<(&Path, &str)>) -> Self {
        let mut path = error.path.clone();
        let (what, label, help) = match &error.kind {
            Kind::UnknownField(field, expected) => {
                if path.last() != Some(field) {
                    path.push(field.clone());
                }
                let near = nearest(field, expected).map(|near| format!("did you mean `{near}`?"));
                let all = format!("the keys here are: {}", expected.join(", "));
                ("unknown key".to_owned(), "unknown key".to_owned(), near.unwrap_or(all))
            }
            kind => {
                let help = "config/skep.toml shows every key with its default".to_owned();
                (kind.to_string(), "this value".to_owned(), help)
            }
        };
        let from = error.metadata.as_ref().map_or_else(String::new, |m| format!(" (from {})", m.name));
        let place = from_file(error.metadata.as_ref().map(|m| m.name.as_ref()), file);
        Self::at(format!("{}: {what}{from}", path.join(".")), help, &path, label, place)
    }

    /// A value that is well-formed and makes no sense.
    pub(super) fn meaning(bad: &Bad, layers: &Figment, file: Option<(&Path, &str)>) -> Self {
        let path: Vec<String> = bad.path.split('.').map(str::to_owned).collect();
        let metadata = layers.find_metadata(&bad.path);
        let from = metadata.map_or_else(String::new, |m| format!(" (from {})", m.name));
        let place = from_file(metadata.map(|m| m.name.as_ref()), file);
        let message = format!("{}: {}{from}", bad.path, bad.problem);
        Self::at(message, bad.remedy.clone(), &path, "this value".to_owned(), place)
    }

    fn at(message: String, help: String, path: &[String], label: String, file: Option<(&Path, &str)>) -> Self {
        let span = file.and_then(|(_, text)| locate(text, path));
        Self {
            message,
            help: Some(help),
            source_code: file.map(|(path, text)| source(path, text)),
            label: span.map(|span| (span.into(), label)),
        }
    }
}

fn source(path: &Path, text: &str) -> Box<NamedSource<String>> {
    Box::new(NamedSource::new(path.display().to_string(), text.to_owned()))
}

fn from_file<'a>(origin: Option<&str>, file: Option<(&'a Path, &'a str)>) -> Option<(&'a Path, &'a str)> {
    file.filter(|(path, _)| origin.is_none_or(|origin| origin == path.display().to_string()))
}

/// The span of the value (or, for a key whose value has none, of the key) at a path.
fn locate(text: &str, path: &[String]) -> Option<std::ops::Range<usize>> {
    let document = toml_edit::ImDocument::parse(text).ok()?;
    let mut item = document.as_item();
    let mut best = None;
    for part in path {
        let next = match item {
            toml_edit::Item::ArrayOfTables(tables) => {
                let table = tables.get(part.parse().ok()?)?;
                best = table.span().or(best);
                // A table of an array is no item of its own: look its key up in the next round.
                return locate_in(table, &path[path.iter().position(|p| p == part)? + 1..]).or(best);
            }
            other => other.get(part.as_str())?,
        };
        best = key_span(item, part).or_else(|| next.span()).or(best);
        item = next;
    }
    item.span().filter(|_| item.is_value()).or(best)
}

fn locate_in(table: &toml_edit::Table, path: &[String]) -> Option<std::ops::Range<usize>> {
    let (key, item) = table.get_key_value(path.first()?)?;
    item.span().filter(|_| item.is_value()).or_else(|| key.span())
}

fn key_span(parent: &toml_edit::Item, key: &str) -> Option<std::ops::Range<usize>> {
    parent.as_table_like()?.get_key_value(key)?.0.span()
}

/// The expected key nearest to a mistyped one, if any is near.
fn nearest<'a>(key: &str, expected: &[&'a str]) -> Option<&'a str> {
    let distance = |candidate: &&&str| strsim::damerau_levenshtein(key, candidate);
    let best = expected.iter().min_by_key(distance)?;
    (distance(&best) <= 1 + key.len() / 3).then_some(*best)
}
