//! [`Experts`]: which experts to host, and how they are made.

use std::sync::Arc;

use skep_expert::BackendFactory;
use skep_wire::{Compression, ExpertUid};

use super::compressed::Compressed;

/// Which uids a group takes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Uids {
    /// Free ones of a pattern, as in `expert.[0:5]`.
    Pattern(String),
    /// Exactly these.
    Listed(Vec<ExpertUid>),
    /// Those that have a checkpoint and that no other group takes.
    Kept,
    /// So many of `expert.0`, `expert.1` and so on, the first free ones.
    Numbered(usize),
}

type Maker = Arc<dyn Fn(&ExpertUid) -> BackendFactory + Send + Sync>;

/// A group of experts that are made alike.
///
/// ```
/// # #[cfg(feature = "torch")] {
/// use skep::prelude::*;
/// let experts = Experts::pattern("expert.[0:5]").module(Ffn::hidden(512)).optimizer(Sgd::lr(0.01));
/// # }
/// ```
#[derive(Clone)]
pub struct Experts {
    pub(crate) uids: Uids,
    pub(crate) count: Option<usize>,
    compression: Compression,
    make: Option<Maker>,
    #[cfg(feature = "torch")]
    torch: torch::Recipe,
}

impl Experts {
    fn new(uids: Uids) -> Self {
        Self {
            uids,
            count: None,
            compression: Compression::None,
            make: None,
            #[cfg(feature = "torch")]
            torch: torch::Recipe::default(),
        }
    }

    /// Uids that a pattern names, as in `expert.[0:5]` or `ffn.[0:4].[0:16]`: those that nobody in the network has yet.
    pub fn pattern(pattern: &str) -> Self {
        Self::new(Uids::Pattern(pattern.to_owned()))
    }

    /// Exactly these uids.
    pub fn uids(uids: impl IntoIterator<Item = ExpertUid>) -> Self {
        Self::new(Uids::Listed(uids.into_iter().collect()))
    }

    /// The uids found in [`checkpoint_dir`](crate::RuntimeBuilder::checkpoint_dir) that no other group takes.
    pub fn from_checkpoints() -> Self {
        Self::new(Uids::Kept)
    }

    /// So many of `expert.0`, `expert.1` and so on: the first that nobody in the network has yet, as hivemind's server does
    /// without a pattern. The first ten numbers for each are tried.
    pub fn numbered(count: usize) -> Self {
        Self::new(Uids::Numbered(count))
    }

    /// How many of the pattern's uids to host; by default all.
    pub fn count(mut self, count: usize) -> Self {
        self.count = Some(count);
        self
    }

    /// How inputs travel; by default uncompressed.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Makes each expert with a function of one's own, which gets the uid.
    pub fn backend(mut self, make: impl Fn(&ExpertUid) -> BackendFactory + Send + Sync + 'static) -> Self {
        self.make = Some(Arc::new(make));
        self
    }

    /// The factory of one expert; `None` when nothing says how experts are made.
    pub(crate) fn factory(&self, uid: &ExpertUid) -> Option<BackendFactory> {
        let mut factory = match &self.make {
            Some(make) => make(uid),
            #[cfg(feature = "torch")]
            None => self.torch.factory(uid)?,
            #[cfg(not(feature = "torch"))]
            None => return None,
        };
        let compression = self.compression;
        if compression == Compression::None {
            return Some(factory);
        }
        Some(Box::new(move || Ok(Box::new(Compressed::new(factory()?, compression)))))
    }
}

#[cfg(not(feature = "torch"))]
impl Experts {
    pub(crate) fn streams(&self, _executors: usize) -> Option<skep_expert::Streams> {
        None
    }
}

#[cfg(feature = "torch")]
mod torch {
    use skep_expert::{BackendError, BackendFactory, Streams};
    use skep_kernel::Seed;
    use skep_torch::{CudaStream, ModuleSpec, OptimizerSpec, tch::Device};
    use skep_wire::ExpertUid;

    use super::Experts;

    /// How a torch expert is made.
    #[derive(Clone)]
    pub(super) struct Recipe {
        module: Option<ModuleSpec>,
        optimizer: OptimizerSpec,
        device: Device,
        seed: Option<u64>,
    }

    impl Default for Recipe {
        fn default() -> Self {
            let optimizer = skep_torch::Sgd::lr(0.01).into();
            Self { module: None, optimizer, device: Device::Cpu, seed: None }
        }
    }

    impl Recipe {
        pub fn factory(&self, uid: &ExpertUid) -> Option<BackendFactory> {
            let module = self.module.clone()?;
            let seed = match self.seed {
                Some(seed) => Seed::new(seed),
                None => Seed::random(),
            };
            let seed = seed.derive(uid.as_str()).number();
            Some(skep_torch::factory(module, self.optimizer.clone(), self.device, seed))
        }
    }

    /// Streams of a CUDA device when nothing else is said: copies and launches of one overlap with the other's.
    const STREAMS: usize = 2;

    impl Experts {
        /// The streams of the device that the group is on, as many as `executors` says; `None` for the CPU.
        pub(crate) fn streams(&self, executors: usize) -> Option<Streams> {
            let device = self.torch.device;
            let Device::Cuda(n) = device else { return None };
            let count = if executors == 0 { STREAMS } else { executors };
            Some(Streams::new(format!("cuda{n}"), count, move || {
                let checked = skep_torch::check_device(device).and_then(|()| CudaStream::new(device));
                checked.map_err(|error| BackendError::Failed(error.to_string()))
            }))
        }

        /// The module that each expert is: `Ffn::hidden(512)`.
        pub fn module(mut self, module: impl Into<ModuleSpec>) -> Self {
            self.torch.module = Some(module.into());
            self
        }

        /// What trains it: `Sgd::lr(0.01)`, which is also the default.
        pub fn optimizer(mut self, optimizer: impl Into<OptimizerSpec>) -> Self {
            self.torch.optimizer = optimizer.into();
            self
        }

        /// Where it computes; by default on the CPU.
        pub fn device(mut self, device: Device) -> Self {
            self.torch.device = device;
            self
        }

        /// Makes the initial weights repeatable: they depend on this and the uid only.
        pub fn seed(mut self, seed: u64) -> Self {
            self.torch.seed = Some(seed);
            self
        }
    }
}
