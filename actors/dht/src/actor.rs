//! [`DhtActor`]: drives a [`Node`] with calls, timers and the messages of its inboxes.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, SpawnHandle, WrapFuture};
use libp2p_identity::PeerId;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use skep_kernel::{Deadline, Exit, Moment, Reply, Stop, Tombstone, pump, time::before};
use skep_rpc::{Answer, Body, Call, Meta, RequestId, RpcError, ServeError, SharedTransport, Step};
use skep_wire::Method;
use tracing::{info, warn};

use crate::{
    Stored, Timed,
    core::{
        message::{Request, Response},
        node::{CallId, Input, JoinState, Node, Outcome, Output, Ticket},
    },
    handle::NodeContext,
    messages::{Command, InboundCall},
    serve::overloaded,
};

/// The DHT node of a process. Its routing table and its records live and die with it: after a crash it joins anew, the
/// announcers store their records again, and the other replicas answer meanwhile. Commands in line survive.
pub struct DhtActor {
    shared: Arc<NodeContext>,
    transport: SharedTransport,
    node: Node,
    random: ChaCha8Rng,
    next_ticket: Ticket,
    waiting: BTreeMap<Ticket, Waiting>,
    calls_in_line: VecDeque<OutgoingCall>,
    calls_in_flight: usize,
    alarm: Option<(Moment, SpawnHandle)>,
    reads_commands: bool,
    /// After a crash: until when commands in line wait for the node to join anew.
    holds_until: Option<Moment>,
    tombstone: Tombstone,
}

/// Who waits for an answer of the node.
enum Waiting {
    Get(Reply<Vec<Option<Timed<Stored>>>>),
    Store(Reply<Vec<Outcome>>),
    Inbound(Reply<Result<Response, ServeError>>),
}

impl Waiting {
    fn is_abandoned(&self) -> bool {
        match self {
            Waiting::Get(reply) => reply.is_abandoned(),
            Waiting::Store(reply) => reply.is_abandoned(),
            Waiting::Inbound(reply) => reply.is_abandoned(),
        }
    }
}

struct OutgoingCall {
    id: CallId,
    peer: PeerId,
    request: Request,
    patience: Duration,
}

impl DhtActor {
    pub(crate) fn new(shared: Arc<NodeContext>, transport: SharedTransport, tombstone: Tombstone) -> Self {
        let node = Node::new(
            shared.config.clone(),
            transport.local_peer(),
            shared.seed,
            shared.bans.clone(),
            shared.initial_peers.clone(),
        )
        .with_validators(shared.validators.clone());
        let starts = shared.starts.get();
        let holds_until = (starts > 0).then(|| shared.clock.now() + 2 * shared.config.wait());
        Self {
            random: ChaCha8Rng::seed_from_u64(shared.seed ^ u64::from(starts) ^ CALLS_STREAM),
            shared,
            transport,
            node,
            next_ticket: 0,
            waiting: BTreeMap::new(),
            calls_in_line: VecDeque::new(),
            calls_in_flight: 0,
            alarm: None,
            reads_commands: false,
            holds_until,
            tombstone,
        }
    }

    fn ticket(&mut self, waiting: Waiting) -> Ticket {
        self.next_ticket += 1;
        self.waiting.insert(self.next_ticket, waiting);
        self.next_ticket
    }

    /// Waits for the next command, unless enough of them are under way.
    fn read_commands(&mut self, ctx: &mut Context<Self>) {
        let is_full = self.node.commands() >= self.shared.config.max_commands;
        if self.reads_commands || is_full || self.holds_commands() {
            return;
        }
        self.reads_commands = true;
        let shared = self.shared.clone();
        let next = async move { shared.commands.next().await };
        ctx.spawn(next.into_actor(self).map(|command, actor, ctx| {
            actor.reads_commands = false;
            match command {
                Some(command) => actor.on_command(command, ctx),
                None => actor.finish(ctx),
            }
        }));
    }

