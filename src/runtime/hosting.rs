//! From groups of experts to a server: chooses uids in the network, then builds and announces.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use skep_dht::Dht;
use skep_expert::{
    Executors, ExpertPattern, HostedExpert, PlacementError, Server, ServerParts, Streams, TakePlaces, choose_uids,
};
use skep_kernel::{Deadline, SharedClock, Signal};
use skep_wire::ExpertUid;
use tracing::warn;

use super::{Experts, experts::Uids};

/// How far hosting has come.
#[derive(Clone)]
pub(crate) enum Hosting {
    /// There is nothing to host.
    Nothing,
    /// Waits for the network to choose uids; what it last ran into.
    Choosing(Option<String>),
    /// A server builds, serves and announces.
    Running(Server),
    /// It cannot work.
    Failed(String),
}

/// One attempt to join the network and look for free uids.
const ATTEMPT: Duration = Duration::from_secs(30);
/// Numbers tried for each expert that is only counted, as in hivemind.
const NUMBERS_PER_EXPERT: usize = 10;
/// Between attempts; the DHT actor has its own backoff while it joins.
const PAUSE: Duration = Duration::from_secs(1);

/// Hosts the groups, those of `kept` first; tries for ever while the network is out of reach.
pub(crate) async fn host(parts: ServerParts, groups: Vec<Experts>, kept: Vec<ExpertUid>, hosting: Signal<Hosting>) {
    let dht = parts.dht.clone().expect("a hosting runtime has a DHT node");
    let chosen = loop {
        match choose(&dht, &parts.clock, parts.seed, &groups, &kept).await {
            Ok(chosen) => break chosen,
            Err(PlacementError::Dht(error)) => {
                warn!(%error, "cannot choose uids yet");
                hosting.set(Hosting::Choosing(Some(error.to_string())));
                parts.clock.sleep_until(parts.clock.now() + PAUSE).await;
            }
            Err(error) => {
                hosting.set(Hosting::Failed(error.to_string()));
                return;
            }
        }
    };
    let executors = executors(&groups, &chosen, parts.config.executors);
    let server = experts(&groups, chosen)
        .and_then(|experts| Server::with_executors(parts, experts, executors).map_err(|error| error.to_string()));
    hosting.set(match server {
        Ok(server) => Hosting::Running(server),
        Err(error) => Hosting::Failed(error),
    });
}

/// The uids of each group.
async fn choose(
    dht: &Dht,
    clock: &SharedClock,
    seed: u64,
    groups: &[Experts],
    kept: &[ExpertUid],
) -> Result<Vec<Vec<ExpertUid>>, PlacementError> {
    let deadline = Deadline::after(clock.now(), ATTEMPT);
    dht.joined(deadline).await?;
    let mut kept: BTreeSet<&ExpertUid> = kept.iter().collect();
    for group in groups {
        if let Uids::Listed(uids) = &group.uids {
            uids.iter().for_each(|uid| _ = kept.remove(uid));
        }
    }
    let mut chosen = Vec::with_capacity(groups.len());
    for group in groups {
        chosen.push(match &group.uids {
            Uids::Listed(uids) => uids.clone(),
            Uids::Pattern(text) => {
                let pattern: ExpertPattern = text.parse()?;
                let all = usize::try_from(pattern.places()).unwrap_or(usize::MAX);
                let ours: Vec<ExpertUid> = kept.extract_if(.., |uid| pattern.names(uid)).cloned().collect();
                let count = group.count.unwrap_or(all);
                choose_uids(&pattern, &ours, count, Some(dht), TakePlaces::AtRandom(seed), deadline).await?
            }
            Uids::Numbered(count) => {
                let tried = count.saturating_mul(NUMBERS_PER_EXPERT);
                let pattern: ExpertPattern = format!("expert.[0:{tried}]").parse()?;
                let ours: Vec<ExpertUid> = kept.extract_if(.., |uid| pattern.names(uid)).cloned().collect();
                choose_uids(&pattern, &ours, *count, Some(dht), TakePlaces::InOrder, deadline).await?
            }
            Uids::Kept => Vec::new(),
        });
    }
    // What no other group takes.
    if let Some(rest) = groups.iter().position(|group| group.uids == Uids::Kept) {
        chosen[rest] = kept.into_iter().cloned().collect();
    }
    Ok(chosen)
}

/// Who runs which expert: threads of the CPU, and the streams of devices for groups that are on one.
fn executors(groups: &[Experts], chosen: &[Vec<ExpertUid>], executors: usize) -> Executors {
    let mut placed: BTreeMap<ExpertUid, Streams> = BTreeMap::new();
    for (group, uids) in groups.iter().zip(chosen) {
        if let Some(streams) = group.streams(executors) {
            placed.extend(uids.iter().map(|uid| (uid.clone(), streams.clone())));
        }
    }
    match placed.is_empty() {
        true => Executors::Threads,
        false => Executors::Placed { place: Box::new(move |uid| placed.get(uid).cloned()) },
    }
}

fn experts(groups: &[Experts], chosen: Vec<Vec<ExpertUid>>) -> Result<Vec<HostedExpert>, String> {
    if chosen.iter().all(Vec::is_empty) {
        return Err("there are no checkpoints to continue from, and nothing else says which experts to host".to_owned());
    }
    let mut experts = Vec::new();
    for (group, uids) in groups.iter().zip(chosen) {
        for uid in uids {
            let factory = group.factory(&uid).ok_or_else(|| {
                format!("nothing says what expert {uid} is made of: call .module(…) or .backend(…) on its Experts")
            })?;
            experts.push(HostedExpert { uid, factory });
        }
    }
    Ok(experts)
}
