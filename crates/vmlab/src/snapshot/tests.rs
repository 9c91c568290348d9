use std::ffi::OsString;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use vmlab_artifacts::Arch;
use vmlab_devices::net::MacAddress;
use vmlab_wire::message::Ready;

use super::*;
use crate::config::{
    Accel, AgentChannel, Caching, KernelBoot, LanDevice, Machine, ShareDevice, ShareTransport,
    Topology, VmConfigBuilder, VsockDevice,
};
use crate::hypervisor::{Capabilities, HypervisorError, ProbeReport, StartOptions, VmHandle};
use crate::units::{Bytes, MIB};

const PAGE: u64 = 4096;

/// As long as each memory file of these tests is, in bytes.
const LENGTH: u64 = 4 << 20;

/// All that an entry is checked for, but the memory.
const SMALL: [&str; 3] = [MANIFEST, STATE, CONSOLE];

/// A memory with these bytes at these places.
fn memory(content: &[(u64, &[u8])]) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LENGTH).unwrap();
    for (at, bytes) in content {
        file.write_all_at(bytes, *at).unwrap();
    }
    Arc::new(file)
}

/// Two snapshots of different seeds differ in all that they have.
fn snapshot(seed: u8) -> Snapshot {
    let page = vec![seed; PAGE as usize];
    let node = |at| Memory::Own(memory(&[(at, &page), (LENGTH - 5, &[seed; 5])]));
    Snapshot {
        state: vec![seed; 1000].into(),
        memory: vec![node(PAGE), node(LENGTH / 2)],
        console: format!("the console of {seed}\n").into_bytes().into(),
        shares: 2,
        run: None,
        hints: None,
        kept: u32::from(seed % 3),
    }
}

fn greeting(seed: u8) -> Greeting {
    let ready = Ready {
        release: format!("6.{seed}"),
        started_ns: 1,
        ready_ns: u64::from(seed),
        steps: Vec::new(),
        modules: Vec::new(),
        revivable: 0,
    };
    Greeting { ready, warnings: vec!["a warning".to_owned()] }
}

/// An entry in a directory of its own.
fn entry(seed: u8) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &snapshot(seed), greeting(seed)).unwrap();
    dir
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn flaw(entry: &Path) -> Option<String> {
    verify(entry).err().map(|flaw| flaw.to_string())
}

/// Makes the times of last change look as if nobody had been there, as far as a user can.
fn garble_unseen(file: &Path, at: u64) {
    let open = File::options().write(true).open(file).unwrap();
    let before = open.metadata().unwrap().modified().unwrap();
    open.write_all_at(&[0xa5], at).unwrap();
    open.set_modified(before).unwrap();
}

/// Declares that the memory was checked as it now is.
fn stamp(entry: &Path, change: impl FnOnce(&mut Stamp)) {
    let mut stamp = Stamp::of(entry, 2).unwrap();
    change(&mut stamp);
    std::fs::write(entry.join(STAMP), serde_json::to_vec(&stamp).unwrap()).unwrap();
}

fn read_stamp(entry: &Path) -> Stamp {
    serde_json::from_slice(&std::fs::read(entry.join(STAMP)).unwrap()).unwrap()
}

#[test]
fn what_is_saved_is_loaded() {
    let dir = entry(3);
    assert_eq!(names(dir.path()), [CONSOLE, MANIFEST, "memory0", "memory1", STAMP, STATE]);
    assert_eq!(flaw(dir.path()), None);
    verify_all(dir.path()).unwrap();
    let (loaded, told) = load(dir.path()).unwrap();
    let original = snapshot(3);
    assert_eq!(loaded.state, original.state);
    assert_eq!(loaded.console, original.console);
    assert_eq!((told.ready, told.warnings), (greeting(3).ready, greeting(3).warnings));
    let bytes = |memory: &Memory| {
        let (Memory::Own(file) | Memory::Template(file)) = memory;
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert_eq!(loaded.memory.len(), 2);
    for (loaded, original) in loaded.memory.iter().zip(&original.memory) {
        assert!(matches!(loaded, Memory::Template(_)), "one VM's changes would be in the next");
        assert_eq!(bytes(loaded), bytes(original));
    }
    for name in names(dir.path()) {
        let meta = dir.path().join(&name).metadata().unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600, "{name}");
        assert!(meta.blocks() * 512 < LENGTH / 8, "{name} has no holes");
    }
}

