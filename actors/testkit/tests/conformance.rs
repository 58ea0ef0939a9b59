//! The simulated network is a transport like every other.

use std::sync::Arc;

use skep_rpc::{Router, Transport};
use skep_testkit::{
    Latency, Sim, Wire,
    conformance::transport::{self, Connected},
};

fn run(wire: Wire) {
    Sim::with_seed(1).run(|sim| async move {
        sim.network().wire(wire).max_message(32 << 20);
        sim.network()
            .latency(Latency::uniform(std::time::Duration::from_millis(1)..std::time::Duration::from_millis(9)));
        let make = |router: Router| {
            let sim = sim.clone();
            async move {
                let callee = sim.network().node(router);
                Connected::new(Arc::new(sim.network().client()), callee.local_peer(), sim.clock(), ())
            }
        };
        transport::all(&make).await;
    });
}

#[test]
fn the_simulated_network_passes_as_a_native_transport() {
    run(Wire::Native);
}

#[test]
fn the_simulated_network_passes_as_a_hivemind_transport() {
    run(Wire::Hivemind);
}
