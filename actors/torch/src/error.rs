//! How this crate's calls fail.

use skep_expert::BackendError;
use skep_moe::MoeError;
use skep_rpc::RpcError;
use skep_wire::{TensorError, UidError};
use tch::TchError;

/// Why a call brought no tensors.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody announces the expert.
    #[error("no expert {uid} is announced; is its server running and joined to the same network? try `skep experts`")]
    NotFound {
        /// The expert asked for.
        uid: String,
    },
    /// Not the name of an expert.
    #[error(transparent)]
    Uid(#[from] UidError),
    /// Inputs that the expert does not take.
    #[error("{expert} does not take these inputs: {reason}")]
    Inputs {
        /// The expert or the layer.
        expert: String,
        /// Which input differs, and how.
        reason: String,
    },
    /// An answer of another shape or type than the expert's schema promises.
    #[error("{expert} gave a wrong answer: {reason}")]
    Answer {
        /// The expert or the layer.
        expert: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A call to an expert failed.
    #[error("{expert}: {source}")]
    Rpc {
        /// The expert called.
        expert: String,
        /// How it failed.
        source: Box<RpcError>,
    },
    /// A mixture got no result.
    #[error(transparent)]
    Moe(Box<MoeError>),
    /// A tensor of a type or shape that does not travel.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An unusable setting.
    #[error("{0}")]
    Config(String),
    /// libtorch refused an operation; its words without the C++ backtrace.
    #[error("torch: {0}")]
    Torch(String),
}

impl From<MoeError> for Error {
    fn from(error: MoeError) -> Self {
        Error::Moe(Box::new(error))
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        Error::Torch(short(&error))
    }
}

impl Error {
    pub(crate) fn rpc(expert: impl ToString, source: RpcError) -> Self {
        Error::Rpc { expert: expert.to_string(), source: Box::new(source) }
    }
}

impl From<Error> for BackendError {
    fn from(error: Error) -> Self {
        match error {
            Error::Inputs { .. } | Error::Tensor(_) => BackendError::Invalid(error.to_string()),
            other => BackendError::Failed(other.to_string()),
        }
    }
}

/// The message of a libtorch error without the C++ backtrace that follows it.
pub(crate) fn short(error: &TchError) -> String {
    let text = match error {
        TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    let end = ["\nException raised from", "\nframe #"].iter().filter_map(|mark| text.find(mark)).min();
    text[..end.unwrap_or(text.len())].trim_end().to_owned()
}

/// A libtorch error before anything was changed.
pub(crate) fn failed(error: TchError) -> BackendError {
    BackendError::Failed(short(&error))
}