#[test]
fn each_file_that_is_not_as_it_was_written_is_found() {
    type Damage = (&'static str, fn(&Path, &Path));
    let ways: [Damage; 7] = [
        ("cut by a byte", |file, _| cut(file, |length| length - 1)),
        ("cut in half", |file, _| cut(file, |length| length / 2)),
        ("empty", |file, _| cut(file, |_| 0)),
        ("longer", |file, _| cut(file, |length| length + PAGE)),
        ("missing", |file, _| std::fs::remove_file(file).unwrap()),
        ("another snapshot's", |file, other| {
            std::fs::copy(other, file).unwrap();
        }),
        ("another snapshot's, moved there", |file, other| {
            std::fs::remove_file(file).unwrap();
            std::fs::hard_link(other, file).unwrap();
        }),
    ];
    for name in SMALL.into_iter().chain(["memory0", "memory1"]) {
        for (way, damage) in ways {
            let (dir, other) = (entry(1), entry(2));
            damage(&dir.path().join(name), &other.path().join(name));
            assert!(flaw(dir.path()).is_some(), "{name}: {way}");
        }
    }
}

fn cut(file: &Path, length: impl FnOnce(u64) -> u64) {
    let open = File::options().write(true).open(file).unwrap();
    open.set_len(length(open.metadata().unwrap().len())).unwrap();
}

#[test]
fn each_changed_byte_of_a_small_file_is_found() {
    let dir = entry(1);
    for name in SMALL {
        let path = dir.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            // Space that only a person sees.
            if name == MANIFEST && whole[at].is_ascii_whitespace() {
                continue;
            }
            for bit in [0x01, 0x20, 0x80] {
                let mut garbled = whole.clone();
                garbled[at] ^= bit;
                std::fs::write(&path, &garbled).unwrap();
                assert!(flaw(dir.path()).is_some(), "{name}: byte {at}, bit {bit:#x}");
            }
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(flaw(dir.path()), None);
    }
}

#[test]
fn each_changed_page_of_the_memory_is_found() {
    for (name, at) in [
        ("memory0", 0),
        ("memory0", PAGE),
        ("memory0", LENGTH - 1),
        ("memory1", LENGTH / 2 + 77),
        ("memory1", LENGTH / 2 - 1),
    ] {
        let dir = entry(1);
        garble_unseen(&dir.path().join(name), at);
        let found = flaw(dir.path());
        assert_eq!(found, Some(format!("its {name} is not what was written")), "at {at}");
        // It is not taken for checked afterwards.
        assert!(flaw(dir.path()).is_some(), "{name} at {at}: the second look is content");
    }
}

#[test]
fn memory_that_nobody_touched_is_not_read_again() {
    let dir = entry(1);
    garble_unseen(&dir.path().join("memory0"), PAGE);
    stamp(dir.path(), |_| {});
    // That is as if the disk itself had lied: it costs all to find that.
    assert_eq!(flaw(dir.path()), None);
    assert!(verify_all(dir.path()).is_err());
}

#[test]
fn after_a_restart_of_the_host_all_is_read() {
    // What was on its way to the disk was lost, and the filesystem has the times all the same.
    let dir = entry(1);
    garble_unseen(&dir.path().join("memory1"), LENGTH / 2);
    stamp(dir.path(), |stamp| stamp.boot = "another boot".to_owned());
    assert_eq!(flaw(dir.path()).unwrap(), "its memory1 is not what was written");
    assert_eq!(read_stamp(dir.path()).boot, "another boot");

    let dir = entry(1);
    stamp(dir.path(), |stamp| stamp.boot = "another boot".to_owned());
    assert_eq!(flaw(dir.path()), None);
    assert_eq!(read_stamp(dir.path()), Stamp::of(dir.path(), 2).unwrap(), "it is not renewed");
    assert_eq!(names(dir.path()).len(), SMALL.len() + 3, "{:?}", names(dir.path()));
}

/// What becomes of a file.
type Way = fn(&Path);

#[test]
fn a_stamp_that_is_of_no_use_is_made_anew() {
    let ways: [(&str, Way); 5] = [
        ("missing", |stamp| std::fs::remove_file(stamp).unwrap()),
        ("empty", |stamp| cut(stamp, |_| 0)),
        ("cut", |stamp| cut(stamp, |length| length - 3)),
        ("noise", |stamp| std::fs::write(stamp, b"\xff\x00{}").unwrap()),
        ("without files", |stamp| {
            let mut content: Stamp =
                serde_json::from_slice(&std::fs::read(stamp).unwrap()).unwrap();
            content.files.clear();
            std::fs::write(stamp, serde_json::to_vec(&content).unwrap()).unwrap();
        }),
    ];
    for (way, damage) in ways {
        for garbled in [false, true] {
            let dir = entry(1);
            if garbled {
                garble_unseen(&dir.path().join("memory0"), PAGE);
            }
            damage(&dir.path().join(STAMP));
            assert_eq!(flaw(dir.path()).is_some(), garbled, "{way}");
            let renewed = std::fs::read(dir.path().join(STAMP)).ok();
            let renewed = renewed.and_then(|bytes| serde_json::from_slice::<Stamp>(&bytes).ok());
            let now = Stamp::of(dir.path(), 2).unwrap();
            assert_eq!(renewed.as_ref() == Some(&now), !garbled, "{way}");
        }
    }
}

#[test]
fn memory_that_was_copied_or_touched_is_read_and_accepted() {
    let dir = entry(1);
    let path = dir.path().join("memory0");
    let before = read_stamp(dir.path());
    let copied = dir.path().join("copied");
    std::fs::copy(&path, &copied).unwrap();
    std::fs::rename(&copied, &path).unwrap();
    assert_eq!(flaw(dir.path()), None);
    let renewed = read_stamp(dir.path());
    assert_ne!(renewed, before);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(SystemTime::now() - Duration::from_secs(1000))
        .unwrap();
    assert_eq!(flaw(dir.path()), None);
    assert_ne!(read_stamp(dir.path()), renewed);
}

#[test]
fn an_entry_of_another_version_is_not_used() {
    let dir = entry(1);
    let mut content = manifest(dir.path()).unwrap();
    content.version = 999_999;
    let sealed = serde_json::to_vec(&Sealed::of(content).unwrap()).unwrap();
    std::fs::write(dir.path().join(MANIFEST), sealed).unwrap();
    assert!(flaw(dir.path()).unwrap().contains("999999"));
}

#[test]
fn checksums_are_of_the_content_and_not_of_its_holes() {
    let page = [7; PAGE as usize];
    let sum = |file: &File| checksum(file).unwrap();
    let holes = memory(&[(8 * PAGE, &page)]);
    let zeros = memory(&[(0, &vec![0; LENGTH as usize]), (8 * PAGE, &page)]);
    assert_eq!(sum(&holes), sum(&zeros));
    // The place counts, and so does the length.
    assert_ne!(sum(&holes), sum(&memory(&[(9 * PAGE, &page)])));
    let longer = memory(&[(8 * PAGE, &page)]);
    longer.set_len(LENGTH + PAGE).unwrap();
    assert_ne!(sum(&holes), sum(&longer));
    // A chunk is neither the first nor the last place of anything.
    for at in [0, 1, PAGE - 1, PAGE, 256 * 1024 - 1, 256 * 1024, LENGTH - 1] {
        assert_ne!(sum(&memory(&[])), sum(&memory(&[(at, &[1])])), "{at}");
    }
    // A length that is no multiple of a page.
    let odd = memory(&[(LENGTH - PAGE, &page)]);
    odd.set_len(LENGTH - 10).unwrap();
    let copy = tempfile::tempfile().unwrap();
    assert_eq!(save_memory(&odd, &copy).unwrap(), sum(&odd));
    assert_eq!(sum(&copy), sum(&odd));
}

/// A hypervisor that only says who it is.
#[derive(Debug)]
struct Fake {
    identity: Option<&'static str>,
    can: bool,
}

const FAKE: Fake = Fake { identity: Some("one"), can: true };

impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn find(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn probe(&self) -> Result<ProbeReport, HypervisorError> {
        unreachable!("nothing starts it")
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = crate::hypervisor::qemu::Qemu::new().capabilities();
        capabilities.snapshot = self.can;
        capabilities
    }

    fn snapshot_identity(
        &self,
        _: &VmConfig,
        _: &Cache,
    ) -> Result<Option<String>, HypervisorError> {
        Ok(self.identity.map(str::to_owned))
    }

    fn start(&self, _: &VmConfig, _: StartOptions) -> Result<Arc<dyn VmHandle>, HypervisorError> {
        unreachable!("nothing starts it")
    }

    fn command_line(&self, _: &VmConfig) -> Vec<OsString> {
        Vec::new()
    }
}

/// A cache, and a configuration with files of its own outside of it.
struct World {
    dir: TempDir,
    cache: Cache,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "initramfs", "other"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let cache = Cache::at(dir.path().join("cache"));
        Self { dir, cache }
    }

    fn config(&self, change: impl FnOnce(VmConfigBuilder) -> VmConfigBuilder) -> VmConfig {
        let boot = KernelBoot {
            image: self.dir.path().join("kernel"),
            arch: Arch::HOST,
            initramfs: self.dir.path().join("initramfs"),
            command_line: "quiet".to_owned(),
        };
        let builder = VmConfigBuilder::new(boot).memory(Bytes(512 * MIB)).machine(Machine::Q35);
        change(builder).build().unwrap()
    }

    fn place(&self, config: &VmConfig) -> Option<Place> {
        Place::of(&self.cache, &FAKE, config).unwrap()
    }

    fn key(&self, config: &VmConfig) -> String {
        self.place(config).unwrap().key
    }

    fn entries(&self) -> usize {
        self.cache.entries(KIND).unwrap().len()
    }
}

