//! Keys made from all that shapes an entry.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Cache;

/// How much of a file is read at a time.
const CHUNK: usize = 256 * 1024;

/// The SHA-256 of a file's content. It is shown as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest([u8; 32]);

impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Digest {
    /// Of what was hashed piece by piece.
    pub(crate) fn from_hash(hash: Sha256) -> Digest {
        Digest(hash.finalize().into())
    }

    /// Hashes what is in memory.
    pub fn of(content: &[u8]) -> Digest {
        Digest(Sha256::digest(content).into())
    }

    /// Hashes a file; [`Cache::digest`] does so once for each state of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_file(path: &Path) -> io::Result<Digest> {
        let mut file = File::open(path)?;
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(Digest(hash.finalize().into())),
                n => hash.update(&chunk[..n]),
            }
        }
    }
}

/// Builds a key from named fields: SHA-256 over each name and value with its length before it.
///
/// The lengths keep `("ab", "c")` and `("a", "bc")` apart, the domain keeps two uses apart that
/// happen to have the same fields. Raise the domain's number when the builder changes.
///
/// ```
/// use vmlab_artifacts::ContentKey;
/// let key = ContentKey::new("initramfs-1").field("release", "6.12").field("modules", "virtio");
/// assert_eq!(key.finish().len(), 64);
/// ```
#[derive(Debug, Clone)]
pub struct ContentKey {
    hash: Sha256,
}

impl ContentKey {
    /// Starts a key for one use, such as `initramfs-1`.
    pub fn new(domain: &str) -> ContentKey {
        ContentKey { hash: Sha256::new() }.field("domain", domain)
    }

    /// Adds a field.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> ContentKey {
        self.bytes(name.as_bytes());
        self.bytes(value.as_ref());
        self
    }

    /// Adds a file's content as a field.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn file(self, name: &str, path: &Path) -> io::Result<ContentKey> {
        Ok(self.field(name, Digest::of_file(path)?))
    }

    /// As [`file`](ContentKey::file), with the same result; the content of a file that is as it was is not
    /// read again.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn known_file(self, cache: &Cache, name: &str, path: &Path) -> io::Result<ContentKey> {
        Ok(self.field(name, cache.digest(path)?))
    }

    /// The key: 64 hexadecimal digits.
    pub fn finish(self) -> String {
        Digest(self.hash.finalize().into()).to_string()
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_run_into_each_other() {
        let one = ContentKey::new("t").field("ab", "c").finish();
        let two = ContentKey::new("t").field("a", "bc").finish();
        let three = ContentKey::new("u").field("ab", "c").finish();
        assert_ne!(one, two);
        assert_ne!(one, three);
        assert_eq!(one, ContentKey::new("t").field("ab", "c").finish());
        assert!(one.bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn files_count_by_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; CHUNK + 1]).unwrap();
        let one = ContentKey::new("t").file("f", &path).unwrap().finish();
        std::fs::write(&path, vec![7; CHUNK]).unwrap();
        let two = ContentKey::new("t").file("f", &path).unwrap().finish();
        assert_ne!(one, two);
        assert!(ContentKey::new("t").file("f", &dir.path().join("none")).is_err());
    }
}
