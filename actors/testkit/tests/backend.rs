//! The scripted expert does what its script says.

use std::panic::{AssertUnwindSafe, catch_unwind};

use skep_expert::{Backend, BackendError, Batch};
use skep_kernel::Rows;
use skep_testkit::ScriptedBackend;
use skep_wire::HostTensor;

fn column(values: &[f32]) -> HostTensor {
    HostTensor::from_f32([values.len(), 1], values).unwrap()
}

/// Inputs, and gradients of one for each.
fn batch(values: &[f32]) -> Batch {
    let rows = Rows(values.len() as u32);
    Batch { rows, inputs: vec![column(values)], grad_outputs: vec![column(&vec![1.0; values.len()])] }
}

fn forward(backend: &mut ScriptedBackend, values: &[f32]) -> Vec<f32> {
    backend.forward(&batch(values)).unwrap()[0].to_f32().unwrap()
}

#[test]
fn a_scaling_expert_multiplies_and_never_changes() {
    let mut expert = ScriptedBackend::scale(2.0);
    assert_eq!(forward(&mut expert, &[1.0, -3.0]), [2.0, -6.0]);
    assert_eq!(expert.backward(&batch(&[5.0])).unwrap()[0].to_f32().unwrap(), [2.0]);
    assert_eq!((forward(&mut expert, &[1.0]), expert.steps()), (vec![2.0], 1));
}

#[test]
fn an_affine_expert_trains_its_weight_so_that_steps_can_be_counted() {
    let mut expert = ScriptedBackend::affine(10.0, 1.0);
    for step in 1..=3 {
        expert.backward(&batch(&[1.0])).unwrap();
        assert_eq!((expert.weight(), expert.steps()), (10.0 - step as f32, step));
    }
    let kept = expert.save().unwrap();
    expert.backward(&batch(&[2.0, 2.0])).unwrap();
    assert_eq!(expert.weight(), 3.0);
    expert.load(&kept).unwrap();
    assert_eq!((expert.weight(), expert.steps()), (7.0, 3));
}

#[test]
fn what_is_ordered_for_the_nth_batch_happens_to_it_and_to_no_other() {
    let mut expert = ScriptedBackend::affine(1.0, 0.5).fail_on(2).nan_on(3).panic_on(4).tear_on(5);
    assert_eq!(forward(&mut expert, &[1.0]), [1.0]);
    assert!(matches!(expert.forward(&batch(&[1.0])), Err(BackendError::Failed(_))));
    assert!(forward(&mut expert, &[1.0])[0].is_nan());
    let panicked = catch_unwind(AssertUnwindSafe(|| expert.forward(&batch(&[1.0]))));
    assert!(panicked.unwrap_err().downcast_ref::<String>().unwrap().contains("batch 4"));
    assert!(matches!(expert.backward(&batch(&[1.0])), Err(BackendError::Torn(_))));
    assert_eq!(expert.steps(), 0, "none of it was a step");
    assert_eq!(forward(&mut expert, &[1.0]), [1.0]);
    let seen = expert.recording().batches();
    assert_eq!(seen.iter().filter(|seen| seen.backward).count(), 1);
    assert_eq!(seen.len(), 6);
}
