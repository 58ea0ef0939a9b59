//! Errors as hivemind's callers read them: Python's exceptions as text (wire document §2.2, §3).

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
pub fn repr(_kind: PythonError, _message: &str) -> String {
    unimplemented!()
}

/// `str(exception)`, the text of a stream's error frame; a `KeyError` keeps its quotes.
pub fn bare(_kind: PythonError, _message: &str) -> String {
    unimplemented!()
}
