//! Errors of the configuration, shown with file, line, caret and the nearest key.

use std::path::Path;

use figment::{Figment, error::Kind};
use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceSpan};

use super::{
    load,
    place::{self, Part},
    validate::Bad,
};

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
        let (what, part, help) = match &error.kind {
            Kind::UnknownField(field, expected) => {
                if path.last() != Some(field) {
                    path.push(field.clone());
                }
                let near = nearest(field, expected).map(|near| format!("did you mean `{near}`?"));
                let all = format!("the keys here are: {}", expected.join(", "));
                ("unknown key".to_owned(), Part::Key, near.unwrap_or(all))
            }
            kind => (kind.to_string(), Part::Value, "config/skep.toml shows every key with its default".to_owned()),
        };
        let path = path.join(".");
        let origin = error.metadata.as_ref().map(|metadata| load::name(metadata, &path));
        Self::at(&path, &what, help, part, origin, file)
    }

    /// A value that is well-formed and makes no sense.
    pub(super) fn meaning(bad: &Bad, layers: &Figment, file: Option<(&Path, &str)>) -> Self {
        let origin = load::nearest_origin(layers, &bad.path);
        Self::at(&bad.path, &bad.problem, bad.remedy.clone(), Part::Value, origin, file)
    }

    fn at(
        path: &str,
        what: &str,
        help: String,
        part: Part,
        origin: Option<String>,
        file: Option<(&Path, &str)>,
    ) -> Self {
        let from = origin.as_ref().map_or_else(String::new, |origin| format!(" (from {origin})"));
        let file = file.filter(|(file, _)| origin.is_none_or(|origin| origin == file.display().to_string()));
        let label = file.and_then(|(_, text)| place::locate(text, path, part));
        Self {
            message: format!("{path}: {what}{from}"),
            help: Some(help),
            source_code: file.map(|(path, text)| source(path, text)),
            label: label.map(|(span, label)| (span.into(), label.to_owned())),
        }
    }
}

fn source(path: &Path, text: &str) -> Box<NamedSource<String>> {
    Box::new(NamedSource::new(path.display().to_string(), text.to_owned()))
}

/// The expected key nearest to a mistyped one, if any is near.
fn nearest<'a>(key: &str, expected: &[&'a str]) -> Option<&'a str> {
    let distance = |candidate: &&&str| strsim::damerau_levenshtein(key, candidate);
    let best = expected.iter().min_by_key(distance)?;
    (distance(&best) <= 1 + key.len() / 3).then_some(*best)
}
