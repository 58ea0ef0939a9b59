//! One call's way there and back.

use std::time::Duration;

use libp2p_identity::PeerId;
use rand::Rng;
use skep_kernel::{Deadline, Signal, Spawner, time::before};
use skep_rpc::{Answer, Call, Inbound, Meta, RequestId, Router, RpcError, ServeError, Service, Step};
use skep_wire::error_text;
use tokio::sync::oneshot;

use super::{Condition, SimNetwork, Wire};
use crate::{
    link::{Fate, Way},
    trace::Happening,
};

/// What a server on hivemind's wire assumes of a caller whose deadline it cannot see.
const LEGACY_DEADLINE: Duration = Duration::from_secs(300);

type Outcome = Result<Answer, ServeError>;

/// What is decided of a call when it is sent.
struct Sent {
    caller: Signal<Condition>,
    callee: Signal<Condition>,
    wire: Wire,
    refused: bool,
    twice: bool,
    reset: bool,
    silent: bool,
}

impl SimNetwork {
    pub(super) async fn exchange(self, from: PeerId, call: Call) -> Result<Answer, RpcError> {
        let peer = call.peer;
        let unreachable = |step, reason: &str| RpcError::Unreachable { peer, step, reason: reason.to_owned() };
        let sent = self.send(from, &call)?;
        running(&sent.caller).await.map_err(|Gone| unreachable(Step::Dial, "this node is stopped"))?;
        let size = call.body.len();
        if sent.twice {
            self.repeat(from, call.clone(), &sent);
        }
        self.travel((from, peer), size).await;
        running(&sent.callee).await.map_err(|Gone| unreachable(Step::Dial, "connection refused"))?;
        if sent.refused {
            return Err(unreachable(Step::Dial, "connection refused"));
        }
        let answer = gated(self.serve(from, call, &sent), sent.callee.clone()).await;
        let outcome = answer.ok_or_else(|| unreachable(Step::Exchange, "connection reset"))?;
        let Ok(outcome) = outcome else {
            // Its process ended. One that was killed says nothing; one that was started again breaks old connections.
            running(&sent.callee).await.map_err(|Gone| unreachable(Step::Exchange, "connection reset"))?;
            return Err(unreachable(Step::Exchange, "connection reset"));
        };
        running(&sent.callee).await.map_err(|Gone| unreachable(Step::Exchange, "connection reset"))?;
        if sent.silent {
            std::future::pending::<()>().await;
        }
        self.travel((peer, from), outcome.as_ref().map_or(0, |answer| answer.body.len())).await;
        if sent.reset {
            return Err(unreachable(Step::Exchange, "connection reset"));
        }
        self.received(peer, outcome, sent.wire)
    }

    /// Looks the callee up and draws what will happen.
    fn send(&self, from: PeerId, call: &Call) -> Result<Sent, RpcError> {
        let (peer, size) = (call.peer, call.body.len());
        let state = &mut *self.state();
        let Some(node) = state.nodes.get(&peer).filter(|node| !node.is_client) else {
            return Err(RpcError::Unreachable { peer, step: Step::Resolve, reason: "no address is known".to_owned() });
        };
        if size > state.max_message {
            return Err(RpcError::TooLarge { size, limit: state.max_message });
        }
        let (callee, caller) = (node.condition.clone(), state.nodes[&from].condition.clone());
        let (ways, random, way) = (&state.ways, &mut state.random, (from, peer));
        let refused = ways.chance(way, random, |link| link.refusal);
        Ok(Sent {
            caller,
            callee,
            wire: state.wire,
            refused,
            // What was refused has not arrived, not even once.
            twice: ways.chance(way, random, |link| link.duplication) && !refused,
            reset: ways.chance(way, random, |link| link.reset),
            silent: ways.chance(way, random, |link| link.silence),
        })
    }

    /// One message's way: completes on arrival, never for a lost one.
    async fn travel(&self, way: Way, bytes: usize) {
        let now = self.clock.now();
        let fate = {
            let state = &mut *self.state();
            state.ways.send(way, bytes, now, &mut state.random)
        };
        match fate {
            Fate::Lost => self.lose(way).await,
            Fate::Arrives(delay) if delay.is_zero() => {}
            Fate::Arrives(delay) => self.clock.sleep_until(now + delay).await,
        }
        let passable = |(): &()| {
            let ways = &self.state().ways;
            let cut = ways.cut.contains(&way);
            (cut || !ways.held.contains(&way)).then_some(!cut)
        };
        if !self.turned.until(passable).await {
            self.lose(way).await;
        }
    }

    async fn lose(&self, (from, to): Way) {
        let (from, to) = (self.number(from), self.number(to));
        self.trace.add(self.clock.now(), to, Happening::Lost { from });
        std::future::pending().await
    }

