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

/// Client processes that are connected and have tried every expert.
pub struct Clients {
    crew: Crew,
    rounds: usize,
    called: Called,
    latencies: Latencies,
    usage: Usage,
}

/// What all clients measured.
pub struct Measured {
    /// Answered and failed calls, and the mean rate of the rounds.
    pub called: Called,
    /// How long calls took.
    pub latency: Summary,
    /// What the client processes used meanwhile.
    pub usage: Usage,
}

impl Clients {
    /// Starts `processes` client processes that share `clients` callers, each with `calls.at_once` calls at once.
    pub fn prepare(calls: &Calls, clients: usize, processes: usize) -> Result<Self, Error> {
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
        Ok(Self {
            crew: Crew::prepare("client", jobs)?,
            rounds: 0,
            called: Called::default(),
            latencies: Latencies::default(),
            usage: Usage::default(),
        })
    }

    /// A round of calls; gives its rate.
    pub fn round(&mut self, progress: &Progress) -> Result<f64, Error> {
        let results: Vec<(Called, Usage)> = self.crew.go(progress)?;
        let (before, mut used_now) = (self.called.rate, Usage::default());
        for (called, used) in results {
            self.latencies.add(&called.latency);
            used_now = used_now.plus(used);
            self.called.add(called);
        }
        self.usage = self.usage.and_then(used_now);
        self.rounds += 1;
        Ok(self.called.rate - before)
    }

    /// All rounds together.
    pub fn measured(self) -> Result<Measured, Error> {
        let Self { rounds, mut called, latencies, usage, crew: _ } = self;
        if called.calls == 0 {
            let why = called.failure.unwrap_or_else(|| "none was answered in time".to_owned());
            return Err(Error::Invalid(format!("no call succeeded: {why}")));
        }
        called.rate /= rounds as f64;
        Ok(Measured { called, latency: latencies.summary(), usage })
    }
}
