//! The `skep` command.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

use std::process::ExitCode;

fn main() -> ExitCode {
    skep::cli::main(std::env::args_os())
}