    /// Has the callee serve the call. Dropping the receiver tells it that the caller left.
    fn serve(&self, from: PeerId, call: Call, sent: &Sent) -> oneshot::Receiver<Outcome> {
        let (done, outcome) = oneshot::channel();
        let Some((router, spawner)) = self.arrive(from, &call) else { return outcome };
        let serving = Serving::new(self);
        let (network, way, deadline) = (self.clone(), (from, call.peer), call.meta.deadline);
        let (caller, callee) = (sent.caller.clone(), sent.callee.clone());
        let inbound = self.inbound(from, call, sent.wire);
        spawner.spawn(async move {
            let _serving = serving;
            let served = gated(async move { router.serve(inbound).await }, callee);
            tokio::pin!(served);
            let mut done = done;
            let outcome = tokio::select! {
                biased;
                () = done.closed() => {
                    // The news travels, too. Of a caller whose machine is gone there is none.
                    let gone = caller.get() == Condition::Killed;
                    let news = async { if gone { std::future::pending().await } else { network.travel(way, 0).await } };
                    let left = before(&*network.clock, deadline, news);
                    tokio::select! {
                        biased;
                        _left = left => None,
                        _unread = &mut served => None,
                    }
                }
                outcome = &mut served => outcome,
            };
            if let Some(outcome) = outcome {
                let _caller_left = done.send(outcome);
            }
        });
        outcome
    }

    /// The same call once more, whose answer nobody waits for.
    fn repeat(&self, from: PeerId, call: Call, sent: &Sent) {
        let Some((router, spawner)) = self.state().nodes.get(&call.peer).map(|n| (n.router.clone(), n.spawner.clone()))
        else {
            return;
        };
        let (network, callee, wire) = (self.clone(), sent.callee.clone(), sent.wire);
        let serving = Serving::new(self);
        spawner.spawn(async move {
            let _serving = serving;
            let deadline = call.meta.deadline;
            let served = async {
                network.travel((from, call.peer), call.body.len()).await;
                if running(&callee).await.is_ok() && network.arrive(from, &call).is_some() {
                    let _nobody_waits = gated(router.serve(network.inbound(from, call, wire)), callee).await;
                }
            };
            let _late = before(&*network.clock, deadline, served).await;
        });
    }

    /// Notes the arrival; who serves it.
    fn arrive(&self, from: PeerId, call: &Call) -> Option<(Router, Spawner)> {
        let (number, from, serves) = {
            let state = &mut *self.state();
            let from = state.nodes.get(&from).map_or(0, |node| node.number);
            let node = state.nodes.get(&call.peer)?;
            *state.delivered.entry((call.peer, call.method)).or_default() += 1;
            (node.number, from, (node.router.clone(), node.spawner.clone()))
        };
        self.trace.add(self.clock.now(), number, Happening::Arrived { from, method: call.method });
        Some(serves)
    }

    fn inbound(&self, from: PeerId, call: Call, wire: Wire) -> Inbound {
        let meta = match wire {
            Wire::Native => call.meta,
            Wire::Hivemind => Meta {
                deadline: Deadline::after(self.clock.now(), LEGACY_DEADLINE),
                request_id: RequestId(self.state().random.random()),
                trace: None,
            },
        };
        Inbound { peer: from, method: call.method, body: call.body, meta, knows_overload: wire == Wire::Native }
    }

    /// What the caller makes of the answer.
    fn received(&self, peer: PeerId, outcome: Outcome, wire: Wire) -> Result<Answer, RpcError> {
        match (outcome, wire) {
            (Ok(answer), _) if answer.body.len() > self.state().max_message => {
                Err(RpcError::TooLarge { size: answer.body.len(), limit: self.state().max_message })
            }
            (Ok(answer), Wire::Native) => Ok(answer),
            (Ok(answer), Wire::Hivemind) => Ok(Answer { body: answer.body, load: None }),
            (Err(error), Wire::Native) => Err(error.into_rpc(peer)),
            (Err(ServeError::Refused(reason)), Wire::Hivemind) => Err(RpcError::Refused { peer, reason }),
            (Err(error), Wire::Hivemind) => {
                let (kind, text) = error.as_python();
                Err(RpcError::Remote { text: error_text::repr(kind, &text) })
            }
        }
    }
}

/// Counts a call that is being served.
struct Serving(SimNetwork);

impl Serving {
    fn new(network: &SimNetwork) -> Self {
        network.state().serving += 1;
        Self(network.clone())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.state().serving -= 1;
    }
}

/// Polls `served` only while the callee runs; `None` once its process is gone.
async fn gated<T>(served: impl Future<Output = T>, callee: Signal<Condition>) -> Option<T> {
    tokio::pin!(served);
    loop {
        running(&callee).await.ok()?;
        tokio::select! {
            biased;
            () = stands(&callee) => {}
            outcome = &mut served => return Some(outcome),
        }
    }
}

struct Gone;

/// Waits until the peer runs; never ends for a killed one.
async fn running(condition: &Signal<Condition>) -> Result<(), Gone> {
    let settled = |now: &Condition| match now {
        Condition::Running => Some(Ok(())),
        Condition::Refusing => Some(Err(Gone)),
        Condition::Frozen | Condition::Killed => None,
    };
    condition.until(settled).await
}

/// Waits until the peer does not run.
async fn stands(condition: &Signal<Condition>) {
    condition.until(|now| (*now != Condition::Running).then_some(())).await
}
