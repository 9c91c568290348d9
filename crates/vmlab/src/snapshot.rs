//! Snapshots of VMs that are ready for a run, kept in the cache.
//!
//! A snapshot is taken where the agent is ready and nothing of any run is in the guest: no share, no
//! network, no command. What shapes it is in its key. It is checked each time before it is used, and
//! one that is not as it was written, or that a VM cannot go on from, is replaced by the run that finds
//! it so.

mod content;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmlab_artifacts::cache::{ContentStamp, Flaw, Freed, Lease};
use vmlab_artifacts::{Bound, Cache, ContentKey, Kind};

use crate::Error;
use crate::config::{Caching, NetworkMode, ShareDevice, ShareTransport, VmConfig, share_tag};
use crate::guest::Greeting;
use crate::hypervisor::{Hints, Hypervisor, Memory, Snapshot};
use crate::identity::boot_id;
use crate::random;
use crate::runs::{new_private_file, replace_private};
use crate::units::{Bytes, MIB};
use content::{checksum, save_memory};

/// The cache's kind of entries.
pub const KIND: &str = "snapshots";

/// Whether VMs start from snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SnapshotMode {
    /// From the one that is there; else the VM boots, and one is taken of it.
    #[default]
    Use,
    /// The VM boots in any case, and a snapshot of it replaces the one that is there.
    Renew,
    /// They boot, and no snapshot is taken or looked for.
    Never,
}

/// The version of entries; it rises when what is in them, or in a guest at its snapshot, changes in a way
/// that the key does not tell.
const VERSION: u32 = 1;

/// Digits of a snapshot's number.
const GENERATION_DIGITS: usize = 32;

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const CONSOLE: &str = "console";
/// A file that is in entries that no VM could go on from.
const CONDEMNED: &str = "condemned";
/// What hypervisors have learnt of VMs that went on from it.
const HINTS: &str = "hints";
/// Where the times and places of an entry's files are, as they were when their content was last checked.
const STAMP: &str = "stamp.json";

/// What an entry has, beside the content of its files.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    /// A number of this snapshot alone, which its file of states begins with.
    generation: String,
    greeting: Greeting,
    state: Checked,
    console: Checked,
    memory: Vec<Checked>,
    shares: u32,
    kept: u32,
}

/// A manifest and its checksum, a CRC-32 of it as JSON without spaces.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    checksum: u32,
    content: Manifest,
}

impl Sealed {
    fn of(content: Manifest) -> serde_json::Result<Self> {
        Ok(Self { checksum: crc32fast::hash(&serde_json::to_vec(&content)?), content })
    }
}

/// A file's length in bytes and its checksum, a CRC-32 of all that is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Checked {
    length: u64,
    checksum: u32,
}

/// A file as the kernel has it. As long as it stays the same and the host is not restarted, so does the
/// content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    /// The host's boot: what was not on disk when the host went down is lost.
    boot: String,
    files: Vec<ContentStamp>,
}

/// Names the variable that says how much all snapshots together may take.
pub const MAX_ENV: &str = "VMLAB_SNAPSHOTS_MAX";

/// How much that is unless it says so: some twenty-five guests of 512 MiB, and little of a laptop's disk.
const MAX: Bytes = Bytes(2048 * MIB);

/// Brings all snapshots together within their bound. Those in use stay, and of the others the ones that
/// were used last.
///
/// # Errors
/// When the variable is no size, or one cannot be removed.
pub(crate) fn prune(cache: &Cache) -> Result<Freed, Error> {
    Ok(cache.prune_to_size(KIND, max()?.0)?)
}

fn max() -> Result<Bytes, Error> {
    match std::env::var(MAX_ENV) {
        Ok(text) => text.parse().map_err(|source| Error::Size { variable: MAX_ENV, source }),
        Err(_) => Ok(MAX),
    }
}

/// For whoever looks after the cache.
pub(crate) const CACHE_KIND: Kind =
    Kind { name: KIND, bound: Bound::Bytes(MAX.0), verify: verify_all };

