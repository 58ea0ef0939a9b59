//! Expert classes of one's own, by name.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use tch::Device;

use super::{ExpertModule, ModuleSpec};
use crate::Error;

/// Makes a module of a width with fresh parameters, which depend on the seed only.
pub(super) type Maker = Arc<dyn Fn(usize, Device, u64) -> Result<Box<dyn ExpertModule>, Error> + Send + Sync>;

static CLASSES: RwLock<BTreeMap<String, Maker>> = RwLock::new(BTreeMap::new());

/// Makes a class of one's own known to this process by a name, under which [`ModuleSpec::named`], the configuration's
/// `expert_cls` and the flag of that name find it. `make` gets the width, the device and a seed. It is called on executor
/// threads; a panic there is an error of the expert.
///
/// # Errors
/// [`Error::Config`] when the name is taken.
pub fn register_class(
    name: &str,
    make: impl Fn(usize, Device, u64) -> Result<Box<dyn ExpertModule>, Error> + Send + Sync + 'static,
) -> Result<(), Error> {
    let mut classes = CLASSES.write().unwrap_or_else(PoisonError::into_inner);
    if ModuleSpec::CLASSES.contains(&name) || name == "torchscript" || classes.contains_key(name) {
        return Err(Error::Config(format!("an expert class {name:?} exists already")));
    }
    classes.insert(name.to_owned(), Arc::new(make));
    Ok(())
}

pub(super) fn maker(name: &str) -> Option<Maker> {
    CLASSES.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
}

pub(super) fn names() -> Vec<String> {
    CLASSES.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
}
