//! What the system says of a process and of this machine.

use std::fs;

use serde::{Deserialize, Serialize};

/// Ticks of `/proc/PID/stat` in a second: the kernel's ABI on every architecture that libtorch runs on.
const TICKS: f64 = 100.0;

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Seconds of processor time in its own code.
    pub user: f64,
    /// Seconds of processor time in the kernel.
    pub system: f64,
    /// Bytes of memory.
    pub rss: u64,
    /// The most bytes it ever had.
    pub peak_rss: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Reads `/proc`; `None` elsewhere than on Linux, and when the process is gone.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Self::parse(&stat, &status)
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The second field is the name, in brackets and with anything in it.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let seconds = |field: usize| fields.get(field)?.parse::<f64>().ok().map(|ticks| ticks / TICKS);
        let line = |key: &str| {
            let rest = status.lines().find_map(|line| line.strip_prefix(key))?;
            rest.split_whitespace().next()?.parse::<u64>().ok()
        };
        Some(Self {
            user: seconds(11)?,
            system: seconds(12)?,
            rss: line("VmRSS:")? * 1024,
            peak_rss: line("VmHWM:")? * 1024,
            threads: line("Threads:")?,
        })
    }

    /// What was used since `before`, with memory and threads as they are now.
    pub fn since(self, before: Usage) -> Usage {
        Usage { user: self.user - before.user, system: self.system - before.system, ..self }
    }

    /// What was used then and in a later round, with memory and threads as they are now.
    pub fn and_then(self, later: Usage) -> Usage {
        Usage { user: self.user + later.user, system: self.system + later.system, ..later }
    }

    /// The use of two processes.
    pub fn plus(self, other: Usage) -> Usage {
        Usage {
            user: self.user + other.user,
            system: self.system + other.system,
            rss: self.rss + other.rss,
            peak_rss: self.peak_rss + other.peak_rss,
            threads: self.threads + other.threads,
        }
    }
}

/// What a report says of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: String,
    /// Threads it runs at once for us.
    pub cores: usize,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cores: cores(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// Threads that this machine runs at once for us.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_use_of_a_process_with_brackets_in_its_name_is_read() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 9 0 1 2 3";
        let status = "Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\nThreads:\t9\n";
        let wanted = Usage { user: 2.5, system: 0.5, rss: 1 << 20, peak_rss: 2 << 20, threads: 9 };
        assert_eq!(Usage::parse(stat, status), Some(wanted));
        assert_eq!(Usage::parse("7 (x) S", status), None);
    }
}