/// A place for the snapshot of one kind of VM.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    cache: Cache,
    key: String,
    empty: PathBuf,
    without_run: VmConfig,
}

/// A snapshot from the cache, which stays there as long as this does.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) snapshot: Snapshot,
    pub(crate) greeting: Greeting,
    entry: PathBuf,
    _lease: Lease,
}

/// How many shares a guest has at its snapshot whose places those of a run take: a root and a working
/// directory.
const SHARES: usize = 2;

/// A directory of the cache with nothing in it, for shares that no run has.
const EMPTY: &str = ".empty";

/// What a VM is without all that belongs to one run. It has shares where the run has, since finding their
/// devices is most of what a guest does when it goes on, but there is nothing in them.
fn without_run(config: &VmConfig, empty: &Path) -> VmConfig {
    let mut config = config.clone();
    // QEMU's own 9p server has no such devices.
    let shares = if config.served_shares().next().is_some() { SHARES } else { 0 };
    config.shares = (0..shares).map(|index| placeholder(index, empty)).collect();
    config.network = NetworkMode::None;
    config.lans.clear();
    config.disks.clear();
    config.vsock = None;
    config.rng = false;
    // All such VMs are.
    config.pluggable = false;
    // It restricts threads of the process, which a run has its own of.
    config.sandbox = true;
    // Tells the agent. First, so that the user's own arguments have the last word.
    if let Some(kernel) = config.boot.kernel_mut() {
        kernel.command_line.insert_str(0, "vmlab.snapshot ");
    }
    config
}

fn placeholder(index: usize, empty: &Path) -> ShareDevice {
    ShareDevice {
        tag: share_tag(index),
        path: empty.to_owned(),
        read_only: true,
        transport: ShareTransport::VirtioFs,
        caching: Caching::Fixed,
    }
}

impl Place {
    /// The place for snapshots of such a VM; `None` where none can be taken.
    ///
    /// # Errors
    /// When the kernel cannot be read, or the hypervisor is not there.
    pub(crate) fn of(
        cache: &Cache,
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
    ) -> Result<Option<Self>, Error> {
        max()?;
        let Some(kernel) = config.boot.kernel() else { return Ok(None) };
        // Nobody knows what they add to a VM.
        if !config.qemu_args.is_empty() || !hypervisor.capabilities().snapshot {
            return Ok(None);
        }
        let empty = cache.root().join(EMPTY);
        std::fs::create_dir_all(&empty).map_err(|e| unwritable(&empty, e))?;
        let config = without_run(config, &empty);
        let Some(identity) = hypervisor.snapshot_identity(&config, cache)? else { return Ok(None) };
        let read = |source| Error::Io {
            what: "read the kernel",
            path: kernel.image.clone(),
            source,
            hint: "",
        };
        let mut shape = config.clone();
        if let Some(kernel) = shape.boot.kernel_mut() {
            (kernel.image, kernel.initramfs) = Default::default();
        }
        let shape = serde_json::to_string(&shape).map_err(|e| read(e.into()))?;
        let key = ContentKey::new("snapshot-1")
            .field("version", VERSION.to_le_bytes())
            .field("hypervisor", hypervisor.name())
            .field("identity", identity)
            .field("shape", shape);
        let key = add_file(key, cache, "kernel", &kernel.image).map_err(read)?;
        let key = add_file(key, cache, "initramfs", &kernel.initramfs).map_err(read)?;
        Ok(Some(Self { cache: cache.clone(), key: key.finish(), empty, without_run: config }))
    }

    /// What the VM is of which a snapshot is taken.
    pub(crate) fn without_run(&self) -> VmConfig {
        self.without_run.clone()
    }

    /// A run's VM as one that goes on from a snapshot with so many shares: a guest whose device is not there
    /// could not even power off.
    pub(crate) fn with_all_shares(&self, config: &VmConfig, kept: u32) -> VmConfig {
        let mut config = config.clone();
        for index in config.shares.len()..kept as usize {
            config.shares.push(placeholder(index, &self.empty));
        }
        config
    }

