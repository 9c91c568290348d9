//! Templates: disks with a filesystem, each made once, in a VM of its own, and copied for each run.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmlab_artifacts::cache::{Flaw, Leases};
use vmlab_artifacts::{Bound, Cache, ContentKey, Kind};
use vmlab_devices::sparse;

use super::{Disk, Mkfs, content, filesystem};
use crate::config::DiskWrites;
use crate::units::Bytes;
use crate::{Error, Share, Stdio, VmBuilder};

/// The kind of the cache's entries.
pub(crate) const CACHE_KIND: Kind =
    Kind { name: KIND, bound: Bound::Bytes(KEPT), verify: |entry| check(entry, Depth::Content) };

/// The name of that kind.
pub const KIND: &str = "disks";

/// How much is kept, in bytes on disk; the least recently used go first.
const KEPT: u64 = 10 << 30;

/// The disk of an entry.
const DISK: &str = "disk.raw";

/// What is known of it.
const ABOUT: &str = "template.json";

/// Up to this many bytes of data, all of it is looked at at each look-up; it takes a few milliseconds.
const READ_AT_LOOKUP: u64 = 32 * 1024 * 1024;

/// Where the VM that makes a template has what goes into it, and the disk.
const CONTENT: &str = "/run/vmlab-content";
const MOUNT: &str = "/run/vmlab-template";

/// The disk's name there.
const SERIAL: &str = "template";

/// How long it may take, unless a VM of the caller's may take as long as that: much content takes minutes.
pub(crate) const MAKING_TIME: Duration = Duration::from_secs(30 * 60);

/// What is known of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// What it was made under, in the cache.
    #[serde(default)]
    pub key: String,
    /// Its filesystem; `None` for a disk of zeroes.
    pub filesystem: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// The program that made it, with its arguments.
    pub command: Vec<String>,
    /// What that program says of its version.
    pub version: String,
    /// The kernel under which it ran.
    pub kernel: String,
    /// Where its content came from.
    pub content: Option<PathBuf>,
    /// The SHA-256 over each piece of its data, with the place of each.
    pub sha256: String,
}

/// A template that is wanted.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) size: Bytes,
    pub(super) mkfs: Option<&'a Mkfs>,
    /// How many like it the same VM has before it. They have other UUIDs.
    pub(super) copy: usize,
}

impl Wanted<'_> {
    /// The file of the template, from the cache if it is there.
    pub(super) fn get(
        &self,
        builder: &VmBuilder,
        (cache, leases): (&Cache, &Leases),
    ) -> Result<PathBuf, Error> {
        let root = builder.root_of_programs().to_owned();
        let key = self.key(&root, cache)?;
        let (entry, lease) = cache.get_or_build_leased(
            KIND,
            &key,
            |entry| check(entry, Depth::LookUp),
            |dir| self.make(builder, &root, dir),
            |_| builder.told().phase("waiting for a disk"),
        )?;
        leases.add(lease);
        // What is in use stays, and what cannot be made room for is no reason to fail.
        let _ = cache.prune_to_size(KIND, KEPT);
        Ok(entry.join(DISK))
    }

    fn key(&self, root: &Path, cache: &Cache) -> Result<String, Error> {
        let key = ContentKey::new("disk-1").field("size", self.size.0.to_le_bytes());
        let Some(mkfs) = self.mkfs else { return Ok(key.finish()) };
        let program = find(root, &filesystem::program(&mkfs.name))?;
        let unreadable =
            |source| Error::Io { what: "read", path: program.clone(), source, hint: "" };
        let mut key = key
            .field("words", filesystem::words(mkfs).join("\0"))
            .field("copy", self.copy.to_le_bytes())
            .known_file(cache, "program", &program)
            .map_err(unreadable)?;
        // What distributions set of the defaults.
        let settings = root.join("etc/mke2fs.conf");
        if mkfs.name.starts_with("ext") && settings.exists() {
            key = key.known_file(cache, "settings", &settings).map_err(unreadable)?;
        }
        if let Some(path) = &mkfs.content {
            key = content::key(key, cache, path)?;
        }
        Ok(key.finish())
    }

    /// Makes it in a directory of the cache that is not there for others yet.
    fn make(&self, builder: &VmBuilder, root: &Path, dir: &Path) -> Result<(), Error> {
        let path = dir.join(DISK);
        let failed = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { what, path, source, hint: "" }
        };
        let disk = File::options().read(true).write(true).create_new(true).open(&path);
        let disk = disk.map_err(failed("make the disk", &path))?;
        disk.set_len(self.size.0).map_err(failed("make the disk", &path))?;
        let mut about = Template {
            key: String::new(),
            filesystem: self.mkfs.map(|mkfs| mkfs.name.clone()),
            size: self.size.0,
            command: Vec::new(),
            version: String::new(),
            kernel: String::new(),
            content: self.mkfs.and_then(|mkfs| mkfs.content.clone()),
            sha256: String::new(),
        };
        if let Some(mkfs) = self.mkfs {
            builder.told().phase("making a disk");
            about.command = filesystem::words(mkfs);
            (about.version, about.kernel) =
                in_a_vm(builder, root, mkfs, &path).map_err(|error| {
                    match (error, is_full(dir)) {
                        // The guest was told of errors of its disk, and knows no more.
                        (Error::Template { command, how, said }, true) => {
                            let how = format!("{how}; No space left on {}", dir.display());
                            Error::Template { command, how, said }
                        }
                        (other, _) => other,
                    }
                })?;
            filesystem::look(&disk, &mkfs.name, self.size.0).map_err(|why| Error::Template {
                command: about.command.join(" "),
                how: "has left no filesystem".to_owned(),
                said: why,
            })?;
        }
        about.sha256 = digest(&disk).map_err(failed("read", &path))?;
        // Nobody is to change it by mistake.
        let read_only = fs::Permissions::from_mode(0o400);
        fs::set_permissions(&path, read_only).map_err(failed("protect", &path))?;
        let text = serde_json::to_vec_pretty(&about).unwrap_or_default();
        let about = dir.join(ABOUT);
        fs::write(&about, text).map_err(failed("write", &about))
    }
}