    /// Answered from an empty table, those in line at a crash would be as good as lost.
    fn holds_commands(&self) -> bool {
        !self.node.join_state().joined && self.holds_until.is_some_and(|until| self.shared.clock.now() < until)
    }

    fn on_command(&mut self, command: Command, ctx: &mut Context<Self>) {
        let input = match command {
            Command::Get { keys, freshness, deadline, reply } => {
                let ticket = self.ticket(Waiting::Get(reply));
                Input::Get { ticket, keys, freshness, deadline: deadline.moment() }
            }
            Command::Store { items, deadline, reply } => {
                let ticket = self.ticket(Waiting::Store(reply));
                Input::Store { ticket, items, deadline: deadline.moment() }
            }
        };
        self.step(input, ctx);
    }

    fn on_inbound(&mut self, call: InboundCall, ctx: &mut Context<Self>) {
        let InboundCall { peer, request, reply } = call;
        if reply.is_abandoned() {
            return;
        }
        let limit = self.shared.config.max_inbound;
        if self.waiting.values().filter(|waiting| matches!(waiting, Waiting::Inbound(_))).count() >= limit {
            return reply.send(Err(overloaded(&self.shared, limit)));
        }
        let ticket = self.ticket(Waiting::Inbound(reply));
        self.step(Input::Inbound { ticket, peer, request }, ctx);
    }

    /// One turn: the node takes in what happened, then everything it wants is done.
    fn step(&mut self, input: Input, ctx: &mut Context<Self>) {
        let (now, wall) = (self.shared.clock.now(), self.shared.clock.wall());
        let left = self.waiting.iter().filter(|(_, waiting)| waiting.is_abandoned()).map(|(ticket, _)| *ticket);
        for ticket in left.collect::<Vec<_>>() {
            self.waiting.remove(&ticket);
            self.node.handle(now, wall, Input::Abandoned { ticket });
        }
        self.node.handle(now, wall, input);
        while let Some(output) = self.node.poll() {
            self.perform(output);
        }
        self.start_calls(ctx);
        self.publish();
        self.set_alarm(ctx);
        self.read_commands(ctx);
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Call { call, peer, request, patience } => {
                self.calls_in_line.push_back(OutgoingCall { id: call, peer, request, patience });
            }
            Output::Reply { ticket, response } => {
                if let Some(Waiting::Inbound(reply)) = self.waiting.remove(&ticket) {
                    reply.send(Ok(response));
                }
            }
            Output::Got { ticket, values } => {
                if let Some(Waiting::Get(reply)) = self.waiting.remove(&ticket) {
                    reply.send(values);
                }
            }
            Output::Stored { ticket, outcomes } => {
                if let Some(Waiting::Store(reply)) = self.waiting.remove(&ticket) {
                    reply.send(outcomes);
                }
            }
            // The asker's own alarm tells it.
            Output::Elapsed { ticket } => drop(self.waiting.remove(&ticket)),
        }
    }

    fn start_calls(&mut self, ctx: &mut Context<Self>) {
        while self.calls_in_flight < self.shared.config.max_calls {
            let Some(OutgoingCall { id, peer, request, patience }) = self.calls_in_line.pop_front() else { return };
            self.calls_in_flight += 1;
            let (clock, method) = (self.shared.clock.clone(), request.ask.method());
            let deadline = Deadline::after(clock.now(), patience);
            let meta = Meta { deadline, request_id: RequestId(self.random.random()), trace: None };
            let call = self.transport.call(Call { peer, method, body: Body::Message(request.encode()), meta });
            let answered = async move {
                // The transport keeps deadlines; this one only guards against a transport that does not.
                let late = |_| RpcError::Deadline { peer, step: Step::Exchange, waited: patience };
                before(&*clock, deadline, call).await.map_err(late)?
            };
            ctx.spawn(answered.into_actor(self).map(move |answer, actor, ctx| {
                actor.calls_in_flight -= 1;
                actor.step(outcome(id, peer, method, answer), ctx);
            }));
        }
    }

    fn set_alarm(&mut self, ctx: &mut Context<Self>) {
        let Some(at) = self.node.poll_timeout() else { return };
        // One that rings too early costs less than a new one for every call.
        if self.alarm.is_some_and(|(set, _)| set <= at) {
            return;
        }
        if let Some((_, alarm)) = self.alarm.take() {
            ctx.cancel_future(alarm);
        }
        let alarm = self.shared.clock.sleep_until(at).into_actor(self).map(|(), actor, ctx| {
            actor.alarm = None;
            actor.step(Input::Tick, ctx);
        });
        self.alarm = Some((at, ctx.spawn(alarm)));
    }

    fn publish(&mut self) {
        let counts = self.node.counts();
        let (join, banned) = (self.node.join_state(), self.shared.bans.banned(self.shared.clock.now()).len());
        let rejoined = self.shared.join.read(|before| before != join);
        let before = rejoined.then(|| self.shared.join.update(|before| std::mem::replace(before, join.clone())));
        self.shared.status.update(|status| {
            if rejoined {
                status.joined = join.joined;
                status.problem = join.problem.as_ref().map(ToString::to_string);
                status.failed_rounds = join.failed_rounds;
            }
            status.nodes = counts.nodes;
            status.banned = banned;
            status.records = counts.records;
            status.record_bytes = counts.record_bytes;
            status.cached = counts.cached;
            status.cached_bytes = counts.cached_bytes;
            status.calls = counts.calls;
            status.commands = counts.commands;
        });
        // Last, so that whoever reads the log finds the status to say the same.
        if let Some(before) = before {
            tell(&before, join);
        }
    }

    fn finish(&mut self, ctx: &mut Context<Self>) {
        self.tombstone.write(Exit::Finished);
        ctx.stop();
    }
}