#[test]
fn what_shapes_a_vm_is_in_the_key() {
    let world = World::new();
    let usual = world.config(|config| config);
    let topology = |nodes, cores| Topology { nodes, llcs: 1, cores, threads: 1 };
    let mut other_line = usual.clone();
    other_line.boot.kernel_mut().unwrap().command_line = "quiet debug".to_owned();
    let mut other_kernel = usual.clone();
    other_kernel.boot.kernel_mut().unwrap().image = world.dir.path().join("other");
    let mut other_initramfs = usual.clone();
    other_initramfs.boot.kernel_mut().unwrap().initramfs = world.dir.path().join("other");
    let mut keys = vec![
        world.key(&usual),
        world.key(&world.config(|config| config.memory(Bytes(513 * MIB)))),
        world.key(&world.config(|config| config.topology(topology(1, 2)))),
        world.key(&world.config(|config| config.topology(topology(2, 1)))),
        world.key(&world.config(|config| config.machine(Machine::Microvm))),
        world.key(&world.config(|config| config.accel(Accel::Kvm))),
        world.key(&world.config(|config| config.channel(AgentChannel::Serial))),
        world.key(&other_line),
        world.key(&other_kernel),
        world.key(&other_initramfs),
    ];
    let another = Fake { identity: Some("another"), can: true };
    keys.push(Place::of(&world.cache, &another, &usual).unwrap().unwrap().key);
    // The same names with other content.
    std::fs::write(world.dir.path().join("kernel"), "KERNEL").unwrap();
    keys.push(world.key(&usual));
    std::fs::write(world.dir.path().join("initramfs"), "INITRAMFS").unwrap();
    keys.push(world.key(&usual));
    for (index, key) in keys.iter().enumerate() {
        assert!(!keys[..index].contains(key), "number {index} has the key of another");
    }
}

