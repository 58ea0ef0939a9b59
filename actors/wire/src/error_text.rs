//! Errors as hivemind's callers read them: Python's exceptions as text (docs/wire.md §2.2, §3).

/// The Python exception that an error travels as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PythonError {
    /// Unknown uid.
    KeyError,
    /// Wrong shapes, dtypes, values.
    ValueError,
    /// Overload, deadline.
    TimeoutError,
    /// Anything that is the server's fault.
    RuntimeError,
}

impl PythonError {
    /// The class name.
    pub const fn name(self) -> &'static str {
        match self {
            PythonError::KeyError => "KeyError",
            PythonError::ValueError => "ValueError",
            PythonError::TimeoutError => "TimeoutError",
            PythonError::RuntimeError => "RuntimeError",
        }
    }
}

/// `repr(exception)`, the text of a unary error: `KeyError('nope.0')`.
pub fn repr(kind: PythonError, message: &str) -> String {
    format!("{}({})", kind.name(), quoted(message))
}

/// `str(exception)`, the text of a stream's error frame; a `KeyError` keeps its quotes.
pub fn bare(kind: PythonError, message: &str) -> String {
    match kind {
        PythonError::KeyError => quoted(message),
        _ => message.to_owned(),
    }
}

/// Python's `repr` of a string: single quotes unless only they occur inside; what cannot be printed is escaped.
pub fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match u32::from(c) {
                n @ ..=0xff => format!("\\x{n:02x}"),
                n @ ..=0xffff => format!("\\u{n:04x}"),
                n => format!("\\U{n:08x}"),
            }),
        }
    }
    out.push(quote);
    out
}

/// Python and Rust call the same categories unprintable: controls, formats, unassigned, and separators but the space.
/// Rust tells through `escape_debug`; after a letter, so that a combining mark is not escaped for being the first.
fn is_printable(c: char) -> bool {
    matches!(c, '"' | '\'') || String::from_iter(['a', c]).escape_debug().nth(1) == Some(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unary_error_is_the_repr_of_the_exception() {
        assert_eq!(repr(PythonError::KeyError, "nope.0"), "KeyError('nope.0')");
        assert_eq!(repr(PythonError::RuntimeError, ""), "RuntimeError('')");
    }

    #[test]
    fn a_stream_error_is_the_bare_message_but_a_key_error_keeps_its_quotes() {
        assert_eq!(bare(PythonError::KeyError, "nope.1"), "'nope.1'");
        assert_eq!(bare(PythonError::ValueError, "it's wrong"), "it's wrong");
    }

    #[test]
    fn quotes_are_chosen_as_python_chooses_them() {
        assert_eq!(quoted("it's"), r#""it's""#);
        assert_eq!(quoted(r#"say "hi""#), r#"'say "hi"'"#);
        assert_eq!(quoted(r#"it's "both""#), r#"'it\'s "both"'"#);
    }

    // Expected texts are the output of Python 3.11's repr().
    #[test]
    fn what_cannot_be_printed_is_escaped_as_python_escapes_it() {
        assert_eq!(quoted("a\nb\r\t\\"), r"'a\nb\r\t\\'");
        assert_eq!(quoted("\0\u{1b}\u{7f}\u{80}\u{a0}\u{ad}"), r"'\x00\x1b\x7f\x80\xa0\xad'");
        assert_eq!(quoted("\u{200b}\u{2028}\u{e000}\u{feff}"), r"'\u200b\u2028\ue000\ufeff'");
        assert_eq!(quoted("\u{e0001}\u{10ffff}"), r"'\U000e0001\U0010ffff'");
        assert_eq!(quoted("é世😀e\u{301}"), "'é世😀e\u{301}'");
        assert_eq!(quoted("\u{301}"), "'\u{301}'");
    }
}
