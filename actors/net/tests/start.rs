//! What a configuration means, and what is said when it does not work.

mod common;

use std::time::Duration;

use common::*;
use multiaddr::Multiaddr;
use skep_net::{Net, NetConfig, NetError, NetLimits};
use skep_rpc::{Router, Transport};

fn start(listen: &[&str]) -> Result<Net, NetError> {
    let listen = listen.iter().map(|address| address.parse().unwrap()).collect();
    Net::start(NetConfig { listen, ..NetConfig::default() }, keypair(), Router::new(), clock())
}

#[test]
fn addresses_say_where_and_who() {
    let net = start(&["/ip4/127.0.0.1/tcp/0"]).unwrap();
    let [address] = &net.addresses()[..] else { panic!("one address") };
    let text = address.to_string();
    assert!(text.starts_with("/ip4/127.0.0.1/tcp/") && !text.contains("/tcp/0/"), "{text}");
    assert!(text.ends_with(&format!("/p2p/{}", net.local_peer())), "{text}");
}

#[test]
fn a_wildcard_is_expanded_with_loopback_first() {
    let net = start(&["/ip4/0.0.0.0/tcp/0"]).unwrap();
    let addresses = net.addresses();
    assert!(addresses[0].to_string().starts_with("/ip4/127.0.0.1/"), "{addresses:?}");
    assert!(addresses.iter().all(|address| !address.to_string().contains("0.0.0.0")), "{addresses:?}");
}

#[test]
fn announced_addresses_replace_those_listened_on() {
    let announce: Vec<Multiaddr> = vec!["/dns4/bee.example/tcp/31337".parse().unwrap()];
    let net = Net::start(NetConfig { announce, ..NetConfig::default() }, keypair(), Router::new(), clock()).unwrap();
    let expected = format!("/dns4/bee.example/tcp/31337/p2p/{}", net.local_peer());
    assert_eq!(net.addresses(), [expected.parse().unwrap()]);
}

#[test]
fn a_port_in_use_is_named_with_the_remedy() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
    let error = start(&[&address]).unwrap_err();
    assert!(matches!(error, NetError::AddressInUse { .. }), "{error:?}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[test]
fn the_port_of_another_node_is_in_use() {
    let first = start(&["/ip4/127.0.0.1/tcp/0"]).unwrap();
    let address = first.addresses()[0].to_string();
    let address = address.split("/p2p/").next().unwrap();
    assert!(matches!(start(&[address]), Err(NetError::AddressInUse { .. })));
}

#[test]
fn addresses_of_other_machines_and_other_transports_are_refused() {
    assert!(matches!(start(&["/ip4/192.0.2.1/tcp/0"]), Err(NetError::NotOurs { .. })));
    assert!(matches!(start(&["/ip4/127.0.0.1/udp/0/quic-v1"]), Err(NetError::Unsupported { .. })));
    assert!(matches!(start(&["/dns4/localhost/tcp/0"]), Err(NetError::Unsupported { .. })));
}

#[test]
fn a_port_is_free_again_after_a_drop() {
    let net = start(&["/ip4/127.0.0.1/tcp/0"]).unwrap();
    let address = net.addresses()[0].to_string();
    let address = address.split("/p2p/").next().unwrap().to_owned();
    drop(net);
    let tries = (0..1000).map(|_| start(&[&address]));
    assert!(tries.filter_map(Result::ok).next().is_some());
}

#[test]
fn settings_without_a_meaning_are_refused() {
    let with = |limits| Net::start(NetConfig { limits, ..NetConfig::default() }, keypair(), Router::new(), clock());
    let bad = [
        NetLimits { max_inbound_calls: 0, ..NetLimits::default() },
        NetLimits { reserved_connections: 512, ..NetLimits::default() },
        NetLimits { max_inbound_streams: 5000, ..NetLimits::default() },
        NetLimits { max_inbound_bytes: 1000, max_body_bytes: 1001, ..NetLimits::default() },
        NetLimits { max_answer_bytes: 1000, max_body_bytes: 1001, ..NetLimits::default() },
        NetLimits {
            max_inbound_bytes: 8 << 30,
            max_answer_bytes: 8 << 30,
            max_body_bytes: 4 << 30,
            ..NetLimits::default()
        },
    ];
    for limits in bad {
        assert!(matches!(with(limits), Err(NetError::Config { .. })));
    }
    let bad = [
        NetConfig { threads: 0, ..NetConfig::default() },
        NetConfig { busy_poll: Duration::from_secs(1), ..NetConfig::default() },
    ];
    for config in bad {
        assert!(matches!(Net::start(config, keypair(), Router::new(), clock()), Err(NetError::Config { .. })));
    }
    assert!(matches!(start(&[]), Err(NetError::Config { key: "listen", .. })));
}

#[test]
fn a_configuration_survives_being_written_and_read() {
    let config = NetConfig {
        listen: vec!["/ip6/::1/tcp/1".parse().unwrap()],
        allow_peers: Some(vec![keypair().public().to_peer_id()]),
        ..NetConfig::default()
    };
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), config);
    assert_eq!(serde_json::from_str::<NetConfig>("{}").unwrap(), NetConfig::default());
    assert_eq!(serde_json::from_str::<NetConfig>(r#"{"busy_poll": 0}"#).unwrap().busy_poll, Duration::ZERO);
}

#[test]
fn unknown_keys_and_bad_values_are_refused() {
    for text in [
        r#"{"listne": []}"#,
        r#"{"limits": {"max_conections": 1}}"#,
        r#"{"timeouts": {"idle": 0}}"#,
        r#"{"timeouts": {"idle": -1}}"#,
        r#"{"busy_poll": -1}"#,
        r#"{"listen": ["127.0.0.1:80"]}"#,
        r#"{"allow_peers": ["nobody"]}"#,
    ] {
        assert!(serde_json::from_str::<NetConfig>(text).is_err(), "{text}");
    }
}
