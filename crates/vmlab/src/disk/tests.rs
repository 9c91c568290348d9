use super::*;
use crate::units::MIB;

fn read(text: &str) -> Disk {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn why(text: &str) -> String {
    text.parse::<Disk>().unwrap_err().to_string()
}

#[test]
fn files_are_read() {
    let unnamed = |writes| Disk { name: None, ..Disk::new("", "a.raw").writes(writes) };
    assert_eq!(read("a.raw"), unnamed(DiskWrites::Discarded));
    assert_eq!(read("a.raw:ro"), unnamed(DiskWrites::Refused));
    assert_eq!(read("a.raw:rw"), unnamed(DiskWrites::Kept));
    assert_eq!(read("a.raw:discard"), unnamed(DiskWrites::Discarded));
    assert_eq!(read("a.raw:clone"), unnamed(DiskWrites::Cloned(CloneMode::Auto)));
    assert_eq!(read("/a:data"), Disk::new("data", "/a"));
    assert_eq!(read("/a:data:rw"), Disk::new("data", "/a").writes(DiskWrites::Kept));
    // A file or a disk of such a name needs the last part.
    assert_eq!(read("rw"), Disk { name: None, ..Disk::new("", "rw") });
    assert_eq!(read("a:ro:discard"), Disk::new("ro", "a"));
    // This is no key.
    assert_eq!(read("a=b/c.raw:x"), Disk::new("x", "a=b/c.raw"));
    let long = format!("a:{}", "x".repeat(21));
    for bad in ["", ":data", "a:", "a:b/c", "a:b c", "a:b:c", "a:b:ro:rw", "a::ro", &long] {
        let error = why(bad);
        assert!(error.contains(&format!("`{bad}`")), "{error}");
        assert!(error.contains("FILE[:NAME][:ro|rw|discard|clone]"), "{error}");
    }
}

#[test]
fn new_disks_are_read() {
    let size = Bytes(256 * MIB);
    assert_eq!(read("size=256M"), Disk::blank(size));
    assert_eq!(read("fs=raw,size=256M"), Disk::blank(size));
    let data = read("size=256M,fs=xfs,name=data");
    assert_eq!(data, Disk::blank(size).named("data").filesystem("xfs"));
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    let all = read(&format!(
        "size=256M,fs=ext4,name=a,label=L,uuid={uuid},mkfs-option=-O,mkfs_option=^64bit,content=./x,\
         mount=/srv/a,mount-option=noatime,mount-option=data=journal,clone=copy,keep=/k"
    ));
    let wanted = Disk::blank(size)
        .named("a")
        .formatted(Mkfs {
            name: "ext4".to_owned(),
            label: Some("L".to_owned()),
            uuid: Some(uuid.to_owned()),
            options: vec!["-O".to_owned(), "^64bit".to_owned()],
            content: Some("./x".into()),
        })
        .mounted(MountPoint::At("/srv/a".into()))
        .mount_option("noatime")
        .mount_option("data=journal")
        .writes(DiskWrites::Cloned(CloneMode::Copy))
        .keep("/k");
    assert_eq!(all, wanted);
    assert_eq!(read("size=1G,fs=ext4,read-only").writes, DiskWrites::Refused);
    assert_eq!(read("size=1G,fs=ext4,mount=none").mount, MountPoint::Nowhere);
    assert_eq!(read("image=a.raw,name=x"), Disk::new("x", "a.raw"));
    assert_eq!(
        read("image=a.raw,name=x,mode=rw"),
        Disk::new("x", "a.raw").writes(DiskWrites::Kept)
    );
}

#[test]
fn a_disk_of_our_own_is_asked_for_by_any_of_its_keys() {
    let serve = |text: &str| read(&format!("size=1G,{text}")).serve;
    assert_eq!(read("size=1G").serve, None);
    assert_eq!(serve("serve"), Some(blk::Options::default()));
    let slow = serve("iops=100,bps=10M,bps-burst=1M").unwrap().throttle.unwrap();
    assert_eq!(Ok(slow), "iops=100,bps=10M,bps-burst=1M".parse());
    assert_eq!(serve("throttle=iops=100").unwrap().throttle, "iops=100".parse().ok());
    let faults = serve("fault=fail:write:nth=3,fault=delay=50ms:flush").unwrap().faults;
    assert_eq!(faults, ["fail:write:nth=3", "delay=50ms:flush"].map(|rule| rule.parse().unwrap()));
    let rest = serve("record=log,block-size=4096,queues=2").unwrap();
    assert_eq!((rest.record, rest.block_size.bytes(), rest.queues), (Some("log".into()), 4096, 2));
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    for (bad, wanted) in [
        ("size=256M,fz=xfs", "`fz` is no key: did you mean `fs`?"),
        ("siz=256M", "did you mean `size`?"),
        ("size=256M,size=1G", "`size` is there twice"),
        ("size=big", "`big` is not a size"),
        ("size=1K", "its size has to be 1 MiB to 16 TiB"),
        ("size=1048577K,fs=ext4,image=x", "both `path` and `size`"),
        ("fs=ext4", "neither `size` nor `path`"),
        ("image=x,fs=ext4", "`fs` is for new disks"),
        ("size=1G,label=x", "`label` is of a new filesystem"),
        ("size=1G,content=x", "`content` is of a new filesystem"),
        ("size=1G,fs=e/x", "no name of a filesystem"),
        ("size=1G,fs=xfs,label=longer than it may be", "1 to 12 bytes"),
        ("size=1G,fs=ext4,uuid=1234", "32 hexadecimal digits"),
        ("size=1G,fs=vfat,uuid=12345", "8 hexadecimal digits"),
        ("size=1G,fs=jfs,uuid=12345", "mkfs.jfs takes a label or a UUID is not known"),
        ("size=1G,fs=swap,content=x", "no content"),
        ("size=1G,fs=swap,mount=/x", "no filesystem on it"),
        ("size=1G,mount=/x", "no filesystem on it"),
        ("size=1G,fs=ext4,mount=x", "absolute path"),
        ("size=1G,fs=ext4,mount=/a/../b", "without `..`"),
        ("size=1G,fs=ext4,mount=/", "the guest's own"),
        ("size=1G,fs=ext4,mount=/proc/x", "the guest's own"),
        ("size=1G,mount-option=noatime", "options for a mount"),
        ("size=1G,mode=rw", "`keep` names a file"),
        ("size=1G,mode=slow", "discard, rw, ro and clone"),
        ("size=1G,clone=fast", "auto, reflink, copy and overlay"),
        ("size=1G,clone=copy,read-only", "only one of"),
        ("size=1G,clone=overlay,keep=x", "no overlay"),
        ("image=a,keep=x", "only a copy"),
        ("size=1G,name=a b", "a b"),
        ("size=1G,iops=0", "a number above 0"),
        ("size=1G,bps-burst=1M", "beside a rate"),
        ("size=1G,fault=burn:write", "burn"),
        ("size=1G,block-size=700", "512, 1024, 2048 or 4096"),
        ("size=1G,queues=0", "queues, not 0"),
        ("size=1G,queues=many", "no number"),
    ] {
        let error = why(bad);
        assert!(error.contains(wanted), "{bad}: {error}");
    }
}

#[test]
fn programs_are_told_what_was_asked_for() {
    let words = |mkfs: &Mkfs| filesystem::words(mkfs).join(" ");
    assert_eq!(words(&Mkfs::new("jfs")), "mkfs.jfs");
    let uuid = Some("01234567-89ab-cdef-0123-456789abcdef".to_owned());
    let label = Some("L".to_owned());
    let mkfs = |name: &str| Mkfs { label: label.clone(), uuid: uuid.clone(), ..Mkfs::new(name) };
    let uuid = uuid.as_deref().unwrap();
    assert_eq!(words(&mkfs("ext4")), format!("mkfs.ext4 -q -F -L L -U {uuid}"));
    assert_eq!(words(&mkfs("xfs")), format!("mkfs.xfs -q -f -L L -m uuid={uuid}"));
    let vfat = Mkfs { uuid: Some("1234-ABCD".to_owned()), ..mkfs("vfat") };
    assert_eq!(words(&vfat), "mkfs.vfat -n L -i 1234ABCD");
    assert_eq!(words(&mkfs("swap")), format!("mkswap -L L -U {uuid}"));
}

#[test]
fn the_guest_mounts_what_is_to_be() {
    let used = |text: &str, index| read(text).for_guest(index);
    let DiskUse::Mounted(mount) = used("size=1G,fs=ext4", 0).used else { panic!("it is mounted") };
    assert_eq!((mount.kind.as_deref(), &mount.target[..]), (Some("ext4"), &b"/mnt/disk0"[..]));
    let named = used("size=1G,fs=ext4,name=a,mount-option=ro,mount-option=x,read-only", 3);
    assert_eq!(named.serial, "a");
    let DiskUse::Mounted(mount) = named.used else { panic!("it is mounted") };
    assert_eq!((mount.options.as_str(), mount.read_only), ("ro,x", true));
    assert_eq!(used("size=1G,fs=swap", 0).used, DiskUse::Swap);
    assert_eq!(used("size=1G,fs=swap,mount=none", 0).used, DiskUse::Device);
    assert_eq!(used("size=1G", 0).used, DiskUse::Device);
    assert_eq!(used("a.raw", 0).used, DiskUse::Device);
    // What is on a file, the guest looks for.
    let DiskUse::Mounted(mount) = used("image=a.raw,mount=/a", 0).used else { panic!() };
    assert_eq!(mount.kind, None);
}

#[test]
fn files_are_numbered_and_known_by_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let builder = VmBuilder::default();
    let (cache, leases) = (Cache::at(dir.path().join("cache")), Leases::default());
    let made = |disks: &[Disk]| devices(&builder, disks, (&cache, &leases));
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().parse::<Disk>().unwrap()
    };
    let blank = file("blank", &[0; 512]);
    let own = Disk { name: Some("own".to_owned()), ..blank.clone() };
    // A disk may have anything on it.
    let archive = file("gz", b"\x1f\x8b\x08\0data");
    let found = made(&[blank.clone(), own, archive]).unwrap();
    assert!(found.iter().all(|device| device.format == ImageFormat::Raw));
    let serials: Vec<_> = found.iter().map(|device| device.serial.as_str()).collect();
    assert_eq!(serials, ["disk0", "own", "disk2"]);
    // What calls itself an image of some format has to be one.
    let cut = made(&[file("qcow2", b"QFI\xfb\0\0\0\x03")]).unwrap_err();
    assert!(cut.to_string().contains("qcow2"), "{cut}");
    for (path, why) in [("gone", "No such file"), ("", "directory")] {
        let disk = Disk::new("data", dir.path().join(path));
        let error = crate::error::chain(&made(&[disk]).unwrap_err());
        assert!(error.contains(dir.path().to_str().unwrap()) && error.contains(why), "{error}");
    }
    // A new disk without a filesystem needs no VM, and is one for all of its size.
    let new = made(&[Disk::blank(Bytes(MIB)), Disk::blank(Bytes(MIB)).named("b")]).unwrap();
    assert_eq!(new[0].path, new[1].path);
    assert_eq!(new[0].path.metadata().unwrap().len(), MIB);
    let no_program = made(&[Disk::blank(Bytes(MIB)).filesystem("nosuch")]).unwrap_err();
    assert!(
        no_program.to_string().starts_with("mkfs.nosuch, which the disk needs"),
        "{no_program}"
    );
}

