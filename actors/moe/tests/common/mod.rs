//! What the scenarios share: deadlines, rows, scores.
#![allow(dead_code, reason = "each scenario uses its own part")]

use std::time::Duration;

use skep_kernel::Deadline;
use skep_moe::{Gather, GridScores};
use skep_testkit::Sim;
use skep_wire::HostTensor;

pub const WIDTH: usize = 4;

pub fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub fn within(sim: &Sim, wait: Duration) -> Deadline {
    Deadline::after(sim.now(), wait)
}

/// Rows of width 4 whose values tell them apart.
pub fn rows(n: usize) -> HostTensor {
    let values: Vec<f32> = (0..n * WIDTH).map(|i| i as f32 + 1.0).collect();
    HostTensor::from_f32([n, WIDTH], &values).unwrap()
}

pub fn filled(shape: &[usize], value: f32) -> HostTensor {
    HostTensor::from_f32(shape, &vec![value; shape.iter().product()]).unwrap()
}

/// Scores by row and dimension.
pub fn scores(rows: &[&[&[f32]]]) -> GridScores {
    let dimensions =
        (0..rows[0].len()).map(|d| (rows[0][d].len(), rows.iter().flat_map(|row| row[d].to_vec()).collect()));
    GridScores { rows: rows.len(), dimensions: dimensions.collect() }
}

/// Every row prefers lower coordinates.
pub fn descending(rows: usize, sizes: &[usize]) -> GridScores {
    let dimensions = sizes.iter().map(|&size| (size, (0..rows).flat_map(|_| (0..size).map(|i| -(i as f32))).collect()));
    GridScores { rows, dimensions: dimensions.collect() }
}

pub fn chosen(gather: &Gather) -> Vec<Vec<&str>> {
    gather.chosen.iter().map(|row| row.iter().map(|chosen| chosen.uid.as_str()).collect()).collect()
}
