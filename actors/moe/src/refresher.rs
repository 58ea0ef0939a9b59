//! Reads the prefixes that a mixture uses again before they are too old, so that its searches wait for no DHT. Runs while
//! there is something to do: it ends when nothing was used since it was last read, and when the mixture is gone.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use skep_dht::{DhtError, Freshness, ListedSuccessors};
use skep_kernel::Moment;
use skep_wire::ExpertPrefix;
use tokio::sync::Notify;
use tracing::debug;

use crate::{
    Client,
    cache::Due,
    hive::{Hive, look_up},
};

/// Lookups under way at once, and prefixes in each.
const LOOKUPS: usize = 4;
const PREFIXES: usize = 64;
/// How long a lookup may take.
const PATIENCE: Duration = Duration::from_secs(15);

type Found = Result<BTreeMap<ExpertPrefix, ListedSuccessors>, DhtError>;

/// Starts it for a mixture; `false` when the runtime has stopped. It looks again at every `news`, also at that of the
/// mixture's end.
pub(crate) fn start(hive: &Arc<Hive>, news: Arc<Notify>) -> bool {
    hive.client.spawner.spawn(run(Arc::downgrade(hive), hive.client.clone(), news))
}

async fn run(hive: Weak<Hive>, client: Client, news: Arc<Notify>) {
    let mut lookups: FuturesUnordered<BoxFuture<'static, Found>> = FuturesUnordered::new();
    loop {
        let Some(due) = next(&hive, &lookups) else { return };
        let alarm = match due {
            Due::Now(prefixes) => {
                lookups.push(read(client.clone(), prefixes).boxed());
                continue;
            }
            // Whoever comes back makes room.
            Due::At(_) if lookups.len() >= LOOKUPS => None,
            Due::At(at) => Some(at),
            Due::Nothing if lookups.is_empty() => return,
            Due::Nothing => None,
        };
        tokio::select! {
            biased;
            () = news.notified() => {}
            Some(found) = lookups.next() => take_in(&hive, found),
            () = sleep(&client, alarm) => {}
        }
    }
}

fn next(hive: &Weak<Hive>, lookups: &FuturesUnordered<BoxFuture<'static, Found>>) -> Option<Due> {
    let limit = if lookups.len() < LOOKUPS { PREFIXES } else { 0 };
    Some(hive.upgrade()?.take_due(limit, !lookups.is_empty()))
}

/// Past all caches: they may hold a dictionary in which a living expert's entry has expired.
async fn read(client: Client, prefixes: Vec<ExpertPrefix>) -> Found {
    let deadline = client.deadline(PATIENCE);
    look_up(&client, prefixes, Freshness::Latest, deadline).await
}

fn take_in(hive: &Weak<Hive>, found: Found) {
    match (hive.upgrade(), found) {
        (Some(hive), Ok(found)) => hive.remember(found),
        (Some(hive), Err(error)) => debug!(prefix = %hive.grid.prefix, %error, "experts are not read again yet"),
        (None, _) => {}
    }
}

async fn sleep(client: &Client, alarm: Option<Moment>) {
    match alarm {
        Some(at) => client.clock.sleep_until(at).await,
        None => std::future::pending().await,
    }
}
