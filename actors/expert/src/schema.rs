//! What an expert takes and gives, and whether tensors fit. Pure.

use std::fmt::Write;

use skep_kernel::Rows;
use skep_rpc::ServeError;
use skep_wire::{Compression, ExpertInfo, HostTensor, Nested, TensorDescriptor};

use crate::{BackendError, Kind};

/// Flat descriptors of an expert with the names that error texts use.
#[derive(Clone, Debug)]
pub(crate) struct Schema {
    pub inputs: Vec<Slot>,
    pub outputs: Vec<Slot>,
}

/// One flat input or output.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// As in `input 0` or `output 1`.
    pub name: String,
    pub descriptor: TensorDescriptor,
}

/// What a request may hold at the most, and how closely it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checks {
    pub max_rows: Rows,
    pub finite: bool,
}

impl Schema {
    /// Flattens a schema; every tensor of it must begin with the batch dimension. Requests may have any length in the
    /// `free` dimensions.
    pub fn of(info: &ExpertInfo, free: &[usize]) -> Result<Self, BackendError> {
        let mut inputs = Vec::new();
        for (i, arg) in info.args.iter().enumerate() {
            name_leaves(&format!("input {i}"), arg, &mut inputs);
        }
        for (name, arg) in &info.kwargs {
            name_leaves(&format!("input {name}"), arg, &mut inputs);
        }
        let mut outputs = Vec::new();
        match info.outputs.flatten().as_slice() {
            [only] => outputs.push(Slot { name: "output".to_owned(), descriptor: (*only).clone() }),
            _ => name_leaves("output", &info.outputs, &mut outputs),
        }
        if inputs.is_empty() || outputs.is_empty() {
            return Err(BackendError::Invalid("an expert has at least one input and one output".to_owned()));
        }
        for slot in inputs.iter().chain(&outputs) {
            if slot.descriptor.size.first() != Some(&None) {
                let text = format!("{} is described without a batch dimension: {}", slot.name, slot.expectation());
                return Err(BackendError::Invalid(text));
            }
        }
        for slot in inputs.iter_mut().chain(&mut outputs) {
            for &dimension in free {
                if let Some(size) = slot.descriptor.size.get_mut(dimension) {
                    *size = None;
                }
            }
        }
        Ok(Self { inputs, outputs })
    }

    /// Number of tensors that a request of this kind holds.
    pub fn request_len(&self, kind: Kind) -> usize {
        match kind {
            Kind::Forward => self.inputs.len(),
            Kind::Backward => self.inputs.len() + self.outputs.len(),
        }
    }

    /// How answers of this kind are compressed (docs/wire.md §8.1).
    pub fn answer_compression(&self, kind: Kind) -> impl Iterator<Item = Compression> {
        let slots = match kind {
            Kind::Forward => &self.outputs,
            Kind::Backward => &self.inputs,
        };
        slots.iter().map(|slot| slot.descriptor.compression)
    }

    /// Checks the tensors of a request: inputs, then for backward output gradients. Returns its rows.
    pub fn check_request(&self, kind: Kind, tensors: &[HostTensor], checks: Checks) -> Result<Rows, ServeError> {
        self.check(kind, tensors, checks).map_err(ServeError::Invalid)
    }

