//! [`Link`]: the way from one peer to another, and what happens to messages on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use libp2p_identity::PeerId;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use skep_kernel::Moment;

use crate::{Latency, SimNetwork};

/// One direction: who sends, who receives.
pub(crate) type Way = (PeerId, PeerId);

/// What is set for one way; what is `None` is as for the whole network.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    pub latency: Option<Latency>,
    pub jitter: Option<Duration>,
    pub loss: Option<f64>,
    pub duplication: Option<f64>,
    pub reordering: Option<(f64, Duration)>,
    pub bandwidth: Option<u64>,
    pub refusal: Option<f64>,
    pub reset: Option<f64>,
    pub silence: Option<f64>,
}

/// All ways of a network.
#[derive(Default)]
pub(crate) struct Ways {
    pub all: Overrides,
    pub single: BTreeMap<Way, Overrides>,
    pub cut: BTreeSet<Way>,
    pub held: BTreeSet<Way>,
    /// Until when a way is busy with what was sent before.
    busy: BTreeMap<Way, Moment>,
}

/// What happens to one message.
pub(crate) enum Fate {
    Lost,
    Arrives(Duration),
}

impl Ways {
    fn setting<T>(&self, way: Way, read: impl Fn(&Overrides) -> Option<T>) -> Option<T> {
        self.single.get(&way).and_then(&read).or_else(|| read(&self.all))
    }

    /// Draws whether something with this probability happens. Nothing is drawn for what cannot happen.
    pub fn chance(&self, way: Way, random: &mut ChaCha8Rng, read: impl Fn(&Overrides) -> Option<f64>) -> bool {
        let probability = self.setting(way, read).unwrap_or(0.0);
        probability > 0.0 && random.random_bool(probability.min(1.0))
    }

    /// Draws one message's fate.
    pub fn send(&mut self, way: Way, bytes: usize, now: Moment, random: &mut ChaCha8Rng) -> Fate {
        let lost = self.chance(way, random, |link| link.loss);
        let mut delay = self.setting(way, |link| link.latency.clone()).map_or(Duration::ZERO, |l| l.draw(random));
        if let Some(jitter) = self.setting(way, |link| link.jitter).filter(|jitter| !jitter.is_zero()) {
            delay += random.random_range(Duration::ZERO..=jitter);
        }
        if let Some((probability, by)) = self.setting(way, |link| link.reordering)
            && probability > 0.0
            && random.random_bool(probability.min(1.0))
        {
            delay += random.random_range(Duration::ZERO..=by);
        }
        if let Some(rate) = self.setting(way, |link| link.bandwidth) {
            let sending = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            let sent = self.busy.get(&way).copied().unwrap_or(now).max(now) + sending;
            self.busy.insert(way, sent);
            delay += sent.since(now);
        }
        if lost || self.cut.contains(&way) { Fate::Lost } else { Fate::Arrives(delay) }
    }
}

/// Settings of the ways between two peers, from [`SimNetwork::link`]; they count for messages sent from now on and win
/// over those of the whole network.
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{Latency, Sim};
///
/// Sim::with_seed(1).run(|sim| async move {
///     let (a, b) = (sim.dht_node(&[]), sim.dht_node(&[]));
///     sim.network().link(a.peer(), b.peer()).latency(Latency::constant(Duration::from_millis(200))).loss(0.1);
///     sim.network().one_way(a.peer(), b.peer()).bandwidth(1_000_000);
/// });
/// ```
#[derive(Clone, Copy)]
pub struct Link<'a> {
    pub(crate) network: &'a SimNetwork,
    pub(crate) from: PeerId,
    pub(crate) to: PeerId,
    pub(crate) both: bool,
}

impl Link<'_> {
    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![(self.from, self.to)];
        ways.extend(self.both.then_some((self.to, self.from)));
        ways
    }

    fn set(self, change: impl Fn(&mut Overrides)) -> Self {
        self.network
            .on_ways(|ways| self.ways().into_iter().for_each(|way| change(ways.single.entry(way).or_default())));
        self
    }

    /// Time that messages take.
    pub fn latency(self, latency: Latency) -> Self {
        self.set(|link| link.latency = Some(latency.clone()))
    }

    /// Up to so much time more, equally distributed.
    pub fn jitter(self, jitter: Duration) -> Self {
        self.set(|link| link.jitter = Some(jitter))
    }

    /// Share of messages that get lost.
    pub fn loss(self, probability: f64) -> Self {
        self.set(|link| link.loss = Some(probability))
    }

    /// Share of calls that arrive twice, as by a caller's retry: same request id, same deadline.
    pub fn duplication(self, probability: f64) -> Self {
        self.set(|link| link.duplication = Some(probability))
    }

    /// Share of messages that are held up by up to `by`, so that later ones overtake them.
    pub fn reordering(self, probability: f64, by: Duration) -> Self {
        self.set(|link| link.reordering = Some((probability, by)))
    }

    /// Bytes a second; messages wait for those sent before. Headers count nothing.
    pub fn bandwidth(self, bytes_per_second: u64) -> Self {
        self.set(|link| link.bandwidth = Some(bytes_per_second))
    }

    /// Share of calls that are refused before they begin.
    pub fn refusal(self, probability: f64) -> Self {
        self.set(|link| link.refusal = Some(probability))
    }

    /// Share of calls whose connection breaks in the middle of the answer: they were served.
    pub fn reset(self, probability: f64) -> Self {
        self.set(|link| link.reset = Some(probability))
    }

    /// Share of calls that are served and never answered.
    pub fn silence(self, probability: f64) -> Self {
        self.set(|link| link.silence = Some(probability))
    }

    /// From now on nothing arrives, what is under way included; callers see their deadline.
    pub fn cut(self) -> Self {
        self.network.on_ways(|ways| ways.cut.extend(self.ways()));
        self
    }

    /// Ends a [`cut`](Self::cut) or [`SimNetwork::partition`] on these ways.
    pub fn mend(self) -> Self {
        self.network.on_ways(|ways| ways.cut.retain(|way| !self.ways().contains(way)));
        self
    }

    /// Messages wait from now on, those under way included, until [`release`](Self::release).
    pub fn hold(self) -> Self {
        self.network.on_ways(|ways| ways.held.extend(self.ways()));
        self
    }

    /// Lets messages go that [`hold`](Self::hold) stopped.
    pub fn release(self) -> Self {
        self.network.on_ways(|ways| ways.held.retain(|way| !self.ways().contains(way)));
        self
    }
}
