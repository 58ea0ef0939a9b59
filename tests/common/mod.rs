//! The `skep` command as a child process: nothing waits for ever, and nothing outlives its test.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::disallowed_methods, reason = "it watches other processes, in real time; what they print waits here")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const FFN: &[&str] = &["--expert_cls", "ffn", "--hidden_dim", "16"];

/// The daemon, without what the environment of the test may say about configuration and logs.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skep"));
    let variables = std::env::vars_os().map(|(name, _)| name);
    for name in variables.filter(|name| name == "RUST_LOG" || name.to_string_lossy().starts_with("SKEP_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

pub fn skep(args: &[&str]) -> Output {
    let mut daemon = Daemon::spawn(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let (mut stdout, mut stderr) = (String::new(), String::new());
    let until = Instant::now() + PATIENCE;
    for (source, text) in [(&daemon.stdout, &mut stdout), (&daemon.stderr, &mut stderr)] {
        while let Some(line) = next_line(source, until) {
            *text += &(line + "\n");
        }
    }
    let status = daemon.child.wait().expect("it has ended");
    Output { status, stdout: stdout.into(), stderr: stderr.into() }
}

/// The next line, or nothing at the end.
fn next_line(source: &mpsc::Receiver<String>, until: Instant) -> Option<String> {
    match source.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(line) => Some(line),
        Err(mpsc::RecvTimeoutError::Disconnected) => None,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it neither ends nor goes on"),
    }
}

/// What a command that must fail says, and its exit code.
pub fn failure(args: &[&str]) -> (String, Option<i32>) {
    let output = skep(args);
    assert!(output.stdout.is_empty(), "stdout carries only results");
    (String::from_utf8(output.stderr).expect("text"), output.status.code())
}

/// A `skep` process that goes with the test.
pub struct Daemon {
    pub child: Child,
    pub stdout: mpsc::Receiver<String>,
    pub stderr: mpsc::Receiver<String>,
}

fn lines(source: impl std::io::Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(source).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    receiver
}

impl Daemon {
    pub fn start(args: &[&str]) -> Self {
        Self::spawn(command(args).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("skep starts");
        let stdout = lines(child.stdout.take().expect("stdout is piped"));
        let stderr = lines(child.stderr.take().expect("stderr is piped"));
        Self { child, stdout, stderr }
    }

    /// The first address, which comes once it is ready.
    pub fn address(&self) -> String {
        self.stdout.recv_timeout(PATIENCE).expect("it becomes ready")
    }

    /// Waits for a line of the log.
    pub fn says(&self, part: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = next_line(&self.stderr, until).unwrap_or_else(|| panic!("it never says {part:?}"));
            if line.contains(part) {
                return line;
            }
        }
    }

    pub fn signal(&self, name: &str) {
        // `kill` is a command of the shell: not every machine has it as a program.
        let kill = format!("kill {name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().expect("a shell runs").success());
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        while next_line(&self.stderr, until).is_some() {}
        self.child.wait().expect("it has ended")
    }

    pub fn ends_within(&mut self, limit: Duration) -> ExitStatus {
        let begun = Instant::now();
        let status = self.ends();
        assert!(begun.elapsed() < limit, "it took {:?} to end", begun.elapsed());
        status
    }

    pub fn ends(&mut self) -> ExitStatus {
        self.signal("-TERM");
        self.end()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

pub fn temporary(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("skep-daemon-{}-{name}", std::process::id()));
    // Only there when an earlier run was cut off.
    let _stale = fs::remove_file(&path);
    path
}

/// A peer id that nobody has.
pub fn skep_id() -> String {
    let path = temporary("id.key");
    let id = skep(&["identity", "new", path.to_str().expect("a UTF-8 path")]);
    fs::remove_file(path).expect("it was made");
    String::from_utf8(id.stdout).expect("text").trim().to_owned()
}