mod clones {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::config::{KernelBoot, VmConfig, VmConfigBuilder};

    /// A VM with one disk.
    fn config(dir: &Path, disk: DiskDevice) -> VmConfig {
        let file = |name: &str| {
            let path = dir.join(name);
            std::fs::write(&path, "x").unwrap();
            path
        };
        let boot = KernelBoot {
            image: file("kernel"),
            arch: vmlab_artifacts::Arch::HOST,
            initramfs: file("initramfs"),
            command_line: String::new(),
        };
        VmConfigBuilder::new(boot).disk(disk).build().unwrap()
    }

    /// A file of 64 MiB with two pieces of data in it.
    fn sparse(path: &Path) -> DiskDevice {
        let file = File::create(path).unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"second", 32 * MIB).unwrap();
        let writes = DiskWrites::Cloned(CloneMode::Auto);
        let (serial, format) = ("a".to_owned(), ImageFormat::Raw);
        DiskDevice { serial, path: path.to_owned(), format, writes, keep: None, serve: None }
    }

    #[test]
    fn a_copy_has_the_data_and_the_holes_and_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let entry = dir.path().join("kind/key");
        std::fs::create_dir_all(&entry).unwrap();
        for mode in [CloneMode::Auto, CloneMode::Copy] {
            let disk = sparse(&entry.join("disk.raw"));
            let disk = DiskDevice { writes: DiskWrites::Cloned(mode), ..disk };
            let mut config = config(dir.path(), disk.clone());
            let own = give_each_its_own(&mut config.disks).unwrap();
            let copy = &config.disks[0].path;
            assert_ne!(*copy, disk.path);
            let file = File::options().read(true).write(true).open(copy).unwrap();
            let meta = file.metadata().unwrap();
            assert_eq!((meta.len(), meta.nlink()), (64 * MIB, 0));
            assert!(meta.blocks() * 512 < MIB, "{} blocks", meta.blocks());
            for (at, text) in [(0, &b"first"[..]), (32 * MIB, b"second")] {
                let mut found = vec![0; text.len()];
                file.read_exact_at(&mut found, at).unwrap();
                assert_eq!(found, text);
            }
            file.write_all_at(b"other", 0).unwrap();
            assert!(std::fs::read(&disk.path).unwrap().starts_with(b"first"));
            let copy = copy.clone();
            drop(own);
            drop(file);
            assert!(File::open(copy).is_err(), "it is gone with its owner");
            assert_eq!(entry.read_dir().unwrap().count(), 1, "the entry is as it was");
        }
    }

    #[test]
    fn a_copy_that_is_kept_has_the_name_that_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("new/kept.raw");
        let disk = DiskDevice { keep: Some(keep.clone()), ..sparse(&dir.path().join("disk")) };
        let mut one = config(dir.path(), disk.clone());
        drop(give_each_its_own(&mut one.disks).unwrap());
        assert_eq!(one.disks[0].path, keep);
        assert!(std::fs::read(&keep).unwrap().starts_with(b"first"));
        // What is there is not written over.
        let error = give_each_its_own(&mut config(dir.path(), disk).disks).unwrap_err();
        assert!(crate::error::chain(&error).contains("File exists"), "{error}");
    }

    #[test]
    fn what_was_to_be_kept_goes_where_no_vm_came_up() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("kept.raw");
        let disk = DiskDevice { keep: Some(keep.clone()), ..sparse(&dir.path().join("disk")) };
        let own = give_each_its_own(&mut config(dir.path(), disk).disks).unwrap();
        assert!(keep.exists());
        own.keep_none();
        assert!(!keep.exists());
    }

    #[test]
    fn what_is_no_file_has_a_layer_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let null = |mode| {
            let disk = sparse(&dir.path().join("disk"));
            let mut config = config(dir.path(), disk);
            config.disks[0].path = "/dev/null".into();
            config.disks[0].writes = DiskWrites::Cloned(mode);
            give_each_its_own(&mut config.disks).map(|_| config.disks[0].writes)
        };
        assert_eq!(null(CloneMode::Auto).unwrap(), DiskWrites::Discarded);
        let error = crate::error::chain(&null(CloneMode::Copy).unwrap_err());
        assert!(error.contains("it is a block device"), "{error}");
    }

    #[test]
    fn a_layer_needs_no_copy() {
        let dir = tempfile::tempdir().unwrap();
        let disk = sparse(&dir.path().join("disk"));
        let disk = DiskDevice { writes: DiskWrites::Cloned(CloneMode::Overlay), ..disk };
        let mut config = config(dir.path(), disk.clone());
        let _own = give_each_its_own(&mut config.disks).unwrap();
        assert_eq!(
            (&config.disks[0].path, config.disks[0].writes),
            (&disk.path, DiskWrites::Discarded)
        );
    }

    #[test]
    fn blocks_are_shared_only_where_the_file_system_can() {
        let dir = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
        let disk = sparse(&dir.path().join("disk"));
        let disk = DiskDevice { writes: DiskWrites::Cloned(CloneMode::Reflink), ..disk };
        let error = give_each_its_own(&mut config(dir.path(), disk).disks).unwrap_err();
        let error = crate::error::chain(&error);
        assert!(error.contains("clone=auto does without"), "{error}");
    }
}

