//! The loss curve as SVG.

use std::path::Path;

use plotters::prelude::*;

/// Draws the losses of named runs over their steps; `killed` marks the step at which a server died.
pub fn losses(path: &Path, runs: &[(&str, &[f64])], killed: usize) -> Result<(), Box<dyn std::error::Error>> {
    let steps = runs.iter().map(|(_, losses)| losses.len()).max().unwrap_or(1);
    let top = runs.iter().flat_map(|(_, losses)| losses.iter().copied()).fold(0.1, f64::max);
    let root = SVGBackend::new(path, (900, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("training loss through remote experts", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d(0..steps, (0.01..top).log_scale())?;
    chart.configure_mesh().x_desc("step").y_desc("cross-entropy").draw()?;
    for (i, (name, losses)) in runs.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let smooth = smoothed(losses).into_iter().enumerate();
        chart
            .draw_series(LineSeries::new(smooth, color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .draw_series(LineSeries::new([(killed, 0.01), (killed, top)], BLACK.mix(0.5)))?
        .label("a server is killed")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLACK.mix(0.5)));
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()?;
    Ok(())
}

/// A running mean, so that batches of different difficulty do not hide the trend.
fn smoothed(losses: &[f64]) -> Vec<f64> {
    let mut mean = None;
    let mut next = |loss: f64| {
        let value = mean.map_or(loss, |mean: f64| 0.9 * mean + 0.1 * loss);
        mean = Some(value);
        value.max(0.01)
    };
    losses.iter().map(|&loss| next(loss)).collect()
}
