//! One forward or backward pass of a mixture: search, plan, calls, join. What is decided is decided in `beam`, `plan` and
//! `join`; this file does it.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use libp2p_identity::PeerId;
use skep_kernel::{Deadline, Moment, panics::contain_future};
use skep_rpc::{RpcError, Step};
use skep_wire::{ExpertUid, HostTensor, TensorError};
use tracing::{debug, warn};

use crate::{
    BackwardGather, Gather, GridScores, MoeError,
    beam::Candidate,
    gather::{self, Layout},
    hive::{Errand, Hive},
    join::{Join, JoinPolicy, Joined, Progress},
    plan::{Choice, Place, Plan, Slot},
};

/// Failures that an error's text names.
const NAMED_FAILURES: usize = 3;

/// See [`Mixture::forward`](crate::Mixture::forward).
pub(crate) async fn forward(hive: Arc<Hive>, inputs: Vec<HostTensor>, scores: GridScores) -> Result<Gather, MoeError> {
    let started = hive.now();
    let deadline = Deadline::after(started, hive.config.forward_timeout);
    scores.check(&hive.grid.sizes).map_err(MoeError::Invalid)?;
    check_rows(&hive, &inputs, scores.rows, "input")?;

    let scores = Arc::new(scores);
    let rows: Vec<usize> = (0..scores.rows).collect();
    let k = hive.config.k_best;
    let found = hive.search(&scores, &rows, k, &BTreeSet::new(), deadline).await?;
    let choices = found.into_iter().enumerate().flat_map(|(row, candidates)| {
        let places = candidates.into_iter().enumerate();
        places.map(move |(rank, candidate)| Choice::new(Place { row, rank }, candidate))
    });
    let mut plan = Plan::new(rows.len(), k);
    plan.add(choices);

    let now = hive.now();
    let policy = JoinPolicy {
        k_min: hive.config.k_min,
        deadline,
        timeout_after_k_min: hive.config.timeout_after_k_min,
        replan_at: Some(now + deadline.remaining(now) / 2),
        needs_every_row: !hive.config.allow_zero_outputs,
    };
    let run = FanOut::new(&hive, plan, policy, inputs, Tensors::Forward { scores });
    let (plan, mut joined, layout) = run.finish().await?;
    let failures = failures(&hive, &plan, &mut joined, deadline, started);
    if !joined.short.is_empty() && !hive.config.allow_zero_outputs {
        return Err(too_few(&hive, &plan, joined.short, hive.config.k_min, &failures));
    }
    let Some(layout) = layout.or_else(|| hive.last_layout()) else {
        // Zeros of which shape? No expert of this mixture has answered yet.
        return Err(too_few(&hive, &plan, rows, hive.config.k_min, &failures));
    };
    for &row in &joined.short {
        joined.winners[row * k..(row + 1) * k].fill(None);
    }
    Ok(Gather {
        chosen: gather::chosen(&plan, &joined),
        mask: joined.winners.iter().map(Option::is_some).collect(),
        outputs: gather::outputs(&plan, &layout, &joined).map_err(invalid)?,
        failures,
    })
}

/// See [`Mixture::backward`](crate::Mixture::backward).
pub(crate) fn backward(
    hive: Arc<Hive>,
    gather: &Gather,
    inputs: Vec<HostTensor>,
    grad_outputs: Vec<HostTensor>,
) -> Result<impl Future<Output = Result<BackwardGather, MoeError>> + Send + use<>, MoeError> {
    let (rows, k) = (gather.chosen.len(), hive.config.k_best);
    check_rows(&hive, &inputs, rows, "input")?;
    check_rows(&hive, &grad_outputs, rows, "output gradient")?;
    if let Some(odd) = grad_outputs.iter().find(|gradient| gradient.shape().get(1) != Some(&k)) {
        return Err(MoeError::Invalid(format!("output gradients need shape [{rows}, {k}, …], got {:?}", odd.shape())));
    }
    let mut plan = Plan::new(rows, k);
    plan.add(answered(gather, k)?);
    Ok(async move {
        let started = hive.now();
        let deadline = Deadline::after(started, hive.config.backward_timeout);
        let policy = JoinPolicy {
            k_min: hive.config.backward_k_min,
            deadline,
            timeout_after_k_min: hive.config.timeout_after_k_min,
            replan_at: None,
            needs_every_row: false,
        };
        let run = FanOut::new(&hive, plan, policy, inputs.clone(), Tensors::Backward { grad_outputs });
        let (plan, mut joined, _) = run.finish().await?;
        let failures = failures(&hive, &plan, &mut joined, deadline, started);
        let asked: BTreeSet<usize> = plan.calls().iter().flat_map(|call| &call.places).map(|place| place.row).collect();
        let short: Vec<usize> = joined.short.iter().copied().filter(|row| asked.contains(row)).collect();
        if !asked.is_empty() && short.len() == asked.len() {
            return Err(too_few(&hive, &plan, short, hive.config.backward_k_min, &failures));
        }
        Ok(BackwardGather {
            grad_inputs: gather::sum_gradients(&inputs, &plan, &joined).map_err(invalid)?,
            mask: joined.winners.iter().map(Option::is_some).collect(),
            failures,
        })
    })
}

