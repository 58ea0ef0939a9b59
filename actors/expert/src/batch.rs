//! Tasks into one batch and its results back to the tasks. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

use skep_kernel::{Key, Rows};
use skep_wire::{HostTensor, TensorError};

use crate::{
    Batch, Kind,
    schema::{Schema, found},
    task::Task,
};

/// What tasks of one batch have in common: dtypes, and sizes beyond the batch dimension.
///
/// Two different ones may collide; then joining fails and the tasks run one by one.
pub(crate) fn key(tensors: &[HostTensor]) -> Key {
    let mut hasher = DefaultHasher::new();
    for tensor in tensors {
        tensor.dtype().hash(&mut hasher);
        tensor.shape().get(1..).hash(&mut hasher);
    }
    Key(hasher.finish())
}

/// Joins the tensors of tasks along the first dimension. One task is not copied.
///
/// # Panics
/// Without a task.
pub(crate) fn join<'a>(tasks: impl IntoIterator<Item = &'a Task>) -> Result<Batch, TensorError> {
    let tasks: Vec<&Task> = tasks.into_iter().collect();
    let rows = tasks.iter().map(|task| task.rows.0).sum();
    Ok(Batch {
        rows: Rows(rows),
        inputs: concat(tasks.iter().map(|task| task.inputs.as_slice()))?,
        grad_outputs: concat(tasks.iter().map(|task| task.grad_outputs.as_slice()))?,
    })
}

fn concat<'a>(parts: impl Iterator<Item = &'a [HostTensor]>) -> Result<Vec<HostTensor>, TensorError> {
    let parts: Vec<&[HostTensor]> = parts.collect();
    let width = parts.first().expect("a batch has at least one task").len();
    let column = |i: usize| -> Vec<HostTensor> { parts.iter().map(|part| part[i].clone()).collect() };
    (0..width).map(|i| HostTensor::concat_rows(&column(i))).collect()
}

/// Checks that a backend returned what its schema promises.
pub(crate) fn check_results(schema: &Schema, kind: Kind, batch: &Batch, results: &[HostTensor]) -> Result<(), String> {
    let (what, expected) = match kind {
        Kind::Forward => ("output", schema.outputs.len()),
        Kind::Backward => ("input gradient", schema.inputs.len()),
    };
    if results.len() != expected {
        return Err(format!("the backend returned {} {what}s instead of {expected}", results.len()));
    }
    for (i, result) in results.iter().enumerate() {
        let (fits, promised) = match kind {
            Kind::Forward => {
                let rows_fit = result.rows() == batch.rows.0 as usize;
                (rows_fit && schema.outputs[i].descriptor.admits(result), schema.outputs[i].expectation())
            }
            Kind::Backward => {
                let input = &batch.inputs[i];
                (result.shape() == input.shape() && result.dtype() == input.dtype(), found(input))
            }
        };
        if !fits {
            let (rows, got) = (batch.rows.0, found(result));
            return Err(format!("the backend returned {got} as {what} {i} of {rows} rows instead of {promised}"));
        }
    }
    Ok(())
}

/// Cuts checked results into the parts of tasks with so many rows each. Views, not copies.
pub(crate) fn split(results: &[HostTensor], rows: &[Rows]) -> Result<Vec<Vec<HostTensor>>, TensorError> {
    let mut start = 0;
    let part = |rows: &Rows| {
        let end = start + rows.0 as usize;
        let part = results.iter().map(|tensor| tensor.slice_rows(start, end)).collect();
        start = end;
        part
    };
    rows.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use skep_kernel::{Deadline, Moment, Reply, panics::Contained};
    use skep_wire::{DType, ExpertInfo, TensorDescriptor};

    use super::*;
    use crate::task::InFlight;

    fn tensor(rows: usize, first: f32) -> HostTensor {
        let values: Vec<f32> = (0..rows * 2).map(|i| first + i as f32).collect();
        HostTensor::from_f32([rows, 2], &values).unwrap()
    }

    fn task(inputs: Vec<HostTensor>, grad_outputs: Vec<HostTensor>) -> Task {
        Task {
            rows: Rows(inputs[0].rows() as u32),
            deadline: Deadline::at(Moment::START),
            entered: Moment::START,
            reply: Reply::channel().0,
            wanted: None,
            ticket: Arc::new(InFlight::default()).enter(),
            inputs: Contained::new(inputs),
            grad_outputs: Contained::new(grad_outputs),
        }
    }

    #[test]
    fn what_is_joined_splits_back_to_the_same_rows() {
        let tasks = [1, 3, 2].map(|n| task(vec![tensor(n, n as f32)], vec![tensor(n, 10.0)]));
        let batch = join(&tasks).unwrap();
        assert_eq!((batch.rows, batch.inputs[0].rows(), batch.grad_outputs[0].rows()), (Rows(6), 6, 6));
        let rows: Vec<Rows> = tasks.iter().map(|t| t.rows).collect();
        let parts = split(&batch.inputs, &rows).unwrap();
        for (part, task) in parts.iter().zip(&tasks) {
            assert_eq!(part, &*task.inputs);
        }
    }

    #[test]
    fn only_equal_widths_and_dtypes_share_a_key() {
        let zeros = |dtype, shape: &[usize]| HostTensor::zeros(dtype, shape).unwrap();
        assert_eq!(key(&[zeros(DType::F32, &[1, 4])]), key(&[zeros(DType::F32, &[7, 4])]));
        assert_ne!(key(&[zeros(DType::F32, &[1, 4])]), key(&[zeros(DType::F32, &[1, 5])]));
        assert_ne!(key(&[zeros(DType::F32, &[1, 4])]), key(&[zeros(DType::I32, &[1, 4])]));
        assert_ne!(key(&[zeros(DType::F32, &[1, 4])]), key(&[zeros(DType::F32, &[1, 4, 1])]));
    }

    #[test]
    fn different_widths_do_not_join() {
        let narrow = task(vec![tensor(1, 0.0)], vec![]);
        let wide = task(vec![HostTensor::zeros(DType::F32, [1, 3]).unwrap()], vec![]);
        assert!(join([&narrow, &wide]).is_err());
    }

    #[test]
    fn a_backend_that_breaks_its_promise_is_named() {
        let side = TensorDescriptor::batched(DType::F32, &[2]);
        let schema = Schema::of(&ExpertInfo::simple(side.clone(), side), &[]).unwrap();
        let batch = Batch { rows: Rows(3), inputs: vec![tensor(3, 0.0)], grad_outputs: vec![] };
        assert_eq!(check_results(&schema, Kind::Forward, &batch, &[tensor(3, 0.0)]), Ok(()));
        assert_eq!(
            check_results(&schema, Kind::Forward, &batch, &[]).unwrap_err(),
            "the backend returned 0 outputs instead of 1"
        );
        assert_eq!(
            check_results(&schema, Kind::Forward, &batch, &[tensor(2, 0.0)]).unwrap_err(),
            "the backend returned float32 [2, 2] as output 0 of 3 rows instead of float32 [batch, 2]"
        );
        assert_eq!(
            check_results(&schema, Kind::Backward, &batch, &[tensor(4, 0.0)]).unwrap_err(),
            "the backend returned float32 [4, 2] as input gradient 0 of 3 rows instead of float32 [3, 2]"
        );
    }
}
