//! The real network over loopback keeps what every transport promises, on either wire.

mod common;

use std::sync::Arc;

use common::*;
use skep_net::NetConfig;
use skep_rpc::Router;
use skep_testkit::conformance::transport::{self, Connected};

async fn passes(native: bool) {
    let make = |router: Router| async move {
        let server = Node::start_native(NetConfig { native, ..NetConfig::default() }, router);
        let client = Node::start_native(NetConfig { native, ..NetConfig::client() }, Router::new());
        client.knows(&server);
        let (peer, clock) = (server.peer(), client.clock.clone());
        Connected::new(Arc::new(client.net), peer, clock, server)
    };
    transport::all(&make).await;
}

#[tokio::test]
async fn the_network_passes_on_the_native_wire() {
    passes(true).await;
}

#[tokio::test]
async fn the_network_passes_on_hiveminds_wire() {
    passes(false).await;
}
