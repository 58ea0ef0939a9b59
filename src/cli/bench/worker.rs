//! The processes of a benchmark beside servers: each gets a job, says when it is prepared, does a round of it at each
//! word, tells that round's result, and goes when the benchmark does.

use std::{
    io::Write,
    sync::mpsc::sync_channel,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{caller, dht, limit, machine::Usage, mixture, moe, process, process::Process, progress::Progress, startup};
use crate::error::Error;

const READY: &str = "ready";
const GO: &str = "go";
/// How long a worker may prepare itself.
const PREPARES: Duration = Duration::from_secs(120);
/// How much longer than it should a worker may take: calls that it began end by their own deadline.
const FINISHES: Duration = Duration::from_secs(600);

/// What a worker is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// Call experts.
    Call(caller::Calls),
    /// Compute the same without a network.
    Compute(limit::Computation),
    /// Make experts without a server.
    Make(startup::Making),
    /// Train through a mixture.
    Mix(moe::Mix),
    /// Train the same without a network.
    MixAlone(moe::Mix),
    /// Run DHT nodes.
    Dht(dht::Dht),
}

/// The words for a worker.
pub struct Start(std::sync::mpsc::Receiver<String>);

impl Start {
    /// Says that all is prepared; does a round at each word, and tells what it gave.
    pub fn rounds<R: Serialize>(&self, mut round: impl FnMut() -> Result<R, Error>) -> Result<(), Error> {
        say(READY)?;
        // The process ends when the other end is gone.
        while self.0.recv().is_ok() {
            say(&json(&round()?))?;
        }
        Ok(())
    }
}

fn say(line: &str) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    let said = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    said.map_err(|source| Error::System { what: "cannot write to stdout".to_owned(), source })
}

/// The life of a worker.
pub fn work() -> Result<(), Error> {
    let system = |source| Error::System { what: "cannot watch stdin".to_owned(), source };
    let (told, lines) = sync_channel(4);
    process::end_with_stdin(move |line| drop(told.send(line))).map_err(system)?;
    let Ok(job) = lines.recv() else { return Ok(()) };
    let job = serde_json::from_str(&job).map_err(|error| Error::Invalid(format!("no job: {error}")))?;
    let start = Start(lines);
    match job {
        Job::Call(calls) => caller::run(calls, &start),
        Job::Compute(computation) => limit::run(&computation, &start),
        Job::Make(making) => startup::make(&making, &start),
        Job::Mix(mix) => moe::run(&mix, &start),
        Job::MixAlone(mix) => mixture::run(&mix, &start),
        Job::Dht(nodes) => start.rounds(|| dht::run(&nodes)),
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers, texts and lists")
}

/// Workers that do their jobs at the same time.
pub struct Crew(Vec<(Process, Usage)>);

impl Crew {
    /// Starts one worker for each job and waits until all are prepared.
    pub fn prepare(name: &str, jobs: impl IntoIterator<Item = Job>) -> Result<Self, Error> {
        let mut crew = Vec::new();
        for (number, job) in jobs.into_iter().enumerate() {
            let mut process = Process::start(format!("{name} {number}"), &["bench", "worker"], &[])?;
            process.tell(&json(&job))?;
            crew.push((process, Usage::default()));
        }
        let until = Instant::now() + PREPARES;
        for (process, _) in &crew {
            let line = process.line(until.saturating_duration_since(Instant::now()))?;
            if line != READY {
                return Err(Error::Invalid(format!("{name} said {line:?} instead of {READY:?}")));
            }
        }
        Ok(Self(crew))
    }

    /// A round of all of them; their results in the order of the jobs, with what they used for it.
    pub fn go<R: DeserializeOwned>(&mut self, progress: &Progress) -> Result<Vec<(R, Usage)>, Error> {
        for (process, used) in &mut self.0 {
            *used = process.usage().unwrap_or_default();
            process.tell(GO)?;
        }
        let started = Instant::now();
        let mut results = Vec::new();
        for (process, before) in &self.0 {
            let line = loop {
                if let Some(line) = process.poll_line(Duration::from_millis(100))? {
                    break line;
                }
                progress.passed(started.elapsed());
                if started.elapsed() > FINISHES {
                    return Err(Error::Invalid(format!("a worker did not finish within {FINISHES:?}")));
                }
            };
            let result = serde_json::from_str(&line).map_err(|error| Error::Invalid(format!("{error}: {line}")))?;
            results.push((result, process.usage().unwrap_or_default().since(*before)));
        }
        Ok(results)
    }
}
