//! What runs in the task of one connection: opens and accepts its substreams, and houses its links.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use libp2p::{
    PeerId, Stream, StreamProtocol,
    core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo},
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, ConnectionId, StreamUpgradeError, SubstreamProtocol,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound, ProtocolsChange,
        },
    },
};
use skep_rpc::Router;
use skep_wire::{
    Framing, Method,
    frame::native::{Lane, PROTOCOL},
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::{debug, warn};

use super::{Accepted, Connection, InboundSlot, MAX_OUTBOUND, Open, OpenError, Shared};
use crate::{
    native_link::{Caller, Linger, NATIVE, Native, Servant},
    slashless::PREFIX,
};

/// What a substream is for.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// One call on hivemind's wire.
    Call(Method, Framing),
    /// Many on ours.
    Native,
}

/// The name under which our side of a substream negotiates a handler (see [`crate::slashless`]).
fn protocol(method: Method, framing: Framing) -> Option<StreamProtocol> {
    type Named = ((Method, Framing), StreamProtocol);
    static NAMES: OnceLock<Vec<Named>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let unary = Method::ALL.map(|method| (method, Framing::Unary, Some(method.unary_name())));
        let stream = Method::ALL.map(|method| (method, Framing::Stream, method.stream_name()));
        let named = unary.into_iter().chain(stream).filter_map(|(method, framing, name)| {
            let name = StreamProtocol::try_from_owned(format!("{PREFIX}{}", name?)).expect("the prefix has a slash");
            Some(((method, framing), name))
        });
        named.collect()
    });
    names.iter().find(|(key, _)| *key == (method, framing)).map(|(_, name)| name.clone())
}

/// Names, and what a substream under each is for.
type Offer = [(StreamProtocol, Purpose)];

/// Negotiates one of several names; the result is the raw substream.
pub(crate) struct Handlers(Arc<Offer>);

impl UpgradeInfo for Handlers {
    type Info = StreamProtocol;
    type InfoIter = Names;

    fn protocol_info(&self) -> Names {
        Names { handlers: self.0.clone(), next: 0 }
    }
}

/// The names. The swarm reads them each time it polls a connection, so they are not put into a list of their own.
pub(crate) struct Names {
    handlers: Arc<Offer>,
    next: usize,
}

impl Iterator for Names {
    type Item = StreamProtocol;

    fn next(&mut self) -> Option<StreamProtocol> {
        let (name, _) = self.handlers.get(self.next)?;
        self.next += 1;
        Some(name.clone())
    }
}

impl InboundUpgrade<Stream> for Handlers {
    type Output = (Stream, Purpose);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: Stream, name: StreamProtocol) -> Self::Future {
        let (_, purpose) = self.0.iter().find(|(n, _)| *n == name).expect("only offered names are agreed");
        ready(Ok((stream, *purpose)))
    }
}

