//! Checkpoints of hivemind's servers: what `torch.save` writes of a module, its optimizer and its schedule
//! (docs/wire.md §9.5). Read and written here, because libtorch's own reader does not keep ordered dictionaries, and
//! Python's would run whatever the file says. Nothing of a file is ever run: unknown names are errors.

mod archive;
mod pickle;
mod state;
mod storage;
mod unpickle;

pub use state::{read_checkpoint, write_checkpoint};

/// A file that is none of `torch.save`'s, or of another kind than is read here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a checkpoint of hivemind: {0}")]
pub struct PtError(pub String);

fn bad<T>(text: impl Into<String>) -> Result<T, PtError> {
    Err(PtError(text.into()))
}
