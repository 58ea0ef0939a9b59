//! A process of this binary that ends with us: its stdin is a pipe, and it goes when the pipe closes, however that comes.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::machine::Usage;
use crate::error::Error;

/// Lines of stdout that may wait for us; more and the process waits.
const LINES: usize = 64;
/// Lines of a log that are kept for an error.
const LOG_LINES: usize = 30;

/// A child process, killed when this is dropped.
pub struct Process {
    name: String,
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    log: Arc<Log>,
    started: Instant,
}

/// The last lines that a process wrote to stderr.
#[derive(Default)]
struct Log {
    lines: Mutex<VecDeque<String>>,
    more: Condvar,
}

impl Process {
    /// Starts `skep ARGS…` with these variables; settings of ours in the environment are not passed on.
    pub fn start(name: impl Into<String>, args: &[&str], variables: &[(&str, &str)]) -> Result<Self, Error> {
        let name = name.into();
        let failed = |source| Error::System { what: format!("cannot start {name}"), source };
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        let ours = |name: &std::ffi::OsStr| name == "RUST_LOG" || name.to_string_lossy().starts_with("SKEP_");
        for (variable, _) in std::env::vars_os().filter(|(variable, _)| ours(variable)) {
            command.env_remove(variable);
        }
        command.args(args).envs(variables.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().map_err(failed)?;
        let stdin = child.stdin.take().expect("stdin is piped");
        let (stdout, stderr) =
            (child.stdout.take().expect("stdout is piped"), child.stderr.take().expect("it is piped"));
        let (sender, lines) = sync_channel(LINES);
        read_lines("bench-stdout", stdout, move |line| sender.send(line).is_ok()).map_err(failed)?;
        let log = Arc::new(Log::default());
        let kept = log.clone();
        read_lines("bench-stderr", stderr, move |line| {
            kept.keep(line);
            true
        })
        .map_err(failed)?;
        Ok(Self { name, child, stdin, lines, log, started })
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What it has used so far, where the system tells.
    pub fn usage(&self) -> Option<Usage> {
        Usage::of(self.child.id())
    }

    /// Writes a line to its stdin.
    pub fn tell(&mut self, line: &str) -> Result<(), Error> {
        let told = writeln!(self.stdin, "{line}").and_then(|()| self.stdin.flush());
        told.map_err(|source| self.failed("ended too early", source))
    }

    /// The next line of its stdout; `None` when there is none yet after the wait.
    pub fn poll_line(&self, wait: Duration) -> Result<Option<String>, Error> {
        match self.lines.recv_timeout(wait) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(self.failed("ended too early", std::io::ErrorKind::BrokenPipe.into()))
            }
        }
    }

    /// The next line of its stdout, or an error when there is none after the wait.
    pub fn line(&self, wait: Duration) -> Result<String, Error> {
        match self.poll_line(wait)? {
            Some(line) => Ok(line),
            None => Err(self.failed(&format!("said nothing for {wait:?}"), std::io::ErrorKind::TimedOut.into())),
        }
    }

    /// What follows `marker` in a line of its log that has it.
    pub fn logged(&self, marker: &str, wait: Duration) -> Option<String> {
        let until = Instant::now() + wait;
        let mut lines = self.log.lines();
        loop {
            let found = lines.iter().find_map(|line| line.split_once(marker));
            if let Some((_, rest)) = found {
                return Some(rest.to_owned());
            }
            let left = until.checked_duration_since(Instant::now())?;
            lines = self.log.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn failed(&self, how: &str, source: std::io::Error) -> Error {
        // What it says last is on its way when it ends.
        let _ended = self.logged("\0", Duration::from_millis(100));
        let log: Vec<String> = self.log.lines().iter().cloned().collect();
        let said = if log.is_empty() { String::new() } else { format!("; its log says:\n{}\n", log.join("\n")) };
        Error::System { what: format!("{} {how}{said}", self.name), source }
    }
}

impl Log {
    fn lines(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, line: String) {
        let mut lines = self.lines();
        if lines.len() == LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
        self.more.notify_all();
    }
}

fn read_lines(
    name: &str,
    source: impl Read + Send + 'static,
    mut take: impl FnMut(String) -> bool + Send + 'static,
) -> std::io::Result<()> {
    let read = move || {
        let _ended = BufReader::new(source).lines().map_while(Result::ok).all(&mut take);
    };
    thread::Builder::new().name(name.to_owned()).spawn(read).map(drop)
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Ends this process as soon as its stdin closes, which it does when the one that started it is gone. What comes on stdin
/// until then is given to `line`.
pub fn end_with_stdin(mut line: impl FnMut(String) + Send + 'static) -> std::io::Result<()> {
    let watch = move || {
        for read in std::io::stdin().lock().lines().map_while(Result::ok) {
            line(read);
        }
        std::process::exit(0);
    };
    thread::Builder::new().name("skep-stdin".to_owned()).spawn(watch).map(drop)
}