    /// The snapshot that is there, else one that `take` takes; what that gives besides is handed out.
    /// Of several processes that want it at once, one takes it and the others wait, after `on_wait` was told.
    /// With `renew`, what is there is replaced in any case.
    ///
    /// # Errors
    /// What `take` returns; when the cache cannot be written or read.
    pub(crate) fn get_or_take<T>(
        &self,
        take: impl FnOnce() -> Result<(Snapshot, Greeting, T), Error>,
        on_wait: impl FnOnce(),
        (renew, until): (bool, Option<Instant>),
    ) -> Result<(Stored, Option<T>), Error> {
        let mut taken = None;
        let is_ours = Cell::new(!renew);
        let verify = |entry: &Path| match is_ours.get() {
            true => verify(entry),
            false => Err("another one is wanted".into()),
        };
        let build = |dir: &Path| -> Result<(), Error> {
            let (snapshot, greeting, more) = take()?;
            save(dir, &snapshot, greeting).map_err(|e| unwritable(dir, e))?;
            taken = Some(more);
            is_ours.set(true);
            Ok(())
        };
        let (cache, key) = (&self.cache, &self.key);
        let (entry, lease) =
            cache.get_or_build_unflushed(KIND, key, verify, build, |_| on_wait(), until)?;
        if taken.is_some() {
            prune(cache)?;
        }
        let (snapshot, greeting) = load(&entry).map_err(|source| Error::Io {
            what: "read the snapshot",
            path: entry.clone(),
            source,
            hint: "",
        })?;
        Ok((Stored { snapshot, greeting, entry, _lease: lease }, taken))
    }
}

impl Stored {
    /// Marks it as one that no VM can go on from.
    pub(crate) fn condemn(&self) {
        // Where it cannot be written, the next run finds the same, and does without as this one did.
        let _ = write(&self.entry.join(CONDEMNED), b"");
    }
}

/// Adds what is in a file. One in the cache is known by its entry's key.
fn add_file(key: ContentKey, cache: &Cache, name: &str, path: &Path) -> io::Result<ContentKey> {
    match path.strip_prefix(cache.root()).ok().and_then(Path::to_str) {
        Some(entry) => Ok(key.field(name, entry)),
        None => key.known_file(cache, name, path),
    }
}

fn unwritable(dir: &Path, source: io::Error) -> Error {
    Error::Io {
        what: "write the snapshot",
        path: dir.to_owned(),
        source,
        hint: "; --no-snapshot does without, VMLAB_CACHE_DIR chooses another place",
    }
}

fn memory_name(node: usize) -> String {
    format!("memory{node}")
}

/// Writes a file that only the user can read.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    new_private_file(path)?.write_all(content)
}

fn save(dir: &Path, snapshot: &Snapshot, greeting: Greeting) -> io::Result<()> {
    let generation = random::hex(GENERATION_DIGITS)?;
    let plain = |name: &str, content: &[&[u8]]| -> io::Result<Checked> {
        let content = content.concat();
        write(&dir.join(name), &content)?;
        Ok(Checked { length: content.len() as u64, checksum: crc32fast::hash(&content) })
    };
    let state = plain(STATE, &[generation.as_bytes(), &snapshot.state])?;
    let console = plain(CONSOLE, &[&snapshot.console])?;
    let mut memory = Vec::new();
    for (node, content) in snapshot.memory.iter().enumerate() {
        let (Memory::Own(file) | Memory::Template(file)) = content;
        let to = new_private_file(&dir.join(memory_name(node)))?;
        memory.push(save_memory(file, &to)?);
    }
    let (shares, kept) = (snapshot.shares, snapshot.kept);
    let manifest = Sealed::of(Manifest {
        version: VERSION,
        generation,
        greeting,
        state,
        console,
        memory,
        shares,
        kept,
    })?;
    write(&dir.join(MANIFEST), &serde_json::to_vec_pretty(&manifest)?)?;
    // All of this content was seen just now.
    let stamp = Stamp::of(dir, manifest.content.memory.len())?;
    write(&dir.join(STAMP), &serde_json::to_vec(&stamp)?)
}

