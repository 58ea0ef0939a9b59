//! Shows that a long wait is going on: a spinner on a terminal, nothing elsewhere.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A spinner on stderr that says what is being waited for; it goes when it is dropped.
pub struct Waiting(ProgressBar);

impl Waiting {
    /// Starts to show `message`.
    pub fn on(message: impl Into<String>) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if std::io::stderr().is_terminal() {
            bar.set_style(ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("a literal template"));
            bar.enable_steady_tick(Duration::from_millis(100));
        } else {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar.set_message(message.into());
        Self(bar)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
