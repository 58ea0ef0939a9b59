//! Values of Python as far as checkpoints hold them, and how they are written: pickle, protocol 2.

use skep_wire::HostTensor;

use super::storage;

/// A value of Python.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    /// In order; keys are text or numbers.
    Dict(Vec<(Value, Value)>),
    /// A dictionary of its own type, as state dicts of modules are.
    Ordered(Vec<(Value, Value)>),
    Tensor(HostTensor),
}

impl Value {
    pub fn text(text: &str) -> Self {
        Value::Text(text.to_owned())
    }

    /// What a dictionary has under a name.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries()?.iter().find(|(name, _)| matches!(name, Value::Text(name) if name == key)).map(|(_, v)| v)
    }

    pub fn entries(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Dict(entries) | Value::Ordered(entries) => Some(entries),
            _ => None,
        }
    }

    /// A dictionary with names as keys.
    pub fn dict<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Self {
        Value::Dict(entries.into_iter().map(|(name, value)| (Value::text(name), value)).collect())
    }
}

/// The pickle of a value and its tensors' bytes, which stand beside it under their numbers.
pub(super) fn write(value: &Value) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut writer = Writer { out: vec![0x80, 2], storages: Vec::new() };
    writer.value(value);
    writer.out.push(b'.');
    (writer.out, writer.storages)
}

struct Writer {
    out: Vec<u8>,
    storages: Vec<Vec<u8>>,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::None => self.out.push(b'N'),
            Value::Bool(value) => self.out.push(if *value { 0x88 } else { 0x89 }),
            Value::Int(number) => self.int(*number),
            Value::Float(number) => {
                self.out.push(b'G');
                self.out.extend(number.to_be_bytes());
            }
            Value::Text(text) => self.text(text),
            Value::List(items) => {
                self.out.extend(b"](");
                items.iter().for_each(|item| self.value(item));
                self.out.push(b'e');
            }
            Value::Tuple(items) => self.tuple(|writer| items.iter().for_each(|item| writer.value(item))),
            Value::Dict(entries) => {
                self.out.push(b'}');
                self.entries(entries);
            }
            Value::Ordered(entries) => {
                self.ordered();
                self.entries(entries);
            }
            Value::Tensor(tensor) => self.tensor(tensor),
        }
    }

    fn int(&mut self, number: i64) {
        match i32::try_from(number) {
            Ok(number) => {
                self.out.push(b'J');
                self.out.extend(number.to_le_bytes());
            }
            Err(_) => {
                self.out.extend([0x8a, 8]);
                self.out.extend(number.to_le_bytes());
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push(b'X');
        self.out.extend((text.len() as u32).to_le_bytes());
        self.out.extend(text.as_bytes());
    }

    fn tuple(&mut self, items: impl FnOnce(&mut Self)) {
        self.out.push(b'(');
        items(self);
        self.out.push(b't');
    }

    fn entries(&mut self, entries: &[(Value, Value)]) {
        self.out.push(b'(');
        for (key, value) in entries {
            self.value(key);
            self.value(value);
        }
        self.out.push(b'u');
    }

    /// An empty `OrderedDict`.
    fn ordered(&mut self) {
        self.out.extend(b"ccollections\nOrderedDict\n)R");
    }

    /// `torch._utils._rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`.
    fn tensor(&mut self, tensor: &HostTensor) {
        let number = self.storages.len();
        self.storages.push(tensor.data().to_vec());
        let elements = tensor.shape().iter().product::<usize>();
        self.out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n");
        self.tuple(|writer| {
            writer.tuple(|writer| {
                writer.text("storage");
                writer.out.extend(format!("ctorch\n{}\n", storage::name(tensor.dtype())).as_bytes());
                writer.text(&number.to_string());
                writer.text("cpu");
                writer.int(elements as i64);
            });
            writer.out.push(b'Q');
            writer.int(0);
            writer.tuple(|writer| tensor.shape().iter().for_each(|size| writer.int(*size as i64)));
            writer.tuple(|writer| storage::strides(tensor.shape()).iter().for_each(|s| writer.int(*s as i64)));
            writer.out.push(0x89);
            writer.ordered();
        });
        self.out.push(b'R');
    }
}
