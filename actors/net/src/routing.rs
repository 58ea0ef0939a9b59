//! libp2p's Kademlia, which finds the addresses of peers, made to say something to whoever comes first.

use std::{
    ops::{Deref, DerefMut},
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    kad::{self, ConnectionType, KadPeer, store::MemoryStore},
    swarm::{
        ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent,
        ToSwarm,
    },
};

type Inner = kad::Behaviour<MemoryStore>;
type ToHandler = THandlerInEvent<Inner>;

/// libp2p's Kademlia. Asked for peers while it knows none, it names itself.
///
/// hivemind's daemon (go-libp2p-kad-dht 0.25) asks each new peer for the peers closest to that peer's own id, and takes a
/// peer that names nobody for none that can be asked, for as long as the connection lasts. So a client that joined a lone
/// node would never find the addresses of those that join later.
pub(crate) struct Routing {
    inner: Inner,
    local_peer: PeerId,
}

impl Routing {
    pub(crate) fn new(inner: Inner, local_peer: PeerId) -> Self {
        Self { inner, local_peer }
    }
}

impl Deref for Routing {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl DerefMut for Routing {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.inner
    }
}

impl NetworkBehaviour for Routing {
    type ConnectionHandler = <Inner as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = kad::Event;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_outbound_connection(id, peer, remote, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<kad::Event, ToHandler>> {
        let local_peer = self.local_peer;
        self.inner.poll(cx).map(|to_swarm| to_swarm.map_in(|to_handler| never_nobody(to_handler, local_peer)))
    }
}

/// The asker is connected to us: it needs no address.
fn never_nobody(to_handler: ToHandler, local_peer: PeerId) -> ToHandler {
    match to_handler {
        ToHandler::FindNodeRes { mut closer_peers, request_id } => {
            if closer_peers.is_empty() {
                let connection_ty = ConnectionType::Connected;
                closer_peers.push(KadPeer { node_id: local_peer, multiaddrs: Vec::new(), connection_ty });
            }
            ToHandler::FindNodeRes { closer_peers, request_id }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use futures::{AsyncReadExt as _, AsyncWriteExt as _};
    use libp2p::core::{
        muxing::StreamMuxerExt as _,
        transport::{DialOpts, PortUse, Transport as _},
    };

    use skep_rpc::Transport as _;

    use crate::{behaviour::KAD, common::*};

    /// One line of the negotiation, or one message.
    fn with_length(bytes: &[u8]) -> Vec<u8> {
        [&[u8::try_from(bytes.len()).unwrap()][..], bytes].concat()
    }

    #[tokio::test]
    async fn a_lone_node_that_is_asked_for_peers_names_itself() {
        let (lone, key) = (Node::start(Default::default(), skep_rpc::Router::new()), keypair());
        let mut transport = crate::transport::build(&key, false, Duration::from_secs(5)).unwrap();
        let options = DialOpts { role: libp2p::core::Endpoint::Dialer, port_use: PortUse::New };
        let (_, mut muxer) = transport.dial(lone.net.addresses().remove(0), options).unwrap().await.unwrap();

        let mut stream = poll_fn(|cx| {
            let _none_opened_by_it = muxer.poll_unpin(cx);
            muxer.poll_outbound_unpin(cx)
        })
        .await
        .unwrap();
        // `FIND_NODE` for the node's own id, as go-libp2p asks (its Kademlia's protobuf: 1 type, 2 key).
        let id = lone.peer().to_bytes();
        let question = [&[0x08, 4, 0x12, u8::try_from(id.len()).unwrap()][..], &id].concat();
        let lines = [with_length(b"/multistream/1.0.0\n"), with_length(format!("{KAD}\n").as_bytes())].concat();
        let exchange = Box::pin(async move {
            stream.write_all(&lines).await.unwrap();
            stream.write_all(&with_length(&question)).await.unwrap();
            stream.flush().await.unwrap();
            let mut agreed = vec![0; lines.len()];
            stream.read_exact(&mut agreed).await.unwrap();
            assert_eq!(agreed, lines);
            let mut length = [0];
            stream.read_exact(&mut length).await.unwrap();
            let mut answer = vec![0; length[0].into()];
            stream.read_exact(&mut answer).await.unwrap();
            answer
        });
        let driven = poll_fn(move |cx| muxer.poll_unpin(cx).map(drop));
        let within = lone.clock.sleep_until(lone.within(Duration::from_secs(60)).moment());
        let answer = tokio::select! {
            biased;
            answer = exchange => answer,
            () = driven => panic!("the connection ended"),
            () = within => panic!("no answer within a minute"),
        };
        // 8 closer peers, in it 1 id.
        let peer = [&[0x0a, u8::try_from(id.len()).unwrap()][..], &id].concat();
        assert!(answer.windows(peer.len()).any(|bytes| bytes == peer), "{answer:02x?}");
    }
}
