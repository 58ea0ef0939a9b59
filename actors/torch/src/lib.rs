//! libtorch, and nobody else knows it: expert modules with their optimizers behind the port of the servers, and remote
//! experts as differentiable functions for clients. Speaks no protocol and owns no thread.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod backend;
mod convert;
mod device;
mod error;
#[allow(unsafe_code)]
mod ffi;
mod module;
mod optim;
pub mod process;
mod schedule;

pub use backend::{TorchBackend, factory};
pub use convert::{dtype, kind, to_host, to_tensor};
pub use device::{check_device, parse_device};
pub use error::Error;
pub use module::{DetDropout, ExpertModule, Ffn, ModuleSpec, Nop, Transformer};
pub use optim::{Adam, AdamW, OptimizerSpec, Rule, Sgd};
pub use schedule::Schedule;
pub use tch;
