//! Files of a guest that are kept when a target fails.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use crate::units::MIB;
use crate::{Error, Stdio, Vm};

/// How much of a guest's files is kept: a core file or two, and no full disk for the host.
const MAX_BYTES: u64 = 1024 * MIB;

/// How many of its files.
const MAX_FILES: usize = 10_000;

/// Where they are, in an attempt's directory.
const DIR: &str = "files";

/// Packs what fits the patterns in its arguments. Links are followed, so that nothing but files arrives.
const PACK: &str = r#"
shopt -s nullglob dotglob globstar
IFS=
files=()
for pattern in "$@"; do files+=($pattern); done
[ ${#files[@]} -gt 0 ] || exit 0
exec tar -c --dereference --hard-dereference --ignore-failed-read --warning=no-file-changed -- "${files[@]}"
"#;

/// Copies the files that fit the patterns to below `dir`, and says where they are. What cannot be kept is
/// noted.
///
/// # Errors
/// When the guest cannot be asked.
pub(super) fn keep(
    vm: &Vm,
    patterns: &[String],
    dir: &Path,
    notes: &mut Vec<String>,
) -> Result<Vec<PathBuf>, Error> {
    let mut child = vm
        .command("bash")
        .args(["-c", PACK, "bash"])
        .args(patterns)
        .stdin(Stdio::Null)
        .stderr(Stdio::Null)
        .spawn()?;
    let Some(archive) = child.stdout.take() else { return Ok(Vec::new()) };
    let files = unpack(archive, &dir.join(DIR), (MAX_BYTES, MAX_FILES));
    match files {
        Ok(files) => {
            let status = child.wait()?;
            if !status.success() {
                notes.push(format!("files to keep: packing them in the guest gave {status}"));
            }
            Ok(files)
        }
        Err(error) => {
            notes.push(format!("files to keep: {error}"));
            Ok(Vec::new())
        }
    }
}

/// Unpacks regular files, within limits, to where no name can lead out of `dir`: a guest is not trusted.
fn unpack(
    archive: impl Read,
    dir: &Path,
    (max_bytes, max_files): (u64, usize),
) -> io::Result<Vec<PathBuf>> {
    let mut kept = Vec::new();
    let mut left = max_bytes;
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Some(path) = below(dir, &entry.path()?) else { continue };
        if kept.len() == max_files {
            return Err(io::Error::other(format!("there are more than {max_files}")));
        }
        left = left.checked_sub(entry.size()).ok_or_else(|| {
            io::Error::other(format!("they have more than {} MiB", max_bytes / MIB))
        })?;
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
        io::copy(&mut entry, &mut file)?;
        kept.push(path);
    }
    Ok(kept)
}

/// The place of a name below a directory.
fn below(dir: &Path, name: &Path) -> Option<PathBuf> {
    let mut path = dir.to_owned();
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (path != dir).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_ustar();
            // Set as it is: the library refuses names that a guest may well send.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_size(content.len() as u64);
            if *kind == tar::EntryType::Symlink {
                header.set_link_name("/etc").unwrap();
            }
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;

    #[test]
    fn files_arrive_below_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let packed = archive(&[
            ("var/log/a", FILE, b"one"),
            ("/b", FILE, b"two"),
            ("../out", FILE, b"no"),
            ("x/../../out", FILE, b"no"),
            ("link", tar::EntryType::Symlink, b""),
            ("link/c", FILE, b"three"),
            ("fifo", tar::EntryType::Fifo, b""),
        ]);
        let top = dir.path().join("files");
        let kept = unpack(packed.as_slice(), &top, (100, 10)).unwrap();
        assert_eq!(kept, ["var/log/a", "b", "link/c"].map(|name| top.join(name)));
        assert_eq!(std::fs::read(&kept[2]).unwrap(), b"three");
        assert!(!dir.path().join("out").exists() && top.join("link").is_dir());
    }

    #[test]
    fn a_guest_cannot_fill_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let packed = archive(&[("a", FILE, b"12345"), ("b", FILE, b"12345")]);
        let error = unpack(packed.as_slice(), &dir.path().join("1"), (9, 10)).unwrap_err();
        assert!(error.to_string().contains("more than 0 MiB"), "{error}");
        unpack(packed.as_slice(), &dir.path().join("2"), (10, 2)).unwrap();
        let error = unpack(packed.as_slice(), &dir.path().join("3"), (10, 1)).unwrap_err();
        assert!(error.to_string().contains("more than 1"), "{error}");
        // The same name twice is not written over.
        let packed = archive(&[("a", FILE, b"1"), ("a", FILE, b"2")]);
        unpack(packed.as_slice(), &dir.path().join("4"), (10, 2)).unwrap_err();
    }
}