#[test]
fn what_a_run_brings_is_not_in_the_key() {
    let world = World::new();
    let share = |tag: &str, read_only, transport, caching| ShareDevice {
        tag: tag.to_owned(),
        path: world.dir.path().to_owned(),
        read_only,
        transport,
        caching,
    };
    let served = |config: VmConfigBuilder| {
        config.share(share("a", true, ShareTransport::VirtioFs, Caching::Fixed))
    };
    let usual = world.key(&world.config(served));
    let another = || share("b", false, ShareTransport::VirtioFs, Caching::Coherent);
    for config in [
        world.config(|config| config.share(another())),
        world.config(|config| served(config).share(another())),
        world.config(|config| served(config).network(NetworkMode::User)),
        world.config(|config| served(config).lan(LanDevice { mac: MacAddress([2; 6]) })),
        world.config(|config| served(config).vsock(VsockDevice { dir: "/run/x".into() })),
        world.config(|config| served(config).sandbox(false)),
    ] {
        assert_eq!(world.key(&config), usual, "{config:?}");
    }
    // What QEMU itself serves has other devices, for which the guest has to look.
    let of_qemu = share("c", true, ShareTransport::NineP, Caching::Fixed);
    assert_ne!(world.key(&world.config(|config| config.share(of_qemu))), usual);
    // A kernel is what is in it, wherever it is.
    let moved = world.dir.path().join("moved");
    std::fs::copy(world.dir.path().join("kernel"), &moved).unwrap();
    let mut config = world.config(served);
    config.boot.kernel_mut().unwrap().image = moved;
    assert_eq!(world.key(&config), usual);
}