impl OutboundUpgrade<Stream> for Handlers {
    type Output = Stream;
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_outbound(self, stream: Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

/// Opens and accepts the substreams of one connection. Links do not keep a connection alive; calls on them do.
pub(crate) struct Handler {
    peer: PeerId,
    shared: Arc<Shared>,
    requests: mpsc::Receiver<Open>,
    inbound: Arc<AtomicUsize>,
    /// What we offer, and the version of the routes from which that follows.
    offered: Option<(u64, Arc<Offer>)>,
    caller: Option<Caller<Stream>>,
    servant: Option<Servant<Stream>>,
    linger: Option<Linger>,
}

impl Handler {
    /// The handler of a connection with a peer, and how to reach it.
    pub(super) fn new(shared: Arc<Shared>, id: ConnectionId, peer: PeerId, relayed: bool) -> (Self, Connection) {
        let (opens, requests) = mpsc::channel(MAX_OUTBOUND);
        let slots = Arc::new(Semaphore::new(MAX_OUTBOUND));
        let (caller, native) = match &shared.native {
            Some(node) => {
                #[allow(clippy::disallowed_methods, reason = "never simulated")]
                let (state, native) = watch::channel(Native::Unknown);
                (Some(Caller::new(node.clone(), peer, state)), Some((native, node.server.clock.now())))
            }
            None => (None, None),
        };
        let servant = shared.native.iter().find(|node| node.serves).map(|node| Servant::new(node.clone(), peer));
        let linger = shared.native.as_ref().map(|node| Linger::new(node.server.clock.clone()));
        let handler = Self { peer, shared, requests, inbound: Arc::default(), offered: None, caller, servant, linger };
        (handler, Connection { id, relayed, opens, slots, native })
    }

    /// hivemind's names of all methods that have a route, and our wire if one of them travels on it.
    fn offer(&self) -> Arc<Offer> {
        let methods = self.shared.router.as_ref().map(Router::methods).unwrap_or_default();
        let is_native = self.servant.is_some() && methods.iter().any(|method| method.is_native());
        let forms = methods.into_iter().flat_map(|method| [(method, Framing::Unary), (method, Framing::Stream)]);
        let calls =
            forms.filter_map(|(method, framing)| Some((protocol(method, framing)?, Purpose::Call(method, framing))));
        calls.chain(is_native.then_some((NATIVE, Purpose::Native))).collect()
    }

    /// The version of the routes.
    fn routes(&self) -> u64 {
        self.shared.router.as_ref().map_or(0, Router::version)
    }

    fn ask(
        &self,
        protocol: StreamProtocol,
        purpose: Purpose,
        asked: Asked,
    ) -> Poll<ConnectionHandlerEvent<Handlers, Asked, Infallible>> {
        let upgrade = SubstreamProtocol::new(Handlers(Arc::new([(protocol, purpose)])), asked);
        let protocol = upgrade.with_timeout(self.shared.negotiation_timeout);
        Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
    }

    fn accept(&self, stream: Stream, method: Method, framing: Framing) {
        let (peer, limit) = (self.peer, self.shared.max_inbound_streams);
        match InboundSlot::take(&self.inbound, limit) {
            Some(slot) => (self.shared.accept)(Accepted { peer, method, framing, stream, slot }),
            None => {
                self.shared.connections.refused_streams.fetch_add(1, Ordering::Relaxed);
                warn!(%peer, %method, limit, "reset a stream: the peer has too many open on one connection");
            }
        }
    }
}

/// Who asked for a substream.
pub(crate) enum Asked {
    /// A caller: the way back, and the name it asked for.
    Call { name: &'static str, reply: oneshot::Sender<Result<Stream, OpenError>> },
    /// The link.
    Native(Lane),
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Handlers;
    type OutboundProtocol = Handlers;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Asked;

    fn listen_protocol(&self) -> SubstreamProtocol<Handlers> {
        let offered = match &self.offered {
            Some((known, offered)) if *known == self.routes() => offered.clone(),
            _ => self.offer(),
        };
        SubstreamProtocol::new(Handlers(offered), ()).with_timeout(self.shared.negotiation_timeout)
    }

    fn connection_keep_alive(&self) -> bool {
        self.linger.as_ref().is_some_and(Linger::is_used)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Handlers, Asked, Infallible>> {
        self.shared.busy_poll.on_turn();
        // The swarm asks what we offer each time it polls a connection, and the routes hardly ever change.
        let version = self.routes();
        if self.offered.as_ref().is_none_or(|(known, _)| *known != version) {
            self.offered = Some((version, self.offer()));
        }
        while let Poll::Ready(Some(open)) = self.requests.poll_recv(cx) {
            let Open { purpose, reply } = open;
            let (name, protocol) = match purpose {
                Purpose::Call(method, framing) => (method_name(method, framing), protocol(method, framing)),
                Purpose::Native => (PROTOCOL, Some(NATIVE)),
            };
            let Some(protocol) = protocol else {
                let _caller_left = reply.send(Err(OpenError::Unsupported(name)));
                continue;
            };
            if reply.is_closed() {
                continue;
            }
            return self.ask(protocol, purpose, Asked::Call { name, reply });
        }
        if let Some(servant) = &mut self.servant {
            servant.poll(cx);
        }
        // Before the caller's turn, which may end this: a call that has just come makes the connection used.
        if let Some(linger) = &mut self.linger {
            let is_calling = self.caller.as_ref().is_some_and(Caller::is_busy);
            linger.poll(cx, is_calling || self.servant.as_ref().is_some_and(Servant::is_busy));
        }
        if let Some(caller) = &mut self.caller
            && let Poll::Ready(lane) = caller.poll(cx)
        {
            return self.ask(NATIVE, Purpose::Native, Asked::Native(lane));
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Handlers, Handlers, (), Asked>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, .. }) => match protocol {
                (stream, Purpose::Call(method, framing)) => self.accept(stream, method, framing),
                (mut stream, Purpose::Native) => {
                    stream.ignore_for_keep_alive();
                    if let Some(servant) = &mut self.servant {
                        servant.accept(stream);
                    }
                }
            },
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info }) => {
                match (info, &mut self.caller) {
                    (Asked::Call { reply, .. }, _) => {
                        // A caller who left drops the stream, which resets it.
                        let _caller_left = reply.send(Ok(stream));
                    }
                    (Asked::Native(lane), Some(caller)) => {
                        let mut stream = stream;
                        stream.ignore_for_keep_alive();
                        caller.opened(lane, stream);
                    }
                    (Asked::Native(_), None) => {}
                }
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => match (info, &mut self.caller) {
                (Asked::Call { name, reply }, _) => {
                    let error = match error {
                        StreamUpgradeError::Timeout => OpenError::Timeout,
                        StreamUpgradeError::NegotiationFailed => OpenError::Unsupported(name),
                        StreamUpgradeError::Io(error) => OpenError::Io(error),
                        StreamUpgradeError::Apply(never) => match never {},
                    };
                    let _caller_left = reply.send(Err(error));
                }
                (Asked::Native(_), Some(caller)) => caller.refused(&error.to_string()),
                (Asked::Native(_), None) => {}
            },
            ConnectionEvent::RemoteProtocolsChange(change) => {
                if let (ProtocolsChange::Added(added), Some(caller)) = (change, &mut self.caller) {
                    caller.identified(added.into_iter().any(|protocol| *protocol == NATIVE));
                }
            }
            ConnectionEvent::ListenUpgradeError(failed) => {
                debug!(peer = %self.peer, error = ?failed.error, "a stream of the peer found no protocol");
            }
            _ => {}
        }
    }
}

fn method_name(method: Method, framing: Framing) -> &'static str {
    match framing {
        Framing::Unary => method.unary_name(),
        Framing::Stream => method.stream_name().unwrap_or(method.unary_name()),
    }
}
