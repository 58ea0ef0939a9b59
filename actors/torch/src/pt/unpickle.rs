//! Reads the part of pickle that checkpoints use. Names are looked up in a short list; nothing is imported or called.

use std::collections::BTreeMap;

use super::{PtError, bad, pickle::Value, storage};

/// Values in one pickle.
const MAX_VALUES: usize = 1 << 20;
/// How deep values may lie in each other.
const MAX_DEPTH: usize = 32;

/// Where a value lies among all values; containers hold places, so that later additions are seen by all.
type Place = usize;

#[derive(Clone, Debug)]
enum Node {
    Mark,
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Place>),
    Tuple(Vec<Place>),
    Dict(Vec<(Place, Place)>),
    Ordered(Vec<(Place, Place)>),
    Name(String),
    Storage { kind: String, key: String },
    Tensor(skep_wire::HostTensor),
}

struct Machine<'a> {
    rest: &'a [u8],
    storages: &'a BTreeMap<String, &'a [u8]>,
    nodes: Vec<Node>,
    stack: Vec<Place>,
    memo: BTreeMap<u32, Place>,
}

/// The value of a pickle; tensors are taken from `storages` under `data/` and their key.
pub(super) fn read(pickle: &[u8], storages: &BTreeMap<String, &[u8]>) -> Result<Value, PtError> {
    let mut machine = Machine { rest: pickle, storages, nodes: Vec::new(), stack: Vec::new(), memo: BTreeMap::new() };
    while machine.step()? {}
    let result = machine.pop()?;
    machine.value(result, 0, &mut 0)
}

