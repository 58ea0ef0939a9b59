//! A checkpoint as bytes: tensors as safetensors, and a manifest that tells what they must be. Pure.

use std::borrow::Cow;

use safetensors::{Dtype, SafeTensors, tensor::View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use skep_wire::{DType, HostTensor};

use super::{Checkpoint, Manifest};
use crate::Snapshot;

/// Version of the layout; another one is not read.
const FORMAT: u32 = 1;

/// The manifest file: JSON.
#[derive(Serialize, Deserialize)]
struct ManifestFile {
    format: u32,
    #[serde(flatten)]
    manifest: Manifest,
    tensors: TensorsFile,
}

/// What the tensors' file must be.
#[derive(Serialize, Deserialize)]
pub(super) struct TensorsFile {
    pub bytes: u64,
    pub sha256: String,
    /// Names in the order of the state, which safetensors do not keep.
    names: Vec<String>,
}

/// A manifest file that was read.
pub(super) struct Sealed {
    manifest: Manifest,
    pub tensors: TensorsFile,
}

/// Bytes of manifest and tensors.
pub(super) fn encode(checkpoint: &Checkpoint) -> Result<(Vec<u8>, Vec<u8>), String> {
    let views = checkpoint.snapshot.tensors.iter().map(|(name, tensor)| (name.as_str(), Ref(tensor)));
    let tensors = safetensors::serialize(views, None).map_err(|error| error.to_string())?;
    let file = ManifestFile {
        format: FORMAT,
        manifest: Manifest { step: checkpoint.snapshot.step, ..checkpoint.manifest.clone() },
        tensors: TensorsFile {
            bytes: tensors.len() as u64,
            sha256: sha256(&tensors),
            names: checkpoint.snapshot.tensors.iter().map(|(name, _)| name.clone()).collect(),
        },
    };
    let mut manifest = serde_json::to_vec_pretty(&file).map_err(|error| error.to_string())?;
    manifest.push(b'\n');
    Ok((manifest, tensors))
}

/// Reads a manifest file.
pub(super) fn manifest(bytes: &[u8]) -> Result<Sealed, String> {
    let file: ManifestFile = serde_json::from_slice(bytes).map_err(|error| format!("its manifest: {error}"))?;
    if file.format != FORMAT {
        return Err(format!("its manifest has format {}; this skep reads {FORMAT}", file.format));
    }
    Ok(Sealed { manifest: file.manifest, tensors: file.tensors })
}

/// Reads the tensors that belong to a manifest. They share the given bytes.
pub(super) fn decode(sealed: Sealed, tensors: Vec<u8>) -> Result<Checkpoint, String> {
    let found = sha256(&tensors);
    if found != sealed.tensors.sha256 {
        return Err(format!("its tensors have the sum {found} instead of {}", sealed.tensors.sha256));
    }
    let bytes = bytes::Bytes::from(tensors);
    let parsed = SafeTensors::deserialize(&bytes).map_err(|error| format!("its tensors: {error}"))?;
    if parsed.len() != sealed.tensors.names.len() {
        return Err(format!("it has {} tensors instead of {}", parsed.len(), sealed.tensors.names.len()));
    }
    let tensors = sealed.tensors.names.into_iter().map(|name| {
        let view = parsed.tensor(&name).map_err(|error| format!("{name}: {error}"))?;
        let dtype = dtype(view.dtype()).ok_or_else(|| format!("{name} has the unknown dtype {:?}", view.dtype()))?;
        let tensor = HostTensor::new(dtype, view.shape(), bytes.slice_ref(view.data()));
        let tensor = tensor.map_err(|error| format!("{name}: {error}"))?;
        Ok((name, tensor))
    });
    let snapshot = Snapshot { step: sealed.manifest.step, tensors: tensors.collect::<Result<_, String>>()? };
    Ok(Checkpoint { manifest: sealed.manifest, snapshot })
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

struct Ref<'a>(&'a HostTensor);

impl View for Ref<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.dtype() {
            DType::F32 => Dtype::F32,
            DType::F64 => Dtype::F64,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I64 => Dtype::I64,
            DType::I32 => Dtype::I32,
            DType::I16 => Dtype::I16,
            DType::I8 => Dtype::I8,
            DType::U8 => Dtype::U8,
            DType::Bool => Dtype::BOOL,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.0.data())
    }

    fn data_len(&self) -> usize {
        self.0.data().len()
    }
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U8 => DType::U8,
        Dtype::BOOL => DType::Bool,
        _ => return None,
    })
}