    fn check(&self, kind: Kind, tensors: &[HostTensor], checks: Checks) -> Result<Rows, String> {
        if tensors.len() != self.request_len(kind) {
            return Err(self.count_error(kind, tensors.len()));
        }
        let gradients = self.outputs.iter().map(|slot| (format!("gradient of {}", slot.name), slot));
        let slots = self.inputs.iter().map(|slot| (slot.name.clone(), slot)).chain(gradients);
        let rows = tensors[0].rows();
        for ((name, slot), tensor) in slots.zip(tensors) {
            if !slot.descriptor.admits(tensor) {
                return Err(format!("{name}: expected {}, got {}", slot.expectation(), found(tensor)));
            }
            if tensor.rows() != rows {
                let first = &self.inputs[0].name;
                return Err(format!("{name} has {} rows, but {first} has {rows}", tensor.rows()));
            }
            if checks.finite && !tensor.is_finite() {
                return Err(format!("{name} holds values that are not finite"));
            }
        }
        let limit = checks.max_rows.0;
        match u32::try_from(rows) {
            Ok(0) => Err("a request of 0 rows; expected at least one".to_owned()),
            Ok(rows) if rows <= limit => Ok(Rows(rows)),
            _ => Err(format!("a request of {rows} rows is over this server's max_batch_size of {limit}")),
        }
    }

    fn count_error(&self, kind: Kind, got: usize) -> String {
        let inputs = plural(self.inputs.len(), "input");
        match kind {
            Kind::Forward => format!("expected {inputs}, got {}", plural(got, "tensor")),
            Kind::Backward => {
                let gradients = plural(self.outputs.len(), "output gradient");
                format!("expected {inputs} and {gradients}, got {}", plural(got, "tensor"))
            }
        }
    }
}

impl Slot {
    fn new(name: String, descriptor: &TensorDescriptor) -> Self {
        Self { name, descriptor: descriptor.clone() }
    }

    /// What must come, as in `float32 [batch, 512]`.
    pub fn expectation(&self) -> String {
        let mut text = self.descriptor.dtype.map_or_else(|| "any dtype".to_owned(), |dtype| dtype.to_string());
        let mut lead = " [";
        for (i, size) in self.descriptor.size.iter().enumerate() {
            let _infallible = match size {
                Some(size) => write!(text, "{lead}{size}"),
                None if i == 0 => write!(text, "{lead}batch"),
                None => write!(text, "{lead}any"),
            };
            lead = ", ";
        }
        text.push(']');
        text
    }
}

/// What came, as in `float32 [3, 256]`.
pub(crate) fn found(tensor: &HostTensor) -> String {
    format!("{} {:?}", tensor.dtype(), tensor.shape())
}

fn name_leaves(name: &str, nested: &Nested<TensorDescriptor>, into: &mut Vec<Slot>) {
    match nested {
        Nested::Leaf(descriptor) => into.push(Slot::new(name.to_owned(), descriptor)),
        nested => {
            let parts = nested.flatten().into_iter().enumerate();
            into.extend(parts.map(|(i, descriptor)| Slot::new(format!("{name} part {i}"), descriptor)));
        }
    }
}