impl<'a> Machine<'a> {
    /// Runs one instruction; `false` at the end.
    fn step(&mut self) -> Result<bool, PtError> {
        match self.byte()? {
            0x80 => _ = self.byte()?,
            b'.' => return Ok(false),
            b'(' => self.push(Node::Mark)?,
            b'N' => self.push(Node::None)?,
            0x88 => self.push(Node::Bool(true))?,
            0x89 => self.push(Node::Bool(false))?,
            b'K' => {
                let number = self.byte()?;
                self.push(Node::Int(number.into()))?;
            }
            b'M' => {
                let bytes = self.array::<2>()?;
                self.push(Node::Int(u16::from_le_bytes(bytes).into()))?;
            }
            b'J' => {
                let bytes = self.array::<4>()?;
                self.push(Node::Int(i32::from_le_bytes(bytes).into()))?;
            }
            0x8a => {
                let length = self.byte()?.into();
                let number = long(self.take(length)?)?;
                self.push(Node::Int(number))?;
            }
            b'G' => {
                let bytes = self.array::<8>()?;
                self.push(Node::Float(f64::from_be_bytes(bytes)))?;
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array::<4>()?) as usize;
                let text =
                    std::str::from_utf8(self.take(length)?).map_err(|_| PtError("text is no UTF-8".to_owned()))?;
                self.push(Node::Text(text.to_owned()))?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Node::Name(format!("{module}.{name}")))?;
            }
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b')' => self.push(Node::Tuple(Vec::new()))?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items))?;
            }
            code @ 0x85..=0x87 => {
                let length = usize::from(code - 0x84);
                let start = self.stack.len().checked_sub(length).ok_or_else(empty)?;
                let items = self.stack.split_off(start);
                self.push(Node::Tuple(items))?;
            }
            b'q' => {
                let key = self.byte()?.into();
                self.keep(key)?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array::<4>()?);
                self.keep(key)?;
            }
            b'h' => {
                let key = self.byte()?.into();
                self.recall(key)?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array::<4>()?);
                self.recall(key)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set(items)?;
            }
            b'b' => {
                // The attributes of a state dict: versions of modules, which have no meaning here.
                self.pop()?;
                if !matches!(self.top()?, Node::Ordered(_)) {
                    return bad("an object with attributes of its own");
                }
            }
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            other => return bad(format!("pickle instruction {other:#04x}")),
        }
        Ok(true)
    }

    fn byte(&mut self) -> Result<u8, PtError> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], PtError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(|| PtError("the pickle is cut off".to_owned()))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PtError> {
        Ok(self.take(N)?.try_into().expect("just so many were taken"))
    }

    fn line(&mut self) -> Result<&'a str, PtError> {
        let end = self.rest.iter().position(|byte| *byte == b'\n');
        let line = self.take(end.ok_or_else(|| PtError("a name does not end".to_owned()))?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| PtError("a name is no text".to_owned()))
    }

    fn push(&mut self, node: Node) -> Result<(), PtError> {
        if self.nodes.len() >= MAX_VALUES || self.stack.len() >= MAX_VALUES {
            return bad("too many values");
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<Place, PtError> {
        self.stack.pop().ok_or_else(empty)
    }

    fn top(&mut self) -> Result<&mut Node, PtError> {
        let place = *self.stack.last().ok_or_else(empty)?;
        Ok(&mut self.nodes[place])
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Place>, PtError> {
        let mark = self.stack.iter().rposition(|place| matches!(self.nodes[*place], Node::Mark)).ok_or_else(empty)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn keep(&mut self, key: u32) -> Result<(), PtError> {
        self.memo.insert(key, *self.stack.last().ok_or_else(empty)?);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), PtError> {
        let place = *self.memo.get(&key).ok_or_else(|| PtError("a value that was never kept".to_owned()))?;
        if self.stack.len() >= MAX_VALUES {
            return bad("too many values");
        }
        self.stack.push(place);
        Ok(())
    }

    fn append(&mut self, items: Vec<Place>) -> Result<(), PtError> {
        match self.top()? {
            Node::List(list) => list.extend(items),
            _ => return bad("items for what is no list"),
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<Place>) -> Result<(), PtError> {
        let (Node::Dict(entries) | Node::Ordered(entries)) = self.top()? else {
            return bad("entries for what is no dictionary");
        };
        let pairs = items.chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return bad("a key without a value");
        }
        entries.extend(pairs.map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn tuple(&self, place: Place) -> Result<&[Place], PtError> {
        match &self.nodes[place] {
            Node::Tuple(items) => Ok(items),
            _ => bad("arguments that are no tuple"),
        }
    }

    /// `('storage', torch.FloatStorage, '0', 'cpu', 12)`; whatever device it was on, its bytes are in the file.
    fn persistent(&mut self) -> Result<(), PtError> {
        let id = self.pop()?;
        let [tag, kind, key, _device, _elements] = self.tuple(id)? else { return bad("a storage of another kind") };
        let storage = match (&self.nodes[*tag], &self.nodes[*kind], &self.nodes[*key]) {
            (Node::Text(tag), Node::Name(kind), Node::Text(key)) if tag == "storage" => {
                Node::Storage { kind: kind.clone(), key: key.clone() }
            }
            _ => return bad("a storage of another kind"),
        };
        self.push(storage)
    }

    fn reduce(&mut self) -> Result<(), PtError> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Node::Name(name) = &self.nodes[function] else { return bad("a call of what is no name") };
        let arguments = self.tuple(arguments)?;
        let made = match (name.as_str(), arguments) {
            ("collections.OrderedDict", []) => Node::Ordered(Vec::new()),
            ("torch._utils._rebuild_tensor_v2", [storage, offset, size, stride, ..]) => {
                self.tensor(*storage, *offset, *size, *stride)?
            }
            ("torch._utils._rebuild_parameter", [tensor, ..]) => self.nodes[*tensor].clone(),
            _ => return bad(format!("{name} is no part of a checkpoint")),
        };
        self.push(made)
    }

    fn tensor(&self, storage: Place, offset: Place, size: Place, stride: Place) -> Result<Node, PtError> {
        let Node::Storage { kind, key } = &self.nodes[storage] else { return bad("a tensor without a storage") };
        let kind = kind.strip_prefix("torch.").unwrap_or(kind);
        let dtype = storage::dtype(kind).ok_or_else(|| PtError(format!("tensors of {kind} are not read")))?;
        let bytes = self.storages.get(&format!("data/{key}"));
        let bytes = bytes.ok_or_else(|| PtError(format!("storage {key} is missing")))?;
        let number = |place: &Place| match &self.nodes[*place] {
            Node::Int(number) => usize::try_from(*number).map_err(|_| PtError(format!("{number} as a size"))),
            _ => bad("a size that is no number"),
        };
        let shape = self.tuple(size)?.iter().map(number).collect::<Result<Vec<_>, _>>()?;
        let steps = self.tuple(stride)?.iter().map(number).collect::<Result<Vec<_>, _>>()?;
        Ok(Node::Tensor(storage::view(bytes, dtype, number(&offset)?, &shape, &steps)?))
    }

    /// The value at a place, with all that it holds.
    fn value(&self, place: Place, depth: usize, count: &mut usize) -> Result<Value, PtError> {
        *count += 1;
        if depth > MAX_DEPTH || *count > MAX_VALUES {
            return bad("values too deep in each other, or too many");
        }
        let mut all = |places: &[Place]| -> Result<Vec<Value>, PtError> {
            places.iter().map(|place| self.value(*place, depth + 1, count)).collect()
        };
        Ok(match &self.nodes[place] {
            Node::None => Value::None,
            Node::Bool(value) => Value::Bool(*value),
            Node::Int(number) => Value::Int(*number),
            Node::Float(number) => Value::Float(*number),
            Node::Text(text) => Value::Text(text.clone()),
            Node::Tensor(tensor) => Value::Tensor(tensor.clone()),
            Node::List(items) => Value::List(all(items)?),
            Node::Tuple(items) => Value::Tuple(all(items)?),
            Node::Dict(entries) => Value::Dict(self.pairs(entries, depth, count)?),
            Node::Ordered(entries) => Value::Ordered(self.pairs(entries, depth, count)?),
            Node::Name(name) => return bad(format!("{name} is no value")),
            Node::Mark | Node::Storage { .. } => return bad("a value that is none"),
        })
    }

    fn pairs(
        &self,
        entries: &[(Place, Place)],
        depth: usize,
        count: &mut usize,
    ) -> Result<Vec<(Value, Value)>, PtError> {
        let mut pair = |(key, value): &(Place, Place)| {
            Ok((self.value(*key, depth + 1, count)?, self.value(*value, depth + 1, count)?))
        };
        entries.iter().map(&mut pair).collect()
    }
}

fn empty() -> PtError {
    PtError("a pickle that takes more than there is".to_owned())
}

/// A little-endian number of any length.
fn long(bytes: &[u8]) -> Result<i64, PtError> {
    if bytes.len() > 8 {
        return bad("a number beyond 64 bits");
    }
    let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Ok(i64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use skep_wire::HostTensor;

    use super::*;
    use crate::pt::pickle;

    fn round_trip(value: &Value) -> Value {
        let (pickle, storages) = pickle::write(value);
        let keyed = storages.iter().enumerate().map(|(i, bytes)| (format!("data/{i}"), bytes.as_slice()));
        read(&pickle, &keyed.collect()).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let tensor = Value::Tensor(HostTensor::from_f32([2, 1, 3], &[1., 2., 3., 4., 5., 6.]).unwrap());
        let scalar = Value::Tensor(HostTensor::from_f32([], &[7.]).unwrap());
        let value = Value::dict([
            ("module", Value::Ordered(vec![(Value::text("w"), tensor), (Value::text("ü.b"), scalar)])),
            ("numbers", Value::List(vec![Value::Int(-3), Value::Int(1 << 40), Value::Float(0.1), Value::Bool(true)])),
            ("nested", Value::Dict(vec![(Value::Int(0), Value::Tuple(vec![Value::None]))])),
            ("empty", Value::List(vec![])),
        ]);
        assert_eq!(round_trip(&value), value);
    }

    #[test]
    fn names_that_would_run_something_are_errors() {
        for pickle in [
            &b"cos\nsystem\n(X\x02\x00\x00\x00lstR."[..],
            b"cbuiltins\neval\n)R.",
            b"c__main__\nThing\n)\x81.",
            b"cos\nsystem\n.",
            b"}}b.",
        ] {
            assert!(read(pickle, &BTreeMap::new()).is_err());
        }
    }

    #[test]
    fn cycles_bombs_and_nonsense_are_errors() {
        // A list that holds itself, and lists of lists of lists twice each: 2^40 values.
        assert!(read(b"]q\x00h\x00a.", &BTreeMap::new()).is_err());
        let mut bomb = b"]q\x00".to_vec();
        for i in 0..40u8 {
            bomb.extend([b']', b'q', i + 1, b'(', b'h', i, b'h', i, b'e']);
        }
        bomb.push(b'.');
        assert!(read(&bomb, &BTreeMap::new()).is_err());
        for pickle in [&b""[..], b".", b"t.", b"\x87.", b"e.", b"h\x00.", b"X\xff\xff\xff\xffa.", b"(Q.", b")R."] {
            assert!(read(pickle, &BTreeMap::new()).is_err(), "{pickle:?}");
        }
        let (pickle, _) = pickle::write(&Value::dict([("a", Value::Int(1))]));
        for length in 0..pickle.len() {
            assert!(read(&pickle[..length], &BTreeMap::new()).is_err());
        }
    }
}
