//! Executors stand behind the threads that answer calls: a machine whose cores all compute still hears its peers.

use tracing::debug;

/// Gives this thread less of a contended core than its neighbours: `steps` on the scale of nice(1) below what the process
/// has. Threads have a priority of their own on Linux only; elsewhere nothing happens.
pub(super) fn stand_behind(steps: u8) {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        // No id stands for the calling thread. Being nicer is always allowed.
        let set = getpriority_process(None).and_then(|own| setpriority_process(None, own + i32::from(steps)));
        if let Err(error) = set {
            debug!(%error, "an executor keeps its priority");
        }
    }
    #[cfg(not(target_os = "linux"))]
    debug!(steps, "threads have no priority of their own here");
}
