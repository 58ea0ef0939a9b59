//! SIGINT and SIGTERM: the first asks for an orderly end, the second ends at once.

use std::thread;

use crossbeam_channel::Receiver;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::error::Error;

/// Exit code after a second signal, as shells count it for SIGINT.
const INTERRUPTED: i32 = 130;

/// Starts listening. The channel gets one message at the first signal; the process ends at the second.
pub fn first_signal() -> Result<Receiver<()>, Error> {
    let failed = |source| Error::System { what: "cannot listen for signals".to_owned(), source };
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let listen = move || {
        let mut arriving = signals.forever();
        if arriving.next().is_some() {
            // Whoever no longer listens is on its way out already.
            let _ending = sender.send(());
        }
        if arriving.next().is_some() {
            std::process::exit(INTERRUPTED);
        }
    };
    thread::Builder::new().name("skep-signals".to_owned()).spawn(listen).map_err(failed)?;
    Ok(receiver)
}
