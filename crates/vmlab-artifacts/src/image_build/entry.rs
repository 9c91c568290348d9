//! What is in a cache entry: `image.raw` and `entry.json`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use super::recipe::ImageRecipe;
use crate::cache::Flaw;
use crate::{ContentKey, Digest};

/// Raised when the layout changes; entries of other formats are built anew.
const FORMAT: u32 = 1;

pub(super) const IMAGE: &str = "image.raw";
const ENTRY: &str = "entry.json";

/// The content is hashed in blocks of this size; those of zeros are left out, so that it does not
/// matter where the file has holes.
const BLOCK: usize = 64 << 10;

/// The description of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    format: u32,
    pub(super) recipe: ImageRecipe,
    /// Of the suite's newest `Release` file.
    pub(super) date: String,
    size: u64,
    content: Digest,
}

/// Describes what was built in `dir`.
pub(super) fn finish(dir: &Path, recipe: &ImageRecipe, date: &str) -> io::Result<()> {
    let image = File::open(dir.join(IMAGE))?;
    let entry = Entry {
        format: FORMAT,
        recipe: recipe.clone(),
        date: date.to_owned(),
        size: image.metadata()?.len(),
        content: content(&image)?,
    };
    fs::write(dir.join(ENTRY), serde_json::to_vec_pretty(&entry)?)
}

pub(super) fn read(dir: &Path) -> Result<Entry, Flaw> {
    Ok(serde_json::from_slice(&fs::read(dir.join(ENTRY))?)?)
}

/// Checks what every run depends on: the format, and the image's size and first bytes.
pub(super) fn verify(dir: &Path) -> Result<(), Flaw> {
    let entry = read(dir)?;
    if entry.format != FORMAT {
        return Err(format!("it has format {} instead of {FORMAT}", entry.format).into());
    }
    let image = File::open(dir.join(IMAGE))?;
    let found = image.metadata()?.len();
    if found != entry.size {
        return Err(format!("its image has {found} bytes instead of {}", entry.size).into());
    }
    let mut first = [0; 1024];
    image.read_exact_at(&mut first, 0)?;
    match &first[510..520] == b"\x55\xaaEFI PART" {
        true => Ok(()),
        false => Err("its image has no partition table".into()),
    }
}

/// Checks an entry as [`verify`] does, and the content of the image.
pub(super) fn verify_all(dir: &Path) -> Result<(), Flaw> {
    verify(dir)?;
    match content(&File::open(dir.join(IMAGE))?)? == read(dir)?.content {
        true => Ok(()),
        false => Err("the content of its image has changed".into()),
    }
}

/// Where the next data of a file begins, at `from` or after it; none when there is no more.
pub(super) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The SHA-256 of all blocks that are not zero, with their places.
fn content(file: &File) -> io::Result<Digest> {
    let size = file.metadata()?.len();
    let mut key = ContentKey::new("disk-content-1").field("size", size.to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while let Some(data) = next_data(file, at)? {
        at = data - data % BLOCK as u64;
        let want = (size - at).min(BLOCK as u64) as usize;
        file.read_exact_at(&mut block[..want], at)?;
        if block[..want].iter().any(|byte| *byte != 0) {
            key = key.field("at", at.to_le_bytes()).field("block", &block[..want]);
        }
        at += want as u64;
        if at >= size {
            break;
        }
    }
    Ok(Digest::of(key.finish().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let image = File::create_new(dir.path().join(IMAGE)).unwrap();
        image.set_len(8 << 20).unwrap();
        image.write_all_at(b"\x55\xaaEFI PART", 510).unwrap();
        image.write_all_at(b"data", (3 << 20) + 5).unwrap();
        finish(dir.path(), &"debian:12".parse().unwrap(), "today").unwrap();
        (dir, image)
    }

    #[test]
    fn damage_is_found() {
        let (dir, image) = entry();
        verify_all(dir.path()).unwrap();
        // Where the holes are does not matter.
        image.write_all_at(&[0; 4096], 5 << 20).unwrap();
        verify_all(dir.path()).unwrap();
        image.write_all_at(b"dato", (3 << 20) + 5).unwrap();
        verify(dir.path()).unwrap();
        let error = verify_all(dir.path()).unwrap_err().to_string();
        assert!(error.contains("content"), "{error}");
        image.set_len(7 << 20).unwrap();
        assert!(verify(dir.path()).unwrap_err().to_string().contains("7340032 bytes"));
    }

    #[test]
    fn what_is_no_disk_is_no_entry() {
        let (dir, image) = entry();
        image.write_all_at(b"X", 512).unwrap();
        assert!(verify(dir.path()).unwrap_err().to_string().contains("partition table"));
        fs::remove_file(dir.path().join(ENTRY)).unwrap();
        assert!(verify(dir.path()).is_err());
    }
}