/// Tells the log what changed for whoever runs this node.
fn tell(before: &JoinState, now: &JoinState) {
    match &now.problem {
        _ if now.joined && !before.joined => info!("joined the DHT"),
        Some(problem) if !now.joined && now.failed_rounds != before.failed_rounds => {
            warn!(%problem, round = now.failed_rounds, "cannot join the DHT yet; trying again");
        }
        Some(problem) if !now.joined && before.joined => warn!(%problem, "lost the DHT; joining again"),
        _ => {}
    }
}

/// What the node hears of a call.
fn outcome(call: CallId, peer: PeerId, method: Method, answer: Result<Answer, RpcError>) -> Input {
    let response = answer.and_then(|answer| match answer.body {
        Body::Message(bytes) => {
            Response::decode(method, &bytes).map_err(|error| RpcError::Malformed { peer, reason: error.to_string() })
        }
        Body::Tensors(_) => Err(RpcError::Malformed { peer, reason: "tensors".to_owned() }),
    });
    match response {
        Ok(response) => Input::Answered { call, response },
        Err(error) => {
            let ours = error.is_local() || matches!(error, RpcError::TooLarge { .. } | RpcError::Overloaded { .. });
            Input::Failed { call, reason: error.to_string(), peer_at_fault: !ours }
        }
    }
}

/// Keeps request ids apart from the node's own random numbers.
const CALLS_STREAM: u64 = 0x6361_6c6c_7300_0000;

impl Actor for DhtActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        let node_id = self.node.id().to_string();
        self.shared.status.update(|status| {
            status.node_id = node_id;
            status.starts += 1;
        });
        self.shared.starts.update(|starts| *starts += 1);
        self.step(Input::Tick, ctx);
        if let Some(until) = self.holds_until {
            let alarm = self.shared.clock.sleep_until(until).into_actor(self);
            ctx.spawn(alarm.map(|(), actor, ctx| actor.read_commands(ctx)));
        }
        // Never held back, as nodes may wait for each other.
        pump(ctx, self.shared.inbound.clone(), Self::on_inbound);
    }
}

impl Handler<Stop> for DhtActor {
    type Result = ();

    fn handle(&mut self, _stop: Stop, ctx: &mut Context<Self>) {
        self.finish(ctx);
    }
}
