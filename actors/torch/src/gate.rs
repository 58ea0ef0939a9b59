//! The gate of a mixture: scores of the grid's coordinates, and what they make of chosen experts.

use skep_moe::{Chosen, GridScores};
use tch::{
    Device, Kind, Tensor,
    nn::{Init, Path},
};

use crate::{Error, to_host};

/// One linear layer whose outputs are the scores of all dimensions behind each other (docs/wire.md §10.2).
pub(crate) struct Gate {
    weight: Tensor,
    bias: Tensor,
    in_features: i64,
    grid_size: Vec<i64>,
}

impl Gate {
    /// Variables `proj.weight` `[Σ grid, in_features]` and `proj.bias`, as torch initializes them.
    pub(crate) fn new(vs: &Path, in_features: i64, grid_size: &[usize]) -> Result<Self, Error> {
        if in_features < 1 {
            return Err(Error::Config(format!("in_features {in_features} is not at least 1")));
        }
        let grid_size: Vec<i64> = grid_size.iter().map(|&size| size as i64).collect();
        let (proj, outputs) = (vs / "proj", grid_size.iter().sum());
        let bound = 1.0 / (in_features as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = proj.f_var("weight", &[outputs, in_features], init)?;
        let bias = proj.f_var("bias", &[outputs], init)?;
        Ok(Self { weight, bias, in_features, grid_size })
    }

    /// What of an input decides: itself, or the mean over all but its first and last dimension.
    pub(crate) fn view(&self, x: &Tensor) -> Result<Tensor, Error> {
        let size = x.size();
        if size.len() < 2 || size.last() != Some(&self.in_features) {
            let reason = format!("input 0 has shape {size:?}, the gate takes [batch, …, {}]", self.in_features);
            return Err(Error::Inputs { expert: "the mixture".into(), reason });
        }
        let x = x.f_to(self.weight.device())?.f_to_kind(self.weight.f_kind()?)?;
        let middle: Vec<i64> = (1..size.len() as i64 - 1).collect();
        Ok(if middle.is_empty() { x } else { x.f_mean_dim(middle, false, None::<Kind>)? })
    }

    /// Per dimension `[batch, size]`, on the gate's device.
    pub(crate) fn scores(&self, view: &Tensor) -> Result<Vec<Tensor>, Error> {
        Ok(view.f_linear(&self.weight, Some(&self.bias))?.f_split_with_sizes(&self.grid_size, -1)?)
    }
}

/// Scores as the search takes them.
pub(crate) fn grid_scores(scores: &[Tensor]) -> Result<GridScores, Error> {
    let dimension = |t: &Tensor| Ok((t.size()[1] as usize, to_host(&t.f_to_kind(Kind::Float)?)?.to_f32()?));
    let rows = scores.first().map_or(0, |t| t.size()[0] as usize);
    Ok(GridScores { rows, dimensions: scores.iter().map(dimension).collect::<Result<_, Error>>()? })
}

/// Per dimension the value of each chosen expert's coordinate, `[batch, k]` on the CPU; empty slots repeat coordinate 0.
pub(crate) fn at_chosen(values: &[Tensor], chosen: &[Vec<Chosen>], k: usize) -> Result<Vec<Tensor>, Error> {
    let pick = |(dimension, values): (usize, &Tensor)| {
        let coordinate = |row: &Vec<Chosen>, rank: usize| row.get(rank).map_or(0, |c| c.coordinates[dimension] as i64);
        let index: Vec<i64> = chosen.iter().flat_map(|row| (0..k).map(move |rank| coordinate(row, rank))).collect();
        let index = Tensor::f_from_slice(&index)?.f_reshape([chosen.len() as i64, k as i64])?;
        Ok(values.f_to(Device::Cpu)?.f_gather(1, &index, false)?)
    };
    values.iter().enumerate().map(pick).collect()
}

/// `Σ_k weights[b, k] · y[b, k, …]` as `[b, …]`.
pub(crate) fn weighted_sum(weights: &Tensor, y: &Tensor) -> Result<Tensor, Error> {
    if !y.is_floating_point() {
        let reason = format!("a mixture cannot average {:?} outputs", y.f_kind()?);
        return Err(Error::Answer { expert: "the mixture".into(), reason });
    }
    let size = y.size();
    let (rows, k, rest) = (size[0], size[1], &size[2..]);
    let flat = y.f_reshape([rows, k, rest.iter().product()])?;
    let sum = weights.f_to_kind(y.f_kind()?)?.f_unsqueeze(1)?.f_bmm(&flat)?;
    Ok(sum.f_reshape([&[rows], rest].concat())?)
}
