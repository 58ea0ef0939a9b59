//! The zip file around a pickle: entries without compression, as `torch.save` writes them.

use std::collections::BTreeMap;

use super::{PtError, bad};

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
/// Bytes of the end record without its comment.
const END_SIZE: usize = 22;
/// Entries of one file; a checkpoint has one a tensor.
const MAX_ENTRIES: usize = 1 << 16;
/// Tensors begin at multiples of this, as in files of torch.
const ALIGNMENT: usize = 64;

/// A little-endian reader that never reads beyond its bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn at(bytes: &'a [u8], offset: usize) -> Result<Self, PtError> {
        bytes.get(offset..).map(Self).ok_or_else(|| PtError("the file is cut off".to_owned()))
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], PtError> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or_else(|| PtError("the file is cut off".to_owned()))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<usize, PtError> {
        let bytes = self.take(2)?;
        Ok(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    }

    fn u32(&mut self) -> Result<u32, PtError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

/// The entries of an archive by their names behind the first folder: `data.pkl`, `data/0`.
pub(super) fn read(file: &[u8]) -> Result<BTreeMap<String, &[u8]>, PtError> {
    let last = file.len().saturating_sub(END_SIZE);
    let first = last.saturating_sub(usize::from(u16::MAX));
    let end = (first..=last).rev().find(|at| file[*at..].starts_with(&END.to_le_bytes()));
    let Some(end) = end else { return bad("no zip file; files of torch before 1.6 are not read") };
    let mut fields = Fields::at(file, end + 10)?;
    let entries = fields.u16()?;
    let (_size, start) = (fields.u32()?, fields.u32()?);
    if entries >= MAX_ENTRIES - 1 || start == u32::MAX {
        return bad("the file is too large");
    }
    let mut found = BTreeMap::new();
    let mut central = Fields::at(file, start as usize)?;
    for _ in 0..entries {
        if central.u32()? != CENTRAL {
            return bad("the zip file's directory is damaged");
        }
        central.take(6)?;
        let method = central.u16()?;
        central.take(4)?;
        let sum = central.u32()?;
        let (packed, size) = (central.u32()?, central.u32()?);
        let (name, extra, comment) = (central.u16()?, central.u16()?, central.u16()?);
        central.take(8)?;
        let offset = central.u32()?;
        let name = String::from_utf8_lossy(central.take(name)?).into_owned();
        central.take(extra + comment)?;
        if method != 0 || packed != size || size == u32::MAX || offset == u32::MAX {
            return bad(format!("{name} is compressed or larger than 4 GiB"));
        }
        let content = local(file, offset as usize, size as usize)?;
        if crc32(content) != sum {
            return bad(format!("{name} is damaged"));
        }
        let name = name.split_once('/').map_or(name.as_str(), |(_, rest)| rest).to_owned();
        found.insert(name, content);
    }
    Ok(found)
}

fn local(file: &[u8], offset: usize, size: usize) -> Result<&[u8], PtError> {
    let mut fields = Fields::at(file, offset)?;
    if fields.u32()? != LOCAL {
        return bad("an entry of the zip file is damaged");
    }
    fields.take(22)?;
    let (name, extra) = (fields.u16()?, fields.u16()?);
    fields.take(name + extra)?;
    fields.take(size)
}

/// An archive of these entries, in one folder.
pub(super) fn write(folder: &str, entries: &[(String, Vec<u8>)]) -> Result<Vec<u8>, PtError> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    if entries.len() >= MAX_ENTRIES - 1 {
        return bad(format!("{} tensors are too many for one file", entries.len()));
    }
    for (name, content) in entries {
        let name = format!("{folder}/{name}");
        let size = u32::try_from(content.len()).ok().filter(|size| *size < u32::MAX);
        let offset = u32::try_from(file.len()).ok().filter(|offset| *offset < u32::MAX);
        let (Some(size), Some(offset)) = (size, offset) else {
            return bad("a checkpoint of 4 GiB or more does not fit into such a file");
        };
        // An extra field of torch's own, "FB", fills the gap before an aligned entry.
        let unpadded = file.len() + 30 + name.len() + 4;
        let padding = unpadded.next_multiple_of(ALIGNMENT) - unpadded;
        let mut extra = vec![b'F', b'B'];
        extra.extend((padding as u16).to_le_bytes());
        extra.resize(4 + padding, b'Z');
        let mut common = Vec::new();
        // Version, flags, method; time and date, which torch leaves out, too; sum and sizes.
        common.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        common.extend(crc32(content).to_le_bytes());
        common.extend(size.to_le_bytes());
        common.extend(size.to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        file.extend(LOCAL.to_le_bytes());
        file.extend(&common);
        file.extend((extra.len() as u16).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend(&extra);
        file.extend(content);
        directory.extend(CENTRAL.to_le_bytes());
        directory.extend([0, 0]);
        directory.extend(&common);
        // No extra field, no comment, disk 0, no attributes.
        directory.extend([0; 12]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let start = u32::try_from(file.len()).map_err(|_| PtError("the file is too large".to_owned()))?;
    let size = directory.len() as u32;
    file.extend(directory);
    file.extend(END.to_le_bytes());
    file.extend([0; 4]);
    file.extend(count);
    file.extend(count);
    file.extend(size.to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0; 2]);
    Ok(file)
}

/// The sum of zip files (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    static TABLE: [u32; 256] = table();
    !bytes.iter().fold(!0, |crc, byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut value, mut bit) = (i as u32, 0);
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ 0xedb8_8320 } else { value >> 1 };
            bit += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_zip_files() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn entries_come_back_and_tensors_are_aligned() {
        let entries = [("data.pkl".to_owned(), vec![1, 2, 3]), ("data/0".to_owned(), vec![7; 100])];
        let file = write("archive", &entries).unwrap();
        let found = read(&file).unwrap();
        assert_eq!(found.len(), 2);
        for (name, content) in &entries {
            assert_eq!(found[name], content);
            assert_eq!((found[name].as_ptr() as usize - file.as_ptr() as usize) % ALIGNMENT, 0);
        }
    }

    #[test]
    fn damage_is_seen_wherever_it_is_and_never_panics() {
        let file = write("archive", &[("data.pkl".to_owned(), vec![1, 2, 3])]).unwrap();
        for length in 0..file.len() {
            assert!(read(&file[..length]).is_err());
        }
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x40;
            let _error_or_the_same = read(&bad).map(|entries| entries.get("data.pkl").map(|bytes| bytes.len()));
        }
        let content = file.len() - END_SIZE - 46 - "archive/data.pkl".len() - 1;
        let mut bad = file.clone();
        bad[content] ^= 1;
        assert!(read(&bad).is_err());
    }
}