/// A file that something was made of counts as that: another that is alike is another.
#[test]
fn a_state_of_a_disk_is_like_what_it_was() {
    let first = read("size=320M,fs=xfs,name=a");
    let state = Disk {
        source: DiskSource::File("state.raw".into()),
        writes: DiskWrites::Kept,
        was: Some(first.source.clone()),
        ..first.clone()
    };
    assert_eq!(state.for_guest(0), first.for_guest(0));
    assert_eq!(*state.made_of(), read("size=320M,fs=xfs,name=b").source);
}

mod superblocks {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;

    /// Looks at a filesystem that the host's program has made.
    fn look_at(name: &str, harm: impl FnOnce(&File)) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        // The least that all of them accept.
        let size = if name == "xfs" { 320 * MIB } else { 128 * MIB };
        File::create(&path).unwrap().set_len(size).unwrap();
        let words = filesystem::words(&Mkfs::new(name));
        let dirs = ["/usr/sbin", "/sbin", "/usr/bin"].map(|dir| Path::new(dir).join(&words[0]));
        let program = dirs.into_iter().find(|path| path.exists());
        let program =
            program.unwrap_or_else(|| panic!("{} is missing, which this test needs", words[0]));
        let made = Command::new(program).args(&words[1..]).arg(&path).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let file = File::options().read(true).write(true).open(&path).unwrap();
        harm(&file);
        filesystem::look(&file, name, file.metadata().unwrap().len())
    }

    #[test]
    fn real_ones_are_known() {
        for name in ["ext2", "ext4", "xfs", "btrfs", "f2fs", "vfat", "swap"] {
            look_at(name, |_| {}).unwrap_or_else(|why| panic!("{name}: {why}"));
        }
    }

    #[test]
    fn harmed_ones_are_told() {
        let no_magic = |at: u64| move |file: &File| file.write_all_at(b"....", at).unwrap();
        for (name, at) in
            [("ext4", 1080), ("xfs", 0), ("btrfs", 65600), ("f2fs", 1024), ("swap", 4086)]
        {
            let why = look_at(name, no_magic(at)).unwrap_err();
            assert!(why.contains("no superblock"), "{name}: {why}");
        }
        for name in ["ext4", "xfs", "btrfs"] {
            let why = look_at(name, |file| file.set_len(64 * MIB).unwrap()).unwrap_err();
            assert!(why.contains("speaks of"), "{name}: {why}");
            let why = look_at(name, |file| file.set_len(100).unwrap()).unwrap_err();
            assert!(why.contains("reading at"), "{name}: {why}");
        }
    }
}