#[test]
fn no_snapshot_is_taken_of_what_nobody_knows() {
    let world = World::new();
    let usual = world.config(|config| config);
    assert!(world.place(&usual).is_some());
    let with_arguments = world.config(|config| config.qemu_args(vec!["-s".to_owned()]));
    assert!(world.place(&with_arguments).is_none());
    for fake in [Fake { identity: None, can: true }, Fake { identity: Some("one"), can: false }] {
        assert!(Place::of(&world.cache, &fake, &usual).unwrap().is_none(), "{fake:?}");
    }
}

/// What takes a snapshot, and counts.
fn taking(taken: &AtomicUsize, seed: u8) -> Result<(Snapshot, Greeting, u8), Error> {
    taken.fetch_add(1, Ordering::Relaxed);
    Ok((snapshot(seed), greeting(seed), seed))
}

#[test]
fn one_that_is_there_is_used_until_it_is_damaged_or_condemned() {
    let world = World::new();
    let place = world.place(&world.config(|config| config)).unwrap();
    let taken = AtomicUsize::new(0);
    // The seed of what is found, and whether it was taken for that.
    let get_how = |seed: u8, renew: bool| {
        let wait = || panic!("nobody else is there");
        let (stored, more) =
            place.get_or_take(|| taking(&taken, seed), wait, (renew, None)).unwrap();
        assert_eq!(stored.greeting.ready.release, format!("6.{}", stored.snapshot.state[0]));
        let found = (stored.snapshot.state[0], more.is_some());
        (stored, found)
    };
    let get = |seed| get_how(seed, false);
    assert_eq!(get(1).1, (1, true));
    assert_eq!(get(2).1, (1, false));
    let (stored, found) = get(3);
    assert_eq!(found, (1, false));
    std::fs::write(stored.entry.join(STATE), b"noise").unwrap();
    assert_eq!(get(4).1, (4, true));
    // The one that somebody has goes on being of use to them.
    assert_eq!(stored.snapshot.memory.len(), 2);
    let (stored, found) = get(5);
    assert_eq!(found, (4, false));
    stored.condemn();
    stored.condemn();
    assert_eq!(get(6).1, (6, true));
    // Another is wanted, though nothing is wrong with the one that is there.
    assert_eq!(get_how(7, true).1, (7, true));
    assert_eq!(get(8).1, (7, false));
    assert_eq!(taken.load(Ordering::Relaxed), 4);
    assert_eq!(world.entries(), 1);
}

#[test]
fn one_that_cannot_be_taken_leaves_nothing() {
    let world = World::new();
    let place = world.place(&world.config(|config| config)).unwrap();
    let failed: Result<(Stored, Option<()>), _> = place.get_or_take(
        || Err(Error::CommandNotFound { program: "x".into() }),
        || {},
        (false, None),
    );
    assert!(matches!(failed, Err(Error::CommandNotFound { .. })));
    assert_eq!(world.entries(), 0);
    let staging = world.cache.root().join(KIND).join(".staging");
    assert_eq!(names(&staging), [""; 0]);
    let taken = AtomicUsize::new(0);
    assert!(place.get_or_take(|| taking(&taken, 1), || {}, (false, None)).unwrap().1.is_some());
}

#[test]
fn of_many_who_want_one_at_once_one_takes_it() {
    let world = World::new();
    let place = world.place(&world.config(|config| config)).unwrap();
    let (taken, waited) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let all_there = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                all_there.wait();
                let take = || {
                    // Until all others wait for this.
                    while waited.load(Ordering::Relaxed) < 7 {
                        std::thread::yield_now();
                    }
                    taking(&taken, 1)
                };
                let wait = || _ = waited.fetch_add(1, Ordering::Relaxed);
                let (stored, _) = place.get_or_take(take, wait, (false, None)).unwrap();
                assert_eq!(stored.snapshot.state[0], 1);
            });
        }
    });
    assert_eq!(taken.load(Ordering::Relaxed), 1);
}
