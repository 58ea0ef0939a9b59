//! A message of more protobuf fields than anybody needs is refused by every method, before it becomes anything.

mod common;

use std::{sync::Arc, time::Duration};

use common::*;
use futures::executor::block_on;
use skep_kernel::{Deadline, SharedClock, TokioClock};
use skep_net::{Net, NetConfig, identity, parse_peer_address};
use skep_rpc::{Body, Call, Meta, RequestId, Router, RpcError, Transport as _};
use skep_wire::{Method, proto::MAX_FIELDS};

#[test]
fn a_message_of_too_many_fields_is_refused_by_every_method() {
    let server = Daemon::start(&[&["serve", "--expert_uids", "e.0"], FFN].concat());
    let (peer, address) = parse_peer_address(&server.address()).expect("what the server prints is an address");
    let clock: SharedClock = Arc::new(TokioClock::system());
    // A field of number 15, which no message has, is two bytes: 0.
    let message = |fields: usize| Body::Message([0x78, 0].repeat(fields).into());
    for native in [false, true] {
        let key = identity::generate(identity::KeyKind::Ed25519).expect("a key");
        let config = NetConfig { native, ..NetConfig::client() };
        let net = Net::start(config, key.keypair().clone(), Router::new(), clock.clone()).expect("a client starts");
        net.add_addresses(peer, vec![address.clone()]);
        // Tensors travel without protobuf on the native wire.
        for method in Method::ALL.into_iter().filter(|method| !native || !method.carries_tensors()) {
            let deadline = Deadline::after(clock.now(), Duration::from_secs(30));
            let meta = Meta { deadline, request_id: RequestId(1), trace: None };
            let call = |fields| block_on(net.call(Call { peer, method, body: message(fields), meta }));
            match call(MAX_FIELDS + 1) {
                Err(RpcError::Remote { text }) => assert!(text.contains("131072 fields"), "{method}: {text}"),
                other => panic!("{method}: {other:?}"),
            }
            // As many as are allowed are refused, if at all, for what they say.
            match call(MAX_FIELDS) {
                Err(RpcError::Remote { text }) => assert!(!text.contains("fields"), "{method}: {text}"),
                other => drop(other.expect("an answer")),
            }
        }
    }
}
