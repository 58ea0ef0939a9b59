//! The daemon's configuration: sections, layers (file < environment < flags), checks.

mod error;
mod load;
mod place;
mod sections;
pub mod validate;

pub use error::ConfigError;
pub use load::{Flags, Loaded, load};
pub use sections::{Config, Dht, Experts, Http, Limits, Log, Node, Server, TensorSpec};