impl Stamp {
    fn of(dir: &Path, nodes: usize) -> io::Result<Self> {
        let files = (0..nodes).map(|node| ContentStamp::of(&dir.join(memory_name(node))));
        Ok(Self { boot: boot_id()?, files: files.collect::<io::Result<_>>()? })
    }
}

fn manifest(entry: &Path) -> Result<Manifest, Flaw> {
    let read: Sealed = serde_json::from_slice(&std::fs::read(entry.join(MANIFEST))?)?;
    let Sealed { checksum, content } = Sealed::of(read.content)?;
    match content.version {
        _ if checksum != read.checksum => Err("its manifest is not what was written".into()),
        VERSION => Ok(content),
        other => Err(format!("it has version {other}, not {VERSION}").into()),
    }
}

/// Whether an entry is as it was written. The memory's content is read only where something may have
/// become of it.
pub(crate) fn verify(entry: &Path) -> Result<(), Flaw> {
    verify_how(entry, false)
}

/// As [`verify`], and reads all content in any case.
pub(crate) fn verify_all(entry: &Path) -> Result<(), Flaw> {
    verify_how(entry, true)
}

fn verify_how(entry: &Path, all: bool) -> Result<(), Flaw> {
    if entry.join(CONDEMNED).exists() {
        return Err("a VM could not go on from it".into());
    }
    let manifest = manifest(entry)?;
    state(entry, &manifest)?;
    plain(entry, CONSOLE, manifest.console)?;
    let now = Stamp::of(entry, manifest.memory.len())?;
    let stamp = std::fs::read(entry.join(STAMP)).ok();
    let stamp = stamp.and_then(|bytes| serde_json::from_slice::<Stamp>(&bytes).ok());
    if stamp.as_ref() == Some(&now) && !all {
        return Ok(());
    }
    for (node, expected) in manifest.memory.iter().enumerate() {
        let name = memory_name(node);
        let found = checksum(&File::open(entry.join(&name))?)?;
        if found != *expected {
            return Err(format!("its {name} is not what was written").into());
        }
    }
    if stamp.as_ref() != Some(&now) {
        // Where that cannot be done, all is read again the next time.
        let _ = replace_private(&entry.join(STAMP), &serde_json::to_vec(&now)?);
    }
    Ok(())
}

/// A small file's content, checked.
fn plain(entry: &Path, name: &str, expected: Checked) -> Result<Vec<u8>, Flaw> {
    let content = std::fs::read(entry.join(name))?;
    let found = Checked { length: content.len() as u64, checksum: crc32fast::hash(&content) };
    if found == expected {
        Ok(content)
    } else {
        Err(format!("its {name} is not what was written").into())
    }
}

fn state(entry: &Path, manifest: &Manifest) -> Result<Vec<u8>, Flaw> {
    let mut state = plain(entry, STATE, manifest.state)?;
    if !state.starts_with(manifest.generation.as_bytes()) {
        return Err("its state is of another snapshot".into());
    }
    state.drain(..manifest.generation.len());
    Ok(state)
}

fn load(entry: &Path) -> io::Result<(Snapshot, Greeting)> {
    let manifest = manifest(entry).map_err(io::Error::other)?;
    let state = state(entry, &manifest).map_err(io::Error::other)?;
    let console = plain(entry, CONSOLE, manifest.console).map_err(io::Error::other)?;
    let memory = (0..manifest.memory.len())
        .map(|node| {
            let file = File::open(entry.join(memory_name(node)))?;
            Ok(Memory::Template(Arc::new(file)))
        })
        .collect::<io::Result<_>>()?;
    let (shares, kept) = (manifest.shares, manifest.kept);
    let (state, console) = (state.into(), console.into());
    let hints = Some(Hints::at(entry.join(HINTS)));
    Ok((Snapshot { state, memory, console, shares, kept, run: None, hints }, manifest.greeting))
}

#[cfg(test)]
mod tests;
