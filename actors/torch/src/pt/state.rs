//! From the state dicts of `checkpoint_last.pt` to snapshots and back.

use std::collections::{BTreeMap, BTreeSet};

use skep_expert::{Checkpoint, Snapshot};
use skep_wire::HostTensor;

use super::{
    PtError, archive, bad,
    pickle::{self, Value},
    unpickle,
};
use crate::Schedule;

const MODULE: &str = "module.";
const OPTIMIZER: &str = "optimizer.";

/// The state in a file of hivemind's, as a snapshot of an expert whose fresh state is `fresh`; `parameters` are its
/// trainable tensors in the order of their registration, by which optimizers number them. Steps are counted by the
/// schedule, or else by the optimizer; plain SGD counts none.
pub fn read_checkpoint(file: &[u8], fresh: &Snapshot, parameters: &[String]) -> Result<Snapshot, PtError> {
    let entries = archive::read(file)?;
    let pickle = entries.get("data.pkl").ok_or_else(|| PtError("it has no data.pkl".to_owned()))?;
    if entries.get("byteorder").is_some_and(|order| *order != b"little") {
        return bad("it was written by a big-endian machine");
    }
    let file = unpickle::read(pickle, &entries)?;
    let module = file.get("module").and_then(Value::entries).ok_or_else(|| PtError("it has no module".to_owned()))?;
    let mut found = BTreeMap::new();
    for (name, value) in module {
        let (Value::Text(name), Value::Tensor(tensor)) = (name, value) else {
            return bad("the module's state is not one of tensors by name");
        };
        found.insert(format!("{MODULE}{name}"), tensor.clone());
    }
    if let Some(optimizer) = file.get("optimizer") {
        found.extend(optimizer_state(optimizer, parameters)?);
    }
    let step = file.get("scheduler").and_then(|scheduler| scheduler.get("last_epoch"));
    let step = match step {
        Some(Value::Int(step)) => u64::try_from(*step).map_err(|_| PtError(format!("{step} steps")))?,
        _ => counted(&found)?,
    };
    let names: BTreeSet<&String> = fresh.tensors.iter().map(|(name, _)| name).collect();
    if let Some(other) = found.keys().find(|name| !names.contains(name)) {
        return bad(format!("the expert to be hosted has no {other}; are class and optimizer those of the file?"));
    }
    let tensors = fresh.tensors.iter().map(|(name, tensor)| match found.remove(name) {
        Some(read) if (read.dtype(), read.shape()) != (tensor.dtype(), tensor.shape()) => {
            bad(format!("{name} is {} {:?}, not {} {:?}", read.dtype(), read.shape(), tensor.dtype(), tensor.shape()))
        }
        Some(read) => Ok((name.clone(), read)),
        // An optimizer has no state of a parameter before its first gradient; of random numbers hivemind saves nothing.
        None if !name.starts_with(MODULE) => Ok((name.clone(), tensor.clone())),
        None => bad(format!("{name} is missing")),
    });
    Ok(Snapshot { step, tensors: tensors.collect::<Result<_, _>>()? })
}

/// The optimizer's tensors by parameter and part.
fn optimizer_state(optimizer: &Value, parameters: &[String]) -> Result<Vec<(String, HostTensor)>, PtError> {
    let groups = match optimizer.get("param_groups") {
        Some(Value::List(groups)) if groups.len() == 1 => groups,
        _ => return bad("its optimizer has not exactly one group of parameters"),
    };
    match groups[0].get("params") {
        Some(Value::List(numbers)) if numbers.len() == parameters.len() => {}
        _ => return bad(format!("its optimizer has not {} parameters", parameters.len())),
    }
    let states = optimizer.get("state").and_then(Value::entries).unwrap_or_default();
    let mut found = Vec::new();
    for (number, state) in states {
        let index = if let Value::Int(number) = number { usize::try_from(*number).ok() } else { None };
        let Some(name) = index.and_then(|index| parameters.get(index)) else {
            return bad("its optimizer has a state of an unknown parameter");
        };
        for (part, value) in state.entries().unwrap_or_default() {
            let Value::Text(part) = part else { return bad("its optimizer has a state without a name") };
            let tensor = match value {
                Value::Tensor(tensor) => tensor.clone(),
                Value::None => continue,
                // Older versions of torch count steps as plain numbers.
                Value::Int(number) => scalar(*number as f32)?,
                _ => return bad(format!("its optimizer has {part} of an unknown kind")),
            };
            found.push((format!("{OPTIMIZER}{name}.{part}"), tensor));
        }
    }
    Ok(found)
}

fn scalar(value: f32) -> Result<HostTensor, PtError> {
    HostTensor::from_f32([], &[value]).map_err(|error| PtError(error.to_string()))
}

