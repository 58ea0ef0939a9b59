//! The processes: a bootstrap node and two servers, each the real `skep` command.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use skep::Multiaddr;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const READY: Duration = Duration::from_secs(60);

/// A `skep` process that is ended when this is dropped.
pub struct Process {
    name: &'static str,
    child: Child,
    /// Where it listens.
    pub address: Multiaddr,
}

impl Process {
    /// Starts `skep ARGS…`, its log in `logs/NAME.log`, and waits for the address that it prints when it is ready.
    pub fn start(name: &'static str, skep: &Path, logs: &Path, args: &[&str]) -> Result<Self> {
        let log_path = logs.join(format!("{name}.log"));
        let log = std::fs::File::create(&log_path)?;
        let mut child =
            Command::new(skep).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut process = Self { name, child, address: Multiaddr::empty() };
        let (found, ready) = mpsc::sync_channel(1);
        std::thread::Builder::new().name(format!("demo-{name}")).spawn(move || {
            let first = BufReader::new(stdout).lines().next();
            // The demo has given up waiting when nobody receives.
            let _given_up = found.send(first);
        })?;
        match ready.recv_timeout(READY).ok().flatten() {
            Some(Ok(line)) => {
                process.address = line.parse()?;
                Ok(process)
            }
            _ => {
                drop(process);
                let log = std::fs::read_to_string(&log_path).unwrap_or_default();
                Err(format!("{name} did not become ready; its log says:\n{log}").into())
            }
        }
    }

    /// SIGKILL: no goodbye, no withdrawal.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and whether it ended with exit code 0.
    pub fn stop(mut self) -> Result<()> {
        let term = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        let patience = Instant::now() + Duration::from_secs(10);
        while term.success() && Instant::now() < patience {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("{} ended with {status}", self.name).into()),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        Err(format!("{} did not stop in time", self.name).into())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The `skep` binary that was built beside this example.
pub fn skep_binary() -> Result<PathBuf> {
    let example = std::env::current_exe()?;
    let built = example.parent().and_then(Path::parent).ok_or("an example lies in target/<profile>/examples")?;
    let skep = built.join("skep");
    if !skep.exists() {
        return Err(format!("{} is missing: cargo build -p skep --bins", skep.display()).into());
    }
    Ok(skep)
}
