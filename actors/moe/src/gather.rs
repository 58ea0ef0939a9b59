//! Putting the answers of a fan-out together, and taking gradients apart.

use std::fmt;

use half::{bf16, f16};
use skep_wire::{DType, HostTensor, TensorError};

use crate::{
    Chosen,
    join::Joined,
    plan::{Place, Plan},
};

/// Dtype and row shape of each output of an expert.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Layout(Vec<(DType, Vec<usize>)>);

impl Layout {
    /// The layout of one expert's outputs.
    pub fn of(outputs: &[HostTensor]) -> Self {
        Self(outputs.iter().map(|t| (t.dtype(), t.shape().iter().skip(1).copied().collect())).collect())
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (dtype, shape)) in self.0.iter().enumerate() {
            write!(f, "{}{dtype} {shape:?}", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// The winners' rows at their places in tensors `[rows, k, …]`; zeros elsewhere.
pub(crate) fn outputs(
    plan: &Plan,
    layout: &Layout,
    joined: &Joined<Vec<HostTensor>>,
) -> Result<Vec<HostTensor>, TensorError> {
    let tensors = layout.0.iter().enumerate().map(|(output, (dtype, row_shape))| {
        let shape: Vec<usize> = [plan.rows, plan.k].into_iter().chain(row_shape.iter().copied()).collect();
        let blank = HostTensor::zeros(*dtype, shape.clone())?;
        let row_bytes = blank.data().len().checked_div(plan.rows * plan.k).unwrap_or(0);
        let mut data = blank.data().to_vec();
        for (at, winner) in joined.winners.iter().enumerate() {
            if let Some((slot, index)) = winner {
                let answer = joined.answers[slot][output].data();
                data[at * row_bytes..][..row_bytes].copy_from_slice(&answer[index * row_bytes..][..row_bytes]);
            }
        }
        HostTensor::new(*dtype, shape, data.into())
    });
    tensors.collect()
}

/// Per row the experts on its places: the winner, or the one that was asked first.
pub(crate) fn chosen<T>(plan: &Plan, joined: &Joined<T>) -> Vec<Vec<Chosen>> {
    let mut slots = vec![None; plan.rows * plan.k];
    for (slot, call) in plan.calls().iter().enumerate() {
        for place in &call.places {
            slots[place.row * plan.k + place.rank].get_or_insert(slot);
        }
    }
    for (at, winner) in joined.winners.iter().enumerate() {
        if let Some((slot, _)) = winner {
            slots[at] = Some(slot.0);
        }
    }
    let expert = |slot: &usize| {
        let call = &plan.calls()[*slot];
        Chosen { uid: call.uid.clone(), peer: call.peer, coordinates: call.coordinates.clone() }
    };
    slots.chunks(plan.k).map(|row| row.iter().flatten().map(expert).collect()).collect()
}

/// The rows of `tensor` at these places; not copied when that is all of them in order.
pub(crate) fn rows_at(tensor: &HostTensor, places: &[Place]) -> Result<HostTensor, TensorError> {
    let is_whole = places.len() == tensor.rows() && places.iter().enumerate().all(|(i, place)| place.row == i);
    if is_whole {
        return Ok(tensor.clone());
    }
    tensor.gather_rows(&places.iter().map(|place| place.row).collect::<Vec<_>>())
}

/// The rows of `gradient`, `[rows, k, …]`, at these places, as `[places, …]`.
pub(crate) fn gradients_at(gradient: &HostTensor, k: usize, places: &[Place]) -> Result<HostTensor, TensorError> {
    let shape = gradient.shape();
    let flat: Vec<usize> = std::iter::once(shape[0] * shape[1]).chain(shape[2..].iter().copied()).collect();
    let flat = HostTensor::new(gradient.dtype(), flat, gradient.data().clone())?;
    flat.gather_rows(&places.iter().map(|place| place.row * k + place.rank).collect::<Vec<_>>())
}

/// Per input the sum of the gradients that came back, in the input's dtype; zeros where none did and for integers.
pub(crate) fn sum_gradients(
    inputs: &[HostTensor],
    plan: &Plan,
    joined: &Joined<Vec<HostTensor>>,
) -> Result<Vec<HostTensor>, TensorError> {
    let sums = inputs.iter().enumerate().map(|(input, tensor)| match Floats::of(tensor.dtype()) {
        Some(floats) => {
            let width = tensor.numel().checked_div(tensor.rows()).unwrap_or(0);
            let mut sum = vec![0.0; tensor.numel()];
            for (slot, answer) in &joined.answers {
                let places = plan.call(*slot).places.iter();
                for (place, row) in places.zip(answer[input].data().chunks(answer[input].row_bytes().max(1))) {
                    let into = &mut sum[place.row * width..][..width];
                    into.iter_mut().zip(row.chunks_exact(floats.size)).for_each(|(s, b)| *s += (floats.read)(b));
                }
            }
            let mut data = Vec::with_capacity(tensor.data().len());
            sum.into_iter().for_each(|value| (floats.write)(value, &mut data));
            HostTensor::new(tensor.dtype(), tensor.shape(), data.into())
        }
        None => HostTensor::zeros(tensor.dtype(), tensor.shape()),
    });
    sums.collect()
}

/// How floats of one dtype are read and written. Sums are kept in f64 and rounded once.
struct Floats {
    size: usize,
    read: fn(&[u8]) -> f64,
    write: fn(f64, &mut Vec<u8>),
}

macro_rules! floats {
    ($t:ty, $to:expr, $from:expr) => {
        Floats {
            size: size_of::<$t>(),
            read: |bytes| $to(<$t>::from_le_bytes(bytes.try_into().expect("chunks have the element's size"))),
            write: |value, out| out.extend_from_slice(&$from(value).to_le_bytes()),
        }
    };
}

impl Floats {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(floats!(f32, f64::from, |v: f64| v as f32)),
            DType::F64 => Some(floats!(f64, |v: f64| v, |v: f64| v)),
            DType::F16 => Some(floats!(f16, f64::from, f16::from_f64)),
            DType::BF16 => Some(floats!(bf16, f64::from, bf16::from_f64)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use libp2p_identity::PeerId;

    use super::*;
    use crate::plan::{Choice, Slot};

    /// Rows 0 and 1 on two places each: `m.0` answered both on rank 0, `m.1` row 1 on rank 1; row 0's second call failed.
    fn fan_out(answers: [HostTensor; 2]) -> (Plan, Joined<Vec<HostTensor>>) {
        let peer = PeerId::random();
        let choice = |row, rank, uid: &str| Choice {
            place: Place { row, rank },
            uid: uid.parse().unwrap(),
            peer,
            coordinates: vec![0],
        };
        let mut plan = Plan::new(2, 2);
        plan.add([choice(0, 0, "m.0"), choice(1, 0, "m.0"), choice(1, 1, "m.1"), choice(0, 1, "m.2")]);
        let [first, second] = answers;
        let joined = Joined {
            winners: vec![Some((Slot(0), 0)), None, Some((Slot(0), 1)), Some((Slot(1), 0))],
            answers: BTreeMap::from([(Slot(0), vec![first]), (Slot(1), vec![second])]),
            failures: vec![],
            unanswered: vec![],
            short: vec![],
        };
        (plan, joined)
    }

    fn tensor(rows: usize, values: &[f32]) -> HostTensor {
        HostTensor::from_f32([rows, values.len() / rows], values).unwrap()
    }

    #[test]
    fn outputs_stand_at_their_places_and_missing_ones_are_zero() {
        let (plan, joined) = fan_out([tensor(2, &[1., 2., 3., 4.]), tensor(1, &[5., 6.])]);
        let outputs = outputs(&plan, &Layout::of(&joined.answers[&Slot(0)]), &joined).unwrap();
        assert_eq!(outputs[0].shape(), [2, 2, 2]);
        assert_eq!(outputs[0].to_f32().unwrap(), [1., 2., 0., 0., 3., 4., 5., 6.]);
        let names: Vec<Vec<String>> =
            chosen(&plan, &joined).iter().map(|row| row.iter().map(|c| c.uid.to_string()).collect()).collect();
        assert_eq!(names, [["m.0", "m.2"], ["m.0", "m.1"]]);
    }

    #[test]
    fn input_gradients_are_summed_over_the_experts_that_answered() {
        let (plan, joined) = fan_out([tensor(2, &[1., 2., 3., 4.]), tensor(1, &[5., 6.])]);
        let sums = sum_gradients(&[tensor(2, &[0.; 4])], &plan, &joined).unwrap();
        assert_eq!(sums[0].to_f32().unwrap(), [1., 2., 8., 10.]);
    }

    #[test]
    fn half_precision_gradients_are_summed_and_integers_have_none() {
        let half = |values: &[f32]| {
            let data: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
            HostTensor::new(DType::F16, [values.len(), 1], data.into()).unwrap()
        };
        let (plan, joined) = fan_out([half(&[1.5, 2.0]), half(&[0.25])]);
        let sums = sum_gradients(&[half(&[0., 0.])], &plan, &joined).unwrap();
        assert_eq!(sums[0], half(&[1.5, 2.25]));
        let whole = HostTensor::from_i64([2, 1], &[7, 7]).unwrap();
        assert_eq!(sum_gradients(&[whole], &plan, &joined).unwrap()[0].to_i64().unwrap(), [0, 0]);
    }

    #[test]
    fn gradients_of_a_place_are_found_by_row_and_rank() {
        let gradient = HostTensor::from_f32([2, 2, 1], &[0., 1., 2., 3.]).unwrap();
        let places = [Place { row: 0, rank: 1 }, Place { row: 1, rank: 0 }];
        let taken = gradients_at(&gradient, 2, &places).unwrap();
        assert_eq!((taken.shape(), taken.to_f32().unwrap()), (&[2, 1][..], vec![1., 2.]));
    }
}
