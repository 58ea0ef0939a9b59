//! The supervision tree of the long-lived actors.
//!
//! ```text
//! runtime (rest-for-one)
//! └─ dht        permanent: joins again for ever
//! ```
//! The network runs on its own thread and outlives the tree; experts and announcer run under the server's guardian.

use actix::Actor;
use skep_dht::{Dht, DhtParts, Validators};
use skep_kernel::{
    ChildSpec, Guardian, GuardianHandle, GuardianSpec, Intensity, Restart, Seed, SharedClock, Started, Strategy,
};

use crate::error::Error;

/// What has grown.
pub(crate) struct Tree {
    pub dht: Dht,
    pub guardian: GuardianHandle,
}

/// Starts guardians and actors on the current actix system.
pub(crate) async fn grow(
    clock: &SharedClock,
    seed: &Seed,
    dht: DhtParts,
    validators: Validators,
) -> Result<Tree, Error> {
    let spec = GuardianSpec {
        name: "runtime".to_owned(),
        strategy: Strategy::RestForOne,
        intensity: Intensity::default(),
        seed: seed.derive("guardian"),
    };
    let guardian = Guardian::start(spec, clock.clone());
    let (dht, make) = Dht::with_validators(dht, validators);
    let child = ChildSpec::new("dht", Restart::Permanent);
    guardian
        .supervise(child, move |tombstone| Started::actor(make(tombstone).start()))
        .await
        .map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(Tree { dht, guardian })
}