/// The experts that answered in forward, on their places.
fn answered(gather: &Gather, k: usize) -> Result<Vec<Choice>, MoeError> {
    if gather.mask.len() != gather.chosen.len() * k {
        return Err(MoeError::Invalid(format!("a gather of {} places is not this mixture's", gather.mask.len())));
    }
    let mut choices = Vec::new();
    for (row, mask) in gather.mask.chunks(k).enumerate() {
        for rank in (0..k).filter(|&rank| mask[rank]) {
            let Some(chosen) = gather.chosen[row].get(rank) else {
                return Err(MoeError::Invalid(format!("row {row} has no expert on place {rank}")));
            };
            let crate::Chosen { uid, peer, coordinates } = chosen.clone();
            choices.push(Choice { place: Place { row, rank }, uid, peer, coordinates });
        }
    }
    Ok(choices)
}

fn check_rows(hive: &Hive, tensors: &[HostTensor], rows: usize, what: &str) -> Result<(), MoeError> {
    if rows == 0 || tensors.is_empty() {
        return Err(MoeError::Invalid(format!("a batch needs at least one row and one {what}")));
    }
    for (index, tensor) in tensors.iter().enumerate() {
        if tensor.rows() != rows {
            let shape = tensor.shape();
            return Err(MoeError::Invalid(format!("{what} {index} needs {rows} rows, got shape {shape:?}")));
        }
        if hive.config.detect_anomalies && !tensor.is_finite() {
            return Err(MoeError::Invalid(format!("{what} {index} is not finite")));
        }
    }
    Ok(())
}

fn invalid(error: TensorError) -> MoeError {
    MoeError::Invalid(error.to_string())
}

/// What failed, calls that outlived the deadline included.
fn failures(
    hive: &Hive,
    plan: &Plan,
    joined: &mut Joined<Vec<HostTensor>>,
    deadline: Deadline,
    started: Moment,
) -> Vec<(ExpertUid, RpcError)> {
    let mut failures = std::mem::take(&mut joined.failures);
    if deadline.has_passed(hive.now()) {
        for slot in std::mem::take(&mut joined.unanswered) {
            let peer = plan.call(slot).peer;
            hive.was_late(peer);
            failures
                .push((slot, RpcError::Deadline { peer, step: Step::Exchange, waited: deadline.moment() - started }));
        }
    }
    failures.into_iter().map(|(slot, error)| (plan.call(slot).uid.clone(), error)).collect()
}

fn too_few(hive: &Hive, plan: &Plan, rows: Vec<usize>, k_min: usize, failures: &[(ExpertUid, RpcError)]) -> MoeError {
    let mut tried = match plan.calls().len() {
        0 => format!("no expert was found under {}", hive.grid.prefix),
        calls => format!("{} of {calls} calls failed", failures.len()),
    };
    for (index, (uid, error)) in failures.iter().take(NAMED_FAILURES).enumerate() {
        tried += &format!("{} {uid}: {error}", if index == 0 { ":" } else { ";" });
    }
    if failures.len() > NAMED_FAILURES {
        tried += "; …";
    }
    MoeError::TooFewAnswers { rows, k_min, tried }
}

/// Whether a failure is the peer's, so that its other experts fail likewise.
fn is_of_peer(error: &RpcError) -> bool {
    matches!(error, RpcError::Unreachable { .. } | RpcError::Refused { .. } | RpcError::Deadline { .. })
}

/// What a pass needs beside the inputs.
enum Tensors {
    Forward { scores: Arc<GridScores> },
    Backward { grad_outputs: Vec<HostTensor> },
}

/// What a pass waits for.
enum Event {
    Answered(Slot, Result<Vec<HostTensor>, RpcError>),
    Found(Vec<usize>, Vec<Vec<Candidate>>),
}

/// A pass under way.
struct FanOut<'a> {
    hive: &'a Arc<Hive>,
    plan: Plan,
    join: Join<Vec<HostTensor>>,
    deadline: Deadline,
    inputs: Vec<HostTensor>,
    tensors: Tensors,
    events: FuturesUnordered<BoxFuture<'static, Event>>,
    /// Forward: what the first expert answered; the others must do alike, since they share a tensor.
    layout: Option<Layout>,
}

impl<'a> FanOut<'a> {
    fn new(hive: &'a Arc<Hive>, plan: Plan, policy: JoinPolicy, inputs: Vec<HostTensor>, tensors: Tensors) -> Self {
        let (join, events) = (Join::new(&plan, policy), FuturesUnordered::new());
        Self { hive, plan, join, deadline: policy.deadline, inputs, tensors, events, layout: None }
    }

