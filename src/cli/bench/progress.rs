//! How far a benchmark is: a bar on a terminal, nothing elsewhere.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr; it goes when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// Something that takes about so long.
    pub fn of(message: impl Into<String>, expected: Duration) -> Self {
        let length = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
        let bar = ProgressBar::with_draw_target(Some(length.max(1)), ProgressDrawTarget::stderr());
        if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{msg:32} {wide_bar} {elapsed}").expect("a literal template");
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(200));
        } else {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar.set_message(message.into());
        Self(bar)
    }

    /// So much of it has passed.
    pub fn passed(&self, time: Duration) {
        self.0.set_position(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