/// Whether the file system of a directory has no room left that would be worth the name.
fn is_full(dir: &Path) -> bool {
    const ROOM: u64 = 1 << 20;
    rustix::fs::statvfs(dir).is_ok_and(|found| found.f_bavail * found.f_frsize < ROOM)
}

/// A program of the root that a guest will have.
fn find(root: &Path, program: &str) -> Result<PathBuf, Error> {
    let dirs = ["usr/sbin", "sbin", "usr/bin", "bin", "usr/local/sbin"];
    let found = dirs.iter().map(|dir| root.join(dir).join(program)).find(|path| path.exists());
    found.ok_or_else(|| Error::NoMkfs { program: program.to_owned(), root: root.to_owned() })
}

/// Makes the filesystem. Returns the version of the program, and the kernel's release.
fn in_a_vm(
    builder: &VmBuilder,
    root: &Path,
    mkfs: &Mkfs,
    path: &Path,
) -> Result<(String, String), Error> {
    let disk = Disk::new(SERIAL, path).writes(DiskWrites::Kept);
    let mut maker = builder.sibling_on(root).disk(disk);
    let content = mkfs.content.as_deref();
    if let Some(dir) = content.filter(|path| !content::is_archive(path)) {
        maker = maker.share(Share::new(dir).at(CONTENT).read_only());
    }
    let vm = maker.start()?;
    let device = format!("/dev/disk/by-id/virtio-{SERIAL}");
    let words = filesystem::words(mkfs);
    let run = |command: &str, words: &[String], input: Option<File>| -> Result<(), Error> {
        let [program, arguments @ ..] = words else { return Ok(()) };
        let stdin = if input.is_some() { Stdio::Piped } else { Stdio::Null };
        let mut child = vm.command(program).args(arguments).stdin(stdin).merge_stderr().spawn()?;
        let written = child.stdin.take().zip(input).map(|(mut to, mut from)| {
            // A program that ends before all was read says why.
            std::thread::spawn(move || _ = io::copy(&mut from, &mut to))
        });
        let mut said = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            // As much as a person reads; the rest has to go somewhere. What cannot be read, the end tells.
            let _ = stdout.by_ref().take(SAID_MAX).read_to_end(&mut said);
            let _ = io::copy(&mut stdout, &mut io::sink());
        }
        let status = child.wait()?;
        drop(written);
        match status.success() {
            true => Ok(()),
            false => Err(Error::Template {
                command: command.to_owned(),
                how: status.to_string(),
                said: String::from_utf8_lossy(&said).trim().to_owned(),
            }),
        }
    };
    let words_for = |text: &[&str]| text.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    run(&words.join(" "), &[&words[..], std::slice::from_ref(&device)].concat(), None)?;
    if let Some(source) = content {
        let mount = ["mount", "-t", &mkfs.name, &device, MOUNT];
        run("mkdir", &words_for(&["mkdir", "-p", MOUNT]), None)?;
        run(&mount.join(" "), &words_for(&mount), None)?;
        if content::is_archive(source) {
            let archive = File::open(source).map_err(|source_error| Error::Io {
                what: "read the content of a disk",
                path: source.to_owned(),
                source: source_error,
                hint: "",
            })?;
            let mut tar =
                words_for(&["tar", "-x", "-p", "--numeric-owner", "-C", MOUNT, "-f", "-"]);
            tar.extend(content::decompressor(source).map(str::to_owned));
            run("tar", &tar, Some(archive))?;
        } else {
            let from = format!("{CONTENT}/.");
            run("cp", &words_for(&["cp", "-a", &from, MOUNT]), None)?;
        }
        run("umount", &words_for(&["umount", MOUNT]), None)?;
    }
    // Its version is for people: no program has to tell it.
    let version = vm.exec([words[0].as_str(), "-V"]).ok().map(|output| {
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned()
    });
    let release = vm.release().to_owned();
    vm.shutdown()?;
    Ok((version.unwrap_or_default(), release))
}

