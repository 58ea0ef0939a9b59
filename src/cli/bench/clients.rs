//! Client processes: how their calls travel, how callers are shared out, and what all of them measured.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{
    caller::{Called, Calls},
    latency::{Latencies, Summary},
    machine::Usage,
    progress::Progress,
    worker::{Crew, Job},
};
use crate::{RuntimeBuilder, error::Error};

/// How calls travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// What encrypts them.
    pub security: Security,
    /// Whose protocol they use.
    pub wire: Wire,
}

/// What encrypts connections. There is no transport without encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// TLS 1.3, AES-GCM where the processor has instructions for it
    Tls,
    /// Noise with ChaCha20, as hivemind uses it
    Noise,
}

/// Whose protocol calls use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    /// skep's own
    Native,
    /// hivemind's
    Hivemind,
}

impl Way {
    /// Tells a client's runtime.
    pub fn set(self, mut builder: RuntimeBuilder) -> RuntimeBuilder {
        let net = builder.net_config();
        net.tls = self.security == Security::Tls;
        net.native = self.wire == Wire::Native;
        builder
    }
}

/// What all clients measured.
pub struct Measured {
    /// Answered and failed calls, and the rate.
    pub called: Called,
    /// How long calls took.
    pub latency: Summary,
    /// What the client processes used meanwhile.
    pub usage: Usage,
}

/// Starts `processes` client processes that share `clients` callers, each with `in_flight` calls at once; `server` is
/// asked for its use before and after.
pub fn measure<U>(
    calls: &Calls,
    clients: usize,
    processes: usize,
    progress: &Progress,
    mut server: impl FnMut() -> U,
) -> Result<(Measured, U, U), Error> {
    let processes = processes.clamp(1, clients);
    let share = |number: usize| clients / processes + usize::from(number < clients % processes);
    let jobs = (0..processes).map(|number| {
        let mut calls = calls.clone();
        let uids = calls.uids.len();
        // Clients begin with different experts.
        calls.uids.rotate_left(number % uids.max(1));
        calls.at_once *= share(number);
        Job::Call(calls)
    });
    let mut crew = Crew::prepare("client", jobs)?;
    let before = server();
    let results: Vec<(Called, Usage)> = crew.go(progress)?;
    let after = server();
    let (mut all, mut latencies, mut usage) = (Called::default(), Latencies::default(), Usage::default());
    for (called, used) in results {
        latencies.add(&called.latency);
        usage = usage.plus(used);
        all.calls += called.calls;
        all.failed += called.failed;
        all.rate += called.rate;
        all.failure = all.failure.take().or(called.failure);
    }
    if all.calls == 0 {
        let why = all.failure.unwrap_or_else(|| "none was answered in time".to_owned());
        return Err(Error::Invalid(format!("no call succeeded: {why}")));
    }
    Ok((Measured { called: all, latency: latencies.summary(), usage }, before, after))
}
