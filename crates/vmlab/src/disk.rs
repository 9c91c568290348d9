//! Disks of the guest beside its root.

use std::path::PathBuf;
use std::str::FromStr;

use vmlab_artifacts::image::{DiskImage, open_data};

use vmlab_devices::blk;

use crate::Error;
use crate::config::{ConfigError, DiskDevice, DiskWrites, is_serial};

/// A disk that the guest has at `/dev/disk/by-id/virtio-NAME`: a file with an image, or a block device of
/// the host.
///
/// The file is never written to, unless its [`writes`](Self::writes) are to be kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Disk {
    /// What the guest knows it by. Without one, it is `disk` and its number among all disks, from 0 on.
    pub name: Option<String>,
    /// The file on the host.
    pub path: PathBuf,
    /// What becomes of writes.
    pub writes: DiskWrites,
    /// How vmlab itself serves it. Without, the hypervisor does.
    pub serve: Option<blk::Options>,
}

impl Disk {
    /// A disk whose writes are discarded: the guest sees them, and they are gone with the VM.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: Some(name.into()),
            path: path.into(),
            writes: DiskWrites::Discarded,
            serve: None,
        }
    }

    /// Says what becomes of writes.
    pub fn writes(mut self, writes: DiskWrites) -> Self {
        self.writes = writes;
        self
    }

    /// Has vmlab itself serve it, in this way. The file has to be raw.
    pub fn served(mut self, options: blk::Options) -> Self {
        self.serve = Some(options);
        self
    }

    /// Its name where it is the disk of this number.
    fn serial(&self, index: usize) -> String {
        self.name.clone().unwrap_or_else(|| format!("disk{index}"))
    }

    fn device(&self, index: usize) -> Result<DiskDevice, Error> {
        // What is opened so names no file elsewhere, whatever a guest may have written to it.
        let DiskImage { path, format, .. } = open_data(&self.path)?;
        Ok(DiskDevice {
            serial: self.serial(index),
            path,
            format,
            writes: self.writes,
            serve: self.serve.clone(),
        })
    }
}

impl FromStr for Disk {
    type Err = Error;

    /// Reads `FILE[:NAME][:ro|rw|discard]`. A relative path is taken from the working directory. Writes are
    /// discarded unless `rw` keeps them in the file or `ro` has them refused.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::Disk { text: text.to_owned(), why: why.to_owned() };
        let mut parts: Vec<&str> = text.split(':').collect();
        let mode = parts.last().and_then(|last| writes_named(last)).filter(|_| parts.len() > 1);
        if mode.is_some() {
            parts.pop();
        }
        let (path, name) = match parts[..] {
            [path] => (path, None),
            [path, name] => (path, Some(name)),
            _ => return Err(bad("it has too many parts")),
        };
        if path.is_empty() {
            return Err(bad("the file is empty"));
        }
        if let Some(serial) = name.filter(|name| !is_serial(name)) {
            return Err(bad(&ConfigError::Serial { serial: serial.to_owned() }.to_string()));
        }
        let (name, path) = (name.map(str::to_owned), PathBuf::from(path));
        Ok(Self { name, path, writes: mode.unwrap_or(DiskWrites::Discarded), serve: None })
    }
}

/// What users call what becomes of writes.
pub(crate) const MODES: [(&str, DiskWrites); 3] =
    [("discard", DiskWrites::Discarded), ("rw", DiskWrites::Kept), ("ro", DiskWrites::Refused)];

fn writes_named(name: &str) -> Option<DiskWrites> {
    MODES.iter().find(|(known, _)| *known == name).map(|(_, writes)| *writes)
}

/// The devices of all disks, in their order.
pub(crate) fn devices(disks: &[Disk]) -> Result<Vec<DiskDevice>, Error> {
    disks.iter().enumerate().map(|(index, disk)| disk.device(index)).collect()
}

/// The names of all disks, in their order.
pub(crate) fn serials(disks: &[Disk]) -> Vec<String> {
    disks.iter().enumerate().map(|(index, disk)| disk.serial(index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read() {
        let read = |text: &str| text.parse::<Disk>().unwrap();
        let unnamed = |writes| Disk { name: None, ..Disk::new("", "a.raw").writes(writes) };
        assert_eq!(read("a.raw"), unnamed(DiskWrites::Discarded));
        assert_eq!(read("a.raw:ro"), unnamed(DiskWrites::Refused));
        assert_eq!(read("a.raw:rw"), unnamed(DiskWrites::Kept));
        assert_eq!(read("a.raw:discard"), unnamed(DiskWrites::Discarded));
        assert_eq!(read("/a:data"), Disk::new("data", "/a"));
        assert_eq!(read("/a:data:rw"), Disk::new("data", "/a").writes(DiskWrites::Kept));
        // A file or a disk of such a name needs the last part.
        assert_eq!(read("rw"), Disk { name: None, ..Disk::new("", "rw") });
        assert_eq!(read("a:ro:discard"), Disk::new("ro", "a"));
        let long = format!("a:{}", "x".repeat(21));
        for bad in ["", ":data", "a:", "a:b/c", "a:b c", "a:b:c", "a:b:ro:rw", "a::ro", &long] {
            let error = bad.parse::<Disk>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{bad}`")), "{error}");
            assert!(error.contains("FILE[:NAME][:ro|rw|discard]"), "{error}");
        }
    }

    #[test]
    fn files_are_numbered_and_known_by_their_content() {
        use vmlab_artifacts::image::ImageFormat;
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.to_str().unwrap().parse::<Disk>().unwrap()
        };
        let blank = file("blank", &[0; 512]);
        let found = blank.device(3).unwrap();
        assert_eq!((found.serial.as_str(), found.format), ("disk3", ImageFormat::Raw));
        // A disk may have anything on it.
        assert_eq!(file("gz", b"\x1f\x8b\x08\0data").device(0).unwrap().format, ImageFormat::Raw);
        let own = Disk { name: Some("own".to_owned()), ..blank.clone() };
        assert_eq!(own.device(3).unwrap().serial, "own");
        assert_eq!(serials(&[blank.clone(), own, blank]), ["disk0", "own", "disk2"]);
        // What calls itself an image of some format has to be one.
        let cut = file("qcow2", b"QFI\xfb\0\0\0\x03").device(0).unwrap_err();
        assert!(cut.to_string().contains("qcow2"), "{cut}");
        for (path, why) in [("gone", "No such file"), ("", "directory")] {
            let disk = Disk::new("data", dir.path().join(path));
            let error = crate::error::chain(&disk.device(0).unwrap_err());
            assert!(error.contains(dir.path().to_str().unwrap()) && error.contains(why), "{error}");
        }
    }
}