/// The most steps that an optimizer counted for any parameter.
fn counted(found: &BTreeMap<String, HostTensor>) -> Result<u64, PtError> {
    let mut most = 0.0f32;
    for (_, tensor) in found.iter().filter(|(name, _)| name.starts_with(OPTIMIZER) && name.ends_with(".step")) {
        let values = tensor.to_f32().map_err(|error| PtError(error.to_string()))?;
        most = values.into_iter().fold(most, f32::max);
    }
    Ok(most as u64)
}

/// The file that hivemind's server of the same class and optimizer reads.
pub fn write_checkpoint(checkpoint: &Checkpoint) -> Result<Vec<u8>, PtError> {
    let state = &checkpoint.snapshot.tensors;
    let module: Vec<(&str, &HostTensor)> =
        state.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(MODULE)?, tensor))).collect();
    let tensor = |tensor: &HostTensor| Value::Tensor(tensor.clone());
    let mut file = vec![(
        "module",
        Value::Ordered(module.iter().map(|(name, value)| (Value::text(name), tensor(value))).collect()),
    )];
    let settings = &checkpoint.manifest.settings;
    let number = |key: &str| settings.get(key).copied();
    let parameters = number("parameter_tensors").map_or(module.len(), |n| n as usize);
    let step = checkpoint.snapshot.step;
    let schedule = number("num_training_steps").map(|total| Schedule::Linear {
        warmup_steps: number("num_warmup_steps").unwrap_or_default() as u64,
        total_steps: total as u64,
    });
    if checkpoint.manifest.optimizer != "none" {
        let lr = number("lr").ok_or_else(|| PtError("the manifest does not tell the learning rate".to_owned()))?;
        let now = lr * schedule.unwrap_or_default().factor(step);
        let mut states = Vec::new();
        for (i, (name, _)) in module.iter().take(parameters).enumerate() {
            let prefix = format!("{OPTIMIZER}{name}.");
            let parts = state.iter().filter_map(|(full, value)| Some((full.strip_prefix(&prefix)?, value)));
            let parts: Vec<_> = parts.map(|(part, value)| (Value::text(part), tensor(value))).collect();
            if !parts.is_empty() {
                states.push((Value::Int(i as i64), Value::Dict(parts)));
            }
        }
        let mut group = vec![("lr", Value::Float(now))];
        group.extend(group_of(&checkpoint.manifest.optimizer, &number)?);
        if schedule.is_some() {
            group.push(("initial_lr", Value::Float(lr)));
        }
        group.push(("params", Value::List((0..parameters as i64).map(Value::Int).collect())));
        let groups = Value::List(vec![Value::dict(group)]);
        file.push(("optimizer", Value::dict([("state", Value::Dict(states)), ("param_groups", groups)])));
        if schedule.is_some() {
            let scheduler = [
                ("base_lrs", Value::List(vec![Value::Float(lr)])),
                ("last_epoch", Value::Int(step as i64)),
                ("_step_count", Value::Int(step as i64 + 1)),
                ("_get_lr_called_within_step", Value::Bool(false)),
                ("_last_lr", Value::List(vec![Value::Float(now)])),
                ("lr_lambdas", Value::List(vec![Value::None])),
            ];
            file.push(("scheduler", Value::dict(scheduler)));
        }
    }
    let (pickle, storages) = pickle::write(&Value::dict(file));
    let mut entries = vec![("data.pkl".to_owned(), pickle), ("byteorder".to_owned(), b"little".to_vec())];
    entries.extend(storages.into_iter().enumerate().map(|(i, bytes)| (format!("data/{i}"), bytes)));
    entries.push(("version".to_owned(), b"3\n".to_vec()));
    archive::write("checkpoint_last", &entries)
}

/// torch's options of a group of parameters, without learning rate and parameters.
fn group_of<'a>(optimizer: &str, number: &impl Fn(&str) -> Option<f64>) -> Result<Vec<(&'a str, Value)>, PtError> {
    let float = |key: &str| number(key).map(Value::Float).ok_or_else(|| PtError(format!("the manifest lacks {key}")));
    let no = Value::Bool(false);
    let mut group = vec![
        ("weight_decay", float("weight_decay")?),
        ("maximize", no.clone()),
        ("foreach", Value::None),
        ("differentiable", no.clone()),
        ("fused", Value::None),
    ];
    match optimizer {
        "sgd" => group.extend([
            ("momentum", float("momentum")?),
            ("dampening", Value::Float(0.0)),
            ("nesterov", Value::Bool(number("nesterov") == Some(1.0))),
        ]),
        "adam" | "adamw" => group.extend([
            ("betas", Value::Tuple(vec![float("beta1")?, float("beta2")?])),
            ("eps", float("eps")?),
            ("amsgrad", no.clone()),
            ("capturable", no),
            ("decoupled_weight_decay", Value::Bool(optimizer == "adamw")),
        ]),
        other => return bad(format!("hivemind has no optimizer {other:?}")),
    }
    Ok(group)
}
