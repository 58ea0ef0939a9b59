//! What skep promises, proven on whole hives in virtual time. `docs/scenarios.md` says what each scenario proves and what
//! it measured. `SKEP_SOAK=1` runs the large forms.

mod bootstraps;
mod churn;
mod clocks;
mod common;
mod crashes;
mod grid;
mod joins;
mod mass_start;
mod overload;
mod partition;
mod quorum;
mod stopping;
mod training;