fn plural(n: usize, word: &str) -> String {
    format!("{n} {word}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use skep_wire::DType;

    use super::*;

    const CHECKS: Checks = Checks { max_rows: Rows(8), finite: true };

    fn two_inputs() -> Schema {
        let info = ExpertInfo {
            args: vec![Nested::Leaf(TensorDescriptor::batched(DType::F32, &[4]))],
            kwargs: BTreeMap::from([("mask".to_owned(), Nested::Leaf(TensorDescriptor::batched(DType::Bool, &[2])))]),
            outputs: Nested::Leaf(TensorDescriptor::batched(DType::F32, &[3])),
            keyword_names: vec!["mask".to_owned()],
        };
        Schema::of(&info, &[]).unwrap()
    }

    fn zeros(dtype: DType, shape: &[usize]) -> HostTensor {
        HostTensor::zeros(dtype, shape).unwrap()
    }

    fn refusal(kind: Kind, tensors: &[HostTensor]) -> String {
        match two_inputs().check_request(kind, tensors, CHECKS) {
            Err(ServeError::Invalid(text)) => text,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn tensors_of_the_described_shapes_pass() {
        let (x, mask, grad) = (zeros(DType::F32, &[2, 4]), zeros(DType::Bool, &[2, 2]), zeros(DType::F32, &[2, 3]));
        let schema = two_inputs();
        assert_eq!(schema.check_request(Kind::Forward, &[x.clone(), mask.clone()], CHECKS), Ok(Rows(2)));
        assert_eq!(schema.check_request(Kind::Backward, &[x, mask, grad], CHECKS), Ok(Rows(2)));
    }

    #[test]
    fn a_refusal_names_the_tensor_what_was_expected_and_what_came() {
        let (x, mask) = (zeros(DType::F32, &[2, 4]), zeros(DType::Bool, &[2, 2]));
        assert_eq!(refusal(Kind::Forward, std::slice::from_ref(&x)), "expected 2 inputs, got 1 tensor");
        assert_eq!(
            refusal(Kind::Backward, &[x.clone(), mask.clone()]),
            "expected 2 inputs and 1 output gradient, got 2 tensors"
        );
        assert_eq!(
            refusal(Kind::Forward, &[zeros(DType::F32, &[2, 5]), mask.clone()]),
            "input 0: expected float32 [batch, 4], got float32 [2, 5]"
        );
        assert_eq!(
            refusal(Kind::Forward, &[x.clone(), zeros(DType::I64, &[2, 2])]),
            "input mask: expected bool [batch, 2], got int64 [2, 2]"
        );
        assert_eq!(
            refusal(Kind::Forward, &[x.clone(), zeros(DType::Bool, &[3, 2])]),
            "input mask has 3 rows, but input 0 has 2"
        );
        assert_eq!(
            refusal(Kind::Backward, &[x, mask, zeros(DType::F32, &[2, 3, 1])]),
            "gradient of output: expected float32 [batch, 3], got float32 [2, 3, 1]"
        );
    }

    #[test]
    fn a_free_dimension_takes_any_length() {
        let descriptor = TensorDescriptor::batched(DType::F32, &[128, 4]);
        let schema = Schema::of(&ExpertInfo::simple(descriptor.clone(), descriptor), &[1]).unwrap();
        for length in [1, 128, 300] {
            let x = zeros(DType::F32, &[2, length, 4]);
            assert_eq!(schema.check_request(Kind::Forward, &[x], CHECKS), Ok(Rows(2)));
        }
        let wrong = schema.check_request(Kind::Forward, &[zeros(DType::F32, &[2, 128, 5])], CHECKS);
        let text = "input 0: expected float32 [batch, any, 4], got float32 [2, 128, 5]";
        assert_eq!(wrong, Err(ServeError::Invalid(text.to_owned())));
    }

    #[test]
    fn empty_oversized_and_non_finite_requests_are_refused() {
        let rows = |n| [zeros(DType::F32, &[n, 4]), zeros(DType::Bool, &[n, 2])];
        assert_eq!(refusal(Kind::Forward, &rows(0)), "a request of 0 rows; expected at least one");
        assert_eq!(refusal(Kind::Forward, &rows(9)), "a request of 9 rows is over this server's max_batch_size of 8");
        let nan = HostTensor::from_f32([1, 4], &[0.0, f32::NAN, 0.0, 0.0]).unwrap();
        assert_eq!(
            refusal(Kind::Forward, &[nan, zeros(DType::Bool, &[1, 2])]),
            "input 0 holds values that are not finite"
        );
    }

    #[test]
    fn a_scalar_or_a_schema_without_batch_dimension_is_refused() {
        let scalar = HostTensor::zeros(DType::F32, vec![]).unwrap();
        assert_eq!(
            refusal(Kind::Forward, &[scalar, zeros(DType::Bool, &[1, 2])]),
            "input 0: expected float32 [batch, 4], got float32 []"
        );
        let mut fixed = TensorDescriptor::batched(DType::F32, &[4]);
        fixed.size[0] = Some(3);
        let info = ExpertInfo::simple(fixed.clone(), TensorDescriptor::batched(DType::F32, &[4]));
        assert!(matches!(Schema::of(&info, &[]), Err(BackendError::Invalid(_))));
    }
}
