//! Host directories in the guest.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::Error;
use crate::config::{Caching, ShareTransport};
use vmlab_wire::message::Filesystem;

/// Bytes of one 9p message, the most that the guest's virtio transport takes: larger messages cost
/// fewer round trips.
const MSIZE_9P: u32 = 512_000;

/// Where the guest has what its own kernel shows.
pub(crate) const KERNELS_OWN: [&str; 3] = ["/dev", "/proc", "/sys"];

/// A host directory that the guest has at some place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Share {
    /// Directory on the host, absolute.
    pub host: PathBuf,
    /// Where the guest has it, absolute.
    pub guest: PathBuf,
    /// Whether the guest cannot change it. The host's side sees to that, whatever the guest does.
    pub read_only: bool,
}

impl FromStr for Share {
    type Err = Error;

    /// Reads `HOST[:GUEST][:ro|rw]`. A relative host path is taken from the working directory; the
    /// guest has it at the host's path unless another is given; it is writable unless `ro`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::Share { text: text.to_owned(), why: why.to_owned() };
        let mut parts: Vec<&str> = text.split(':').collect();
        let read_only = match parts.last() {
            Some(&"ro") if parts.len() > 1 => Some(true),
            Some(&"rw") if parts.len() > 1 => Some(false),
            _ => None,
        };
        if read_only.is_some() {
            parts.pop();
        }
        let (host, guest) = match parts[..] {
            [host] => (host, None),
            [host, guest] => (host, Some(guest)),
            _ => return Err(bad("it has too many parts")),
        };
        if host.is_empty() {
            return Err(bad("the host's directory is empty"));
        }
        let host = std::fs::canonicalize(host).map_err(|error| {
            bad(&format!("the host's directory {host} cannot be used ({error})"))
        })?;
        let guest = guest.map_or_else(|| host.clone(), PathBuf::from);
        let share = Self { host, guest, read_only: read_only.unwrap_or(false) };
        share.check().map_err(|why| bad(&why))?;
        Ok(share)
    }
}

impl Share {
    /// A writable share at the host's own path.
    pub fn new(host: impl Into<PathBuf>) -> Self {
        let host = host.into();
        Self { guest: host.clone(), host, read_only: false }
    }

    /// Puts it somewhere else in the guest.
    pub fn at(mut self, guest: impl Into<PathBuf>) -> Self {
        self.guest = guest.into();
        self
    }

    /// Makes it read-only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    fn check(&self) -> Result<(), String> {
        if !self.host.is_dir() {
            return Err(format!("{} is not a directory", self.host.display()));
        }
        let guest = &self.guest;
        if !guest.is_absolute() || guest.components().any(|c| c.as_os_str() == "..") {
            return Err(format!("the guest's path {} is not absolute", guest.display()));
        }
        if let Some(own) = KERNELS_OWN.iter().find(|own| guest.starts_with(own)) {
            return Err(format!("the guest's {own} is its own kernel's"));
        }
        if guest == Path::new("/") {
            return Err("the guest's root is not a share; see --rootfs".to_owned());
        }
        Ok(())
    }

    /// Checks a share that was made by parts.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        self.check().map_err(|why| self.error(&why))
    }

    /// What is wrong with a share that was made by parts.
    pub(crate) fn error(&self, why: &str) -> Error {
        let text = format!("{}:{}", self.host.display(), self.guest.display());
        Error::Share { text, why: why.to_owned() }
    }
}

/// How shares are to be carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ShareVia {
    /// Over virtio-fs where the kernel has it, else over 9p.
    #[default]
    Auto,
    /// Over this, and nothing else.
    Only(ShareTransport),
}

/// What the guest mounts to have a share.
pub(crate) fn filesystem(tag: &str, transport: ShareTransport, caching: Caching) -> Filesystem {
    let (kind, options) = match transport {
        ShareTransport::VirtioFs => ("virtiofs", String::new()),
        ShareTransport::NineP => {
            // `mmap` keeps only what is mapped, which compilers and linkers need of a writable
            // directory.
            let cache = match caching {
                Caching::Fixed => "loose",
                Caching::Coherent => "mmap",
            };
            ("9p", format!("trans=virtio,version=9p2000.L,msize={MSIZE_9P},cache={cache}"))
        }
    };
    Filesystem { kind: kind.to_owned(), source: tag.to_owned(), options }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().canonicalize().unwrap();
        let text = host.to_str().unwrap();
        let read = |text: &str| text.parse::<Share>().unwrap();
        assert_eq!(read(text), Share::new(&host));
        assert_eq!(read(&format!("{text}:/mnt")), Share::new(&host).at("/mnt"));
        assert_eq!(read(&format!("{text}:/mnt:ro")), Share::new(&host).at("/mnt").read_only());
        assert_eq!(read(&format!("{text}:rw")), Share::new(&host));
        for bad in ["", ":/mnt", "/nowhere/at/all", "/dev/null"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
        for bad in ["relative", "/", "/a/../b", "/a:/b", "/proc", "/dev/shm"] {
            let text = format!("{text}:{bad}");
            let error = text.parse::<Share>().unwrap_err().to_string();
            assert!(error.contains(&text), "{error}");
        }
    }
}
