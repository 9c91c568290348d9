//! Which QEMU this is.

use std::fs;
use std::path::Path;

use vmlab_artifacts::Cache;

use super::Qemu;
use crate::hypervisor::HypervisorError;

impl Qemu {
    /// What tells this QEMU from any other version or build of it: the digest of its program, as
    /// hexadecimal digits. A program that is as it was is not read again.
    ///
    /// # Errors
    /// When the program is not there or cannot be read.
    pub fn fingerprint(&self, cache: &Cache) -> Result<String, HypervisorError> {
        fingerprint(&self.program()?, cache)
    }
}

/// The digest of a program's content.
fn fingerprint(program: &Path, cache: &Cache) -> Result<String, HypervisorError> {
    // By its real path, so that all names of one program share what is remembered.
    let digest = fs::canonicalize(program).and_then(|real| cache.digest(&real));
    let identify = |source| HypervisorError::Identify { program: program.to_owned(), source };
    digest.map(|digest| digest.to_string()).map_err(identify)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::write(&one, "version 1").unwrap();
        std::os::unix::fs::symlink("one", &two).unwrap();
        let first = fingerprint(&one, &cache).unwrap();
        assert_eq!(first.len(), 64);
        assert_eq!(fingerprint(&two, &cache).unwrap(), first);
        fs::write(&one, "version 2").unwrap();
        assert_ne!(fingerprint(&two, &cache).unwrap(), first);
        fs::remove_file(&one).unwrap();
        let error = fingerprint(&two, &cache).unwrap_err();
        assert!(error.to_string().contains("two cannot be read"), "{error}");
    }
}
