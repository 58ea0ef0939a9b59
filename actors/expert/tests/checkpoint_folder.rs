//! Checkpoints as files: whole or not at all, damage is seen, a folder has one server.

use std::{
    fs,
    path::{Path, PathBuf},
};

use skep_expert::{Checkpoint, CheckpointId, CheckpointStore, DirectoryCheckpoints, Manifest, Snapshot, StoreError};
use skep_wire::{DType, ExpertUid, HostTensor};

/// A folder of the test's own that goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("skep-checkpoints-{}-{name}", std::process::id()));
        let _left_over = fs::remove_dir_all(&path);
        Self(path)
    }

    fn open(&self) -> DirectoryCheckpoints {
        DirectoryCheckpoints::open(&self.0).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn uid() -> ExpertUid {
    "ffn.0.3".parse().unwrap()
}

/// A state with a tensor of every type, a scalar and an empty one.
fn checkpoint(step: u64) -> Checkpoint {
    let mut tensors: Vec<(String, HostTensor)> = DType::ALL
        .into_iter()
        .map(|dtype| {
            let bytes: Vec<u8> = (0..6 * dtype.size()).map(|i| (i as u64 + step) as u8 % 2).collect();
            (format!("module.{dtype}"), HostTensor::new(dtype, [3, 2], bytes.into()).unwrap())
        })
        .collect();
    tensors.push(("optimizer.step".to_owned(), HostTensor::from_f32([], &[step as f32]).unwrap()));
    tensors.push(("optimizer.nothing".to_owned(), HostTensor::zeros(DType::F32, [0, 4]).unwrap()));
    let manifest = Manifest {
        uid: uid().to_string(),
        class: "ffn".to_owned(),
        step,
        optimizer: "adam".to_owned(),
        settings: [("lr".to_owned(), 0.001)].into(),
        inputs: vec!["input 0: float32 [batch, 512]".to_owned()],
        outputs: vec!["output: float32 [batch, 512]".to_owned()],
    };
    Checkpoint { manifest, snapshot: Snapshot { step, tensors } }
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read_back_by_another_process() {
    let folder = Folder::new("round-trip");
    let store = folder.open();
    assert_eq!(store.write(&uid(), &checkpoint(7)).unwrap(), CheckpointId(1));
    drop(store);
    let store = folder.open();
    assert_eq!(store.experts().unwrap(), [uid()]);
    assert_eq!(store.list(&uid()).unwrap(), [CheckpointId(1)]);
    assert_eq!(store.read(&uid(), CheckpointId(1)).unwrap(), checkpoint(7));
    assert_eq!(store.list(&"ffn.0.4".parse().unwrap()).unwrap(), []);
}

#[test]
fn only_the_newest_are_kept_and_nothing_lies_about() {
    let folder = Folder::new("prune");
    let store = folder.open();
    for step in 0..5 {
        store.write(&uid(), &checkpoint(step)).unwrap();
    }
    // What a process that was killed while it wrote leaves behind.
    let path = store.folder(&uid());
    fs::write(path.join("00000006.safetensors"), b"half").unwrap();
    fs::write(path.join("00000007.json.tmp"), b"{").unwrap();
    fs::write(path.join("checkpoint_last.pt"), b"hivemind's").unwrap();
    store.prune(&uid(), 2).unwrap();
    let expected =
        ["00000004.json", "00000004.safetensors", "00000005.json", "00000005.safetensors", "checkpoint_last.pt"];
    assert_eq!(files(&path), expected);
    assert_eq!(store.list(&uid()).unwrap(), [CheckpointId(5), CheckpointId(4)]);
}

#[test]
fn a_write_that_was_cut_off_is_no_checkpoint_and_its_number_is_not_used_again() {
    let folder = Folder::new("cut-off");
    let store = folder.open();
    store.write(&uid(), &checkpoint(1)).unwrap();
    fs::write(store.folder(&uid()).join("00000002.safetensors"), b"half").unwrap();
    assert_eq!(store.list(&uid()).unwrap(), [CheckpointId(1)]);
    assert_eq!(store.write(&uid(), &checkpoint(2)).unwrap(), CheckpointId(3));
    assert_eq!(store.read(&uid(), CheckpointId(3)).unwrap(), checkpoint(2));
}

#[test]
fn every_flipped_bit_and_every_cut_is_seen() {
    let folder = Folder::new("damage");
    let store = folder.open();
    let id = store.write(&uid(), &checkpoint(3)).unwrap();
    let path = store.folder(&uid()).join("00000001.safetensors");
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert!(matches!(store.read(&uid(), id), Err(StoreError::Damaged { .. })), "bit in byte {at}");
    }
    for length in [0, 8, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let error = store.read(&uid(), id).unwrap_err();
        assert!(error.to_string().contains("bytes instead of"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(store.read(&uid(), id).unwrap_err().to_string().contains("missing"));
    fs::write(&path, &whole).unwrap();
    assert_eq!(store.read(&uid(), id).unwrap(), checkpoint(3));
    let manifest = path.with_extension("json");
    for text in ["", "{", "{\"format\": 2}", "[]"] {
        fs::write(&manifest, text).unwrap();
        assert!(matches!(store.read(&uid(), id), Err(StoreError::Damaged { .. })), "{text:?}");
    }
}

#[test]
fn a_folder_belongs_to_one_server_and_others_may_look() {
    let folder = Folder::new("lock");
    let store = folder.open();
    store.write(&uid(), &checkpoint(1)).unwrap();
    let second = DirectoryCheckpoints::open(&folder.0).unwrap_err();
    assert!(matches!(second, StoreError::InUse(_)), "{second}");
    let looking = DirectoryCheckpoints::reading(&folder.0).unwrap();
    assert_eq!(looking.read(&uid(), CheckpointId(1)).unwrap(), checkpoint(1));
    assert!(looking.write(&uid(), &checkpoint(2)).is_err() && looking.prune(&uid(), 0).is_err());
    drop(store);
    folder.open();
    assert!(DirectoryCheckpoints::reading(folder.0.join("nowhere")).is_err());
}

#[test]
fn a_manifest_can_be_read_by_a_person() {
    let folder = Folder::new("manifest");
    let store = folder.open();
    store.write(&uid(), &checkpoint(12)).unwrap();
    let text = fs::read_to_string(store.folder(&uid()).join("00000001.json")).unwrap();
    for line in ["\"uid\": \"ffn.0.3\"", "\"step\": 12", "\"optimizer\": \"adam\"", "float32 [batch, 512]"] {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
}