/// As much of what a program says as is shown, in bytes.
const SAID_MAX: u64 = 16 * 1024;

/// How closely an entry is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// At each use: size and superblock, and the content of small ones.
    LookUp,
    /// All of it.
    Content,
}

fn check(entry: &Path, depth: Depth) -> Result<(), Flaw> {
    let about = read(entry)?;
    let disk = File::open(entry.join(DISK))?;
    let size = disk.metadata()?.len();
    if size != about.size {
        return Err(format!("the disk has {size} bytes instead of {}", about.size).into());
    }
    if let Some(name) = &about.filesystem {
        filesystem::look(&disk, name, size)?;
    }
    if depth == Depth::Content || sparse::data(&disk)? <= READ_AT_LOOKUP {
        let found = digest(&disk)?;
        if found != about.sha256 {
            return Err(format!("its content has the SHA-256 {found}, not {}", about.sha256).into());
        }
    }
    Ok(())
}

fn read(entry: &Path) -> Result<Template, Flaw> {
    let about: Template = serde_json::from_slice(&fs::read(entry.join(ABOUT))?)?;
    let key = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Template { key, ..about })
}

/// Of all data. Where a filesystem keeps zeroes as data, another may have a hole, so zeroes do not count.
fn digest(disk: &File) -> io::Result<String> {
    use std::os::unix::fs::FileExt;
    const BLOCK: usize = 4096;
    let mut key = ContentKey::new("disk-data-1");
    let mut buffer = vec![0; 1 << 20];
    for piece in sparse::pieces(disk) {
        let Range { start, end } = piece?;
        let mut at = start / BLOCK as u64 * BLOCK as u64;
        while at < end {
            let part = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            disk.read_exact_at(&mut buffer[..part], at)?;
            for (number, block) in buffer[..part].chunks(BLOCK).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    let place = at + (number * BLOCK) as u64;
                    key = key.field("at", place.to_le_bytes()).field("data", block);
                }
            }
            at += part as u64;
        }
    }
    Ok(key.finish())
}

/// All templates of the cache, those that can be read.
///
/// # Errors
/// When the cache cannot be read.
pub fn templates(cache: &Cache) -> Result<Vec<Template>, Error> {
    let entries = cache.entries(KIND)?;
    Ok(entries.iter().filter_map(|entry| read(&entry.path).ok()).collect())
}

/// Removes a template, by the beginning of its key; `None` if there is none, or several.
///
/// # Errors
/// When it is in use, or cannot be removed.
pub fn remove(cache: &Cache, key: &str) -> Result<Option<String>, Error> {
    let entries = cache.entries(KIND)?;
    let mut found = entries.iter().filter(|entry| entry.key.starts_with(key));
    match (found.next(), found.next()) {
        (Some(entry), None) => {
            cache.remove(KIND, &entry.key)?;
            Ok(Some(entry.key.clone()))
        }
        _ => Ok(None),
    }
}
