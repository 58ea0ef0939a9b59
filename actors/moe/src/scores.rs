//! [`GridScores`]: what a gate says of every coordinate, and what that makes of an expert.

/// Scores of a gate: one matrix `[rows, size]` per grid dimension, C order.
///
/// `-inf` rules a coordinate out: no expert there is asked. NaN and `+inf` are refused.
#[derive(Clone, Debug, PartialEq)]
pub struct GridScores {
    /// Rows of the batch.
    pub rows: usize,
    /// Per dimension its size and `rows × size` scores.
    pub dimensions: Vec<(usize, Vec<f32>)>,
}

impl GridScores {
    /// Checks that the scores are those of a grid of this size.
    ///
    /// # Errors
    /// Says which dimension does not fit.
    pub fn check(&self, grid_size: &[usize]) -> Result<(), String> {
        let sizes: Vec<usize> = self.dimensions.iter().map(|(size, _)| *size).collect();
        if sizes != grid_size {
            return Err(format!("scores are for a grid of {sizes:?}, the mixture's is {grid_size:?}"));
        }
        for (dimension, (size, scores)) in self.dimensions.iter().enumerate() {
            if self.rows.checked_mul(*size) != Some(scores.len()) {
                let rows = self.rows;
                return Err(format!("dimension {dimension} needs {rows} × {size} scores, got {}", scores.len()));
            }
            if let Some(bad) = scores.iter().position(|s| s.is_nan() || *s == f32::INFINITY) {
                return Err(format!("score {bad} of dimension {dimension} is {}", scores[bad]));
            }
        }
        Ok(())
    }

    /// Score of one coordinate for a row.
    pub(crate) fn at(&self, row: usize, dimension: usize, coordinate: usize) -> f64 {
        let (size, scores) = &self.dimensions[dimension];
        f64::from(scores[row * size + coordinate])
    }

    /// Score of an expert for a row: the sum over its coordinates.
    pub(crate) fn of(&self, row: usize, coordinates: &[usize]) -> f64 {
        coordinates.iter().enumerate().map(|(dimension, &coordinate)| self.at(row, dimension, coordinate)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(first: Vec<f32>) -> GridScores {
        GridScores { rows: 2, dimensions: vec![(3, first), (1, vec![0.5, -0.5])] }
    }

    #[test]
    fn an_expert_scores_the_sum_of_its_coordinates() {
        let scores = scores(vec![0., 1., 2., 3., 4., 5.]);
        assert_eq!(scores.check(&[3, 1]), Ok(()));
        assert_eq!(scores.of(1, &[2, 0]), 4.5);
    }

    #[test]
    fn scores_of_another_grid_or_no_numbers_are_refused() {
        assert!(scores(vec![0.; 6]).check(&[3]).is_err());
        assert!(scores(vec![0.; 6]).check(&[2, 1]).is_err());
        assert!(scores(vec![0.; 5]).check(&[3, 1]).is_err());
        assert!(scores(vec![f32::NAN; 6]).check(&[3, 1]).is_err());
        assert!(scores(vec![f32::INFINITY; 6]).check(&[3, 1]).is_err());
        assert!(scores(vec![f32::NEG_INFINITY; 6]).check(&[3, 1]).is_ok());
    }
}
