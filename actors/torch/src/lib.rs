//! libtorch, and nobody else knows it: expert modules with their optimizers behind the port of the servers, and remote
//! experts as differentiable functions for clients. Speaks no protocol and owns no thread.
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod autograd;
mod backend;
mod convert;
mod device;
mod error;
mod fan_out;
#[allow(unsafe_code)]
mod ffi;
mod gate;
mod layer;
mod module;
#[cfg(test)]
mod near;
mod optim;
pub mod process;
pub mod pt;
mod remote;
mod schedule;
mod staging;
mod stream;
mod switch_layer;

pub use autograd::{attach, take_backward_error};
pub use backend::{TorchBackend, factory};
pub use convert::{dtype, kind, to_host, to_tensor};
pub use device::{check_device, parse_device};
pub use error::Error;
pub use fan_out::{Answered, Calls, ExpertCalls};
pub use layer::MixtureOfExperts;
pub use module::{
    DetDropout, Draws, ExpertModule, Ffn, ModuleSpec, Nop, Script, ScriptSpec, TensorSpec, Transformer, register_class,
};
pub use optim::{Adam, AdamW, OptimizerSpec, Rule, Sgd};
pub use remote::RemoteExpert;
pub use schedule::Schedule;
pub use stream::CudaStream;
pub use switch_layer::{SwitchConfig, SwitchMixtureOfExperts};
pub use tch;