    /// Makes the planned calls and waits until they are joined.
    async fn finish(mut self) -> Result<(Plan, Joined<Vec<HostTensor>>, Option<Layout>), MoeError> {
        for slot in 0..self.plan.calls().len() {
            self.call(Slot(slot))?;
        }
        let mut progress = self.join.on_time(self.hive.now());
        loop {
            match progress {
                Progress::Done => break,
                Progress::Replan { rows } => {
                    self.search_again(rows);
                    progress = self.join.on_time(self.hive.now());
                }
                Progress::Waiting { until } => {
                    let event = tokio::select! {
                        biased;
                        Some(event) = self.events.next() => Some(event),
                        () = self.hive.client.clock.sleep_until(until) => None,
                    };
                    progress = self.on_event(event)?;
                }
            }
        }
        if let Some(layout) = &self.layout {
            self.hive.remember_layout(layout);
        }
        Ok((self.plan, self.join.finish(), self.layout))
    }

    fn on_event(&mut self, event: Option<Event>) -> Result<Progress, MoeError> {
        let now = self.hive.now();
        match event {
            None => Ok(self.join.on_time(now)),
            Some(Event::Answered(slot, outcome)) => {
                let outcome = outcome.and_then(|outputs| self.check_layout(slot, outputs));
                if let Err(error) = &outcome {
                    let uid = &self.plan.call(slot).uid;
                    debug!(%uid, %error, "expert gave no answer");
                }
                Ok(self.join.on_reply(now, slot, outcome))
            }
            Some(Event::Found(rows, candidates)) => {
                for slot in self.replace(&rows, candidates) {
                    self.call(slot)?;
                }
                self.join.extend(&self.plan, &rows);
                Ok(self.join.on_time(now))
            }
        }
    }

    fn check_layout(&mut self, slot: Slot, outputs: Vec<HostTensor>) -> Result<Vec<HostTensor>, RpcError> {
        if matches!(self.tensors, Tensors::Backward { .. }) {
            return Ok(outputs);
        }
        let got = Layout::of(&outputs);
        let usual = self.layout.get_or_insert_with(|| got.clone());
        if *usual == got {
            return Ok(outputs);
        }
        let reason = format!("outputs are {got}, those of the first expert to answer {usual}");
        Err(RpcError::Malformed { peer: self.plan.call(slot).peer, reason })
    }

    fn call(&mut self, slot: Slot) -> Result<(), MoeError> {
        let call = self.plan.call(slot);
        let inputs = self.inputs.iter().map(|input| gather::rows_at(input, &call.places));
        let inputs = inputs.collect::<Result<_, _>>().map_err(invalid)?;
        let grad_outputs = match &self.tensors {
            Tensors::Forward { .. } => None,
            Tensors::Backward { grad_outputs } => {
                let rows = grad_outputs.iter().map(|g| gather::gradients_at(g, self.plan.k, &call.places));
                Some(rows.collect::<Result<_, _>>().map_err(invalid)?)
            }
        };
        let errand = Errand { uid: call.uid.clone(), peer: call.peer, inputs, grad_outputs };
        let (hive, deadline) = (self.hive.clone(), self.deadline);
        let peer = errand.peer;
        self.events.push(Box::pin(async move {
            // A panic must not cost the answers of the other experts.
            let asked = contain_future(hive.ask(errand, deadline)).await;
            let panicked = |panic| Err(RpcError::Malformed { peer, reason: format!("reading it panicked: {panic}") });
            Event::Answered(slot, asked.unwrap_or_else(panicked))
        }));
        Ok(())
    }

    /// Looks for other experts than those that failed, at other peers than those that are gone or late.
    fn search_again(&mut self, rows: Vec<usize>) {
        let Tensors::Forward { scores } = &self.tensors else {
            return self.join.extend(&self.plan, &rows);
        };
        let unreachable = self.join.failures().iter().filter(|(_, error)| is_of_peer(error)).map(|(slot, _)| *slot);
        let unreliable = unreachable.chain(self.join.late(self.hive.now()));
        let avoid: BTreeSet<PeerId> = unreliable.map(|slot| self.plan.call(slot).peer).collect();
        let (hive, scores, deadline) = (self.hive.clone(), scores.clone(), self.deadline);
        // Twice as many as a row has places: some of the best were asked before.
        let k = 2 * self.plan.k;
        self.events.push(Box::pin(async move {
            let found = hive.search(&scores, &rows, k, &avoid, deadline).await.unwrap_or_else(|error| {
                warn!(%error, "no search for other experts");
                vec![Vec::new(); rows.len()]
            });
            Event::Found(rows, found)
        }));
    }

    /// Puts experts that a row was not planned for on its vacant places.
    fn replace(&mut self, rows: &[usize], candidates: Vec<Vec<Candidate>>) -> Vec<Slot> {
        let asked = self.plan.asked(rows);
        let mut choices = Vec::new();
        for (&row, candidates) in rows.iter().zip(candidates) {
            let fresh = candidates.into_iter().filter(|candidate| !asked[&row].contains(&candidate.uid));
            let places = self.join.vacant(row).into_iter().map(|rank| Place { row, rank });
            choices.extend(places.zip(fresh).map(|(place, candidate)| Choice::new(place, candidate)));
        }
        self.plan.add(choices)
    }
}
