use super::*;
use crate::test_support::{bzimage, chain};
use crate::{Arch, Availability, Feature};

const RELEASE: &str = "6.12.1-test";

fn put(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn host(root: &Path) {
    put(root, &format!("boot/vmlinuz-{RELEASE}"), bzimage(RELEASE));
    put(
        root,
        &format!("boot/config-{RELEASE}"),
        "CONFIG_VIRTIO_PCI=y\nCONFIG_9P_FS=m\nCONFIG_NET_9P_VIRTIO=m\n",
    );
    put(
        root,
        &format!("lib/modules/{RELEASE}/modules.dep"),
        "kernel/9p.ko:\nkernel/9pnet_virtio.ko:\n",
    );
}

#[test]
fn an_installed_release_is_used_in_place() {
    let dir = tempfile::tempdir().unwrap();
    host(dir.path());
    let cache = Cache::at(dir.path().join("cache"));
    let kernel = installed(&cache, dir.path(), RELEASE, false).unwrap();
    assert_eq!(kernel.release, RELEASE);
    assert_eq!(kernel.arch, Arch::X86_64);
    assert_eq!(kernel.boot_image, dir.path().join(format!("boot/vmlinuz-{RELEASE}")));
    assert_eq!(kernel.modules, Some(dir.path().join(format!("lib/modules/{RELEASE}"))));
    assert_eq!(kernel.origin, Origin::Installed);
    assert!(kernel.version_string.as_ref().unwrap().contains("#1 SMP test"));
    let features = kernel.features().unwrap();
    assert_eq!(features.get(Feature::VirtioPci), Availability::BuiltIn);
    assert_eq!(features.get(Feature::NineP), Availability::Module);
    assert_eq!(features.get(Feature::Btrfs), Availability::Absent);
    assert!(!cache.root().exists(), "nothing is copied");
    assert_eq!(installed(&cache, dir.path(), RELEASE, true).unwrap().spec, "host");
}

#[test]
fn a_missing_release_is_answered_with_what_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let none = installed(&cache, dir.path(), "6.12", false).unwrap_err().to_string();
    assert!(none.contains("no kernel 6.12 is installed") && none.contains("at all"), "{none}");
    assert!(none.contains("did you mean debian:6.12?"), "{none}");
    host(dir.path());
    let other = installed(&cache, dir.path(), "5.10-x", false).unwrap_err().to_string();
    assert!(other.contains(&format!("installed: {RELEASE}")), "{other}");
    assert!(!other.contains("did you mean"), "{other}");
}

#[test]
fn a_module_tree_without_an_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    host(dir.path());
    fs::remove_file(dir.path().join(format!("lib/modules/{RELEASE}/modules.dep"))).unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let error = installed(&cache, dir.path(), RELEASE, false).unwrap_err();
    assert!(matches!(error, KernelError::NoModulesDep { .. }));
    assert!(error.to_string().contains(&format!("sudo depmod {RELEASE}")), "{error}");
}

#[test]
fn an_unreadable_image_is_told_from_a_bad_one() {
    let denied = BootImageError::Io {
        path: "x".into(),
        source: io::Error::from(io::ErrorKind::PermissionDenied),
    };
    let error = image_error(Path::new("/boot/vmlinuz-1"), denied);
    assert!(matches!(error, KernelError::Unreadable { .. }));
    assert!(error.to_string().contains("sudo chmod a+r /boot/vmlinuz-1"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "image", "just text, no kernel");
    let cache = Cache::at(dir.path().join("cache"));
    let error = at_path(&cache, "s".to_owned(), &dir.path().join("image")).unwrap_err();
    assert!(matches!(error, KernelError::BadImage(_)));
    assert!(error.to_string().contains("image cannot be booted"), "{}", chain(&error));
}

#[test]
fn a_plain_file_has_no_modules_and_unknown_features() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "bzImage", bzimage(RELEASE));
    let cache = Cache::at(dir.path().join("cache"));
    let kernel = at_path(&cache, "s".to_owned(), &dir.path().join("bzImage")).unwrap();
    assert_eq!((kernel.modules.as_ref(), kernel.config_source.as_ref()), (None, None));
    assert_eq!(kernel.release, RELEASE);
    assert_eq!(kernel.features().unwrap().get(Feature::Overlay), Availability::Unknown);
    // That it has no configuration is remembered.
    assert_eq!(cache.entries(CONFIGS).unwrap().len(), 1);
    let missing = at_path(&cache, "s".to_owned(), &dir.path().join("none")).unwrap_err();
    assert!(matches!(missing, KernelError::NoSuchPath { .. }));
}

#[test]
fn a_directory_without_a_kernel_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let error = at_path(&cache, "s".to_owned(), dir.path()).unwrap_err();
    assert!(matches!(error, KernelError::NoKernelInDir { .. }));
    put(dir.path(), "boot/vmlinuz-1", bzimage("1"));
    put(dir.path(), "boot/vmlinuz-2", bzimage("2"));
    let error = at_path(&cache, "s".to_owned(), dir.path()).unwrap_err();
    assert!(error.to_string().contains("vmlinuz-1, "), "{error}");
}

#[test]
fn an_unpacked_package_gets_an_index_in_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("unpacked");
    put(&root, &format!("usr/lib/modules/{RELEASE}/vmlinuz"), bzimage(RELEASE));
    put(&root, &format!("usr/lib/modules/{RELEASE}/config"), "CONFIG_OVERLAY_FS=y\n");
    put(&root, &format!("usr/lib/modules/{RELEASE}/modules.order"), "");
    put(&root, &format!("usr/lib/modules/{RELEASE}/modules.builtin"), "kernel/fs/overlay.ko\n");
    let cache = Cache::at(dir.path().join("cache"));
    let kernel = at_path(&cache, "s".to_owned(), &root).unwrap();
    let tree = kernel.modules.clone().unwrap();
    assert!(tree.starts_with(cache.root().join(LINKED_MODULES)), "{}", tree.display());
    assert!(tree.join("modules.dep").is_file());
    assert!(!root.join(format!("usr/lib/modules/{RELEASE}/modules.dep")).exists());
    assert_eq!(kernel.features().unwrap().get(Feature::Overlay), Availability::BuiltIn);

    // A change makes a new tree, and removes the old one when nobody uses it any more.
    let image = format!("usr/lib/modules/{RELEASE}/vmlinuz");
    put(&root, &image, [bzimage(RELEASE), vec![0]].concat());
    let again = at_path(&cache, "s".to_owned(), &root).unwrap().modules.unwrap();
    assert_ne!(again, tree);
    assert!(tree.exists());
    drop(kernel);
    put(&root, &image, [bzimage(RELEASE), vec![0; 2]].concat());
    let third = at_path(&cache, "s".to_owned(), &root).unwrap().modules.unwrap();
    assert!(!tree.exists() && !again.exists());
    // A module that was replaced changes no directory but its own.
    let path = format!("usr/lib/modules/{RELEASE}/kernel/fs/overlay.ko");
    put(&root, &path, module(0));
    let fourth = at_path(&cache, "s".to_owned(), &root).unwrap().modules.unwrap();
    fs::remove_file(root.join(&path)).unwrap();
    put(&root, &path, module(1));
    let fifth = at_path(&cache, "s".to_owned(), &root).unwrap().modules.unwrap();
    assert!(third != fourth && fourth != fifth);
    assert_eq!(fs::read(fifth.join("kernel/fs/overlay.ko")).unwrap(), module(1));
}

#[test]
fn a_build_tree_without_modules() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "arch/x86/boot/bzImage", bzimage(RELEASE));
    put(dir.path(), ".config", "CONFIG_VIRTIO_FS=y\n");
    put(dir.path(), "modules.order", "");
    let cache = Cache::at(dir.path().join("cache"));
    let kernel = at_path(&cache, "s".to_owned(), dir.path()).unwrap();
    assert!(matches!(kernel.origin, Origin::BuildTree { .. }));
    assert_eq!(kernel.modules, None);
    assert_eq!(kernel.features().unwrap().get(Feature::Virtiofs), Availability::BuiltIn);
}

#[test]
fn a_compressed_configuration_is_read() {
    use io::Read;
    let dir = tempfile::tempdir().unwrap();
    let mut packed = Vec::new();
    flate2::read::GzEncoder::new(&b"CONFIG_PVH=y\n"[..], Default::default())
        .read_to_end(&mut packed)
        .unwrap();
    put(dir.path(), "config.gz", packed);
    let config = read_config(&dir.path().join("config.gz")).unwrap();
    assert_eq!(config.value("CONFIG_PVH"), Some("y"));
}

#[test]
fn only_the_cache_is_advised_to_be_moved() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "file", "");
    let error = read_config(&dir.path().join("file/config")).unwrap_err();
    assert!(matches!(error, KernelError::Io { .. }));
    assert!(!chain(&error).contains(crate::cache::CACHE_DIR_ENV), "{}", chain(&error));
    let cache = Cache::at(dir.path().join("file"));
    put(dir.path(), "bzImage", bzimage(RELEASE));
    let error = at_path(&cache, "s".to_owned(), &dir.path().join("bzImage")).unwrap_err();
    assert!(chain(&error).contains(crate::cache::CACHE_DIR_ENV), "{}", chain(&error));
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let error = KernelError::cache_io("unpack to", dir.path(), full);
    assert!(error.to_string().contains(crate::cache::CACHE_DIR_ENV), "{error}");
}

/// The smallest ELF file that depmod takes for a module. Builds differ in a byte that nothing looks at.
fn module(build: u8) -> Vec<u8> {
    let mut module = vec![0; 64];
    module[15] = build;
    module[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    for (at, value) in [(16, 1), (18, 62), (20, 1), (52, 64), (58, 64)] {
        module[at] = value;
    }
    module
}

/// A build tree with the module `fs/overlay.ko`.
fn built(top: &Path) {
    put(top, "arch/x86/boot/bzImage", bzimage(RELEASE));
    put(top, "include/config/kernel.release", format!("{RELEASE}\n"));
    put(top, ".config", "CONFIG_OVERLAY_FS=m\n");
    put(top, "fs/overlay.ko", module(0));
    put(top, "fs/modules.order", "fs/overlay.o\n");
    put(top, "modules.order", "fs/overlay.o\n");
    put(top, "modules.builtin", "");
}

#[test]
fn a_tree_that_is_not_built_is_told_from_any_directory() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("cache"));
    let top = dir.path().join("linux");
    for file in ["Kbuild", "Kconfig", "Makefile"] {
        put(&top, file, "");
    }
    let error = || at_path(&cache, "s".to_owned(), &top).unwrap_err().to_string();
    let fresh = error();
    assert!(fresh.contains("linux is not built: there is no arch/"), "{fresh}");
    assert!(fresh.contains("run `make` there") && !fresh.contains("-k "), "{fresh}");
    put(&top, "vmlinux", "");
    assert!(error().contains(&format!("`-k {}`", top.join("vmlinux").display())), "{}", error());
}

#[test]
fn modules_that_were_never_built_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let image = "arch/x86/boot/bzImage";
    put(dir.path(), image, bzimage(RELEASE));
    put(dir.path(), ".config", "CONFIG_OVERLAY_FS=m\n");
    for path in ["", image] {
        let kernel = image_at(dir.path(), path);
        assert_eq!(kernel.modules, None);
        let why = kernel.no_modules.unwrap();
        assert!(why.contains("has no modules.order") && why.contains("`make modules`"), "{why}");
    }
    put(dir.path(), ".config", "CONFIG_OVERLAY_FS=y\n");
    assert_eq!(image_at(dir.path(), "").no_modules, None);
}

#[test]
fn every_build_of_a_module_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    built(dir.path());
    let tree = || image_at(dir.path(), "").modules.unwrap();
    let module_in = |tree: PathBuf| fs::read(tree.join("kernel/fs/overlay.ko")).unwrap();
    let first = tree();
    assert_eq!(tree(), first, "nothing has changed");
    // An interrupted build goes on: only the module changes, as a new file or in place.
    for (build, replaced) in [(1, true), (2, false)] {
        if replaced {
            fs::remove_file(dir.path().join("fs/overlay.ko")).unwrap();
        }
        put(dir.path(), "fs/overlay.ko", module(build));
        assert_eq!(module_in(tree()), module(build));
    }
    // `make fs/overlay.ko` removes the list of all modules.
    fs::remove_file(dir.path().join("modules.order")).unwrap();
    fs::remove_file(dir.path().join("fs/overlay.ko")).unwrap();
    put(dir.path(), "fs/overlay.ko", module(3));
    assert_eq!(module_in(tree()), module(3));
    // A kernel that was linked anew has the same modules.
    let before = tree();
    put(dir.path(), "arch/x86/boot/bzImage", [bzimage(RELEASE), vec![0]].concat());
    assert_eq!(tree(), before);
}

#[test]
fn what_was_configured_since_the_build_is_not_in_the_kernel() {
    let dir = tempfile::tempdir().unwrap();
    built(dir.path());
    put(dir.path(), "include/config/auto.conf", "CONFIG_VIRTIO_FS=y\n");
    put(dir.path(), ".config", "CONFIG_VIRTIO_FS=y\nCONFIG_9P_FS=y\n");
    let config = image_at(dir.path(), "").config.unwrap();
    assert_eq!((config.value("CONFIG_VIRTIO_FS"), config.value("CONFIG_9P_FS")), (Some("y"), None));
}

/// The kernel of one image, as `-k PATH` finds it.
fn image_at(dir: &Path, path: &str) -> Kernel {
    let cache = Cache::at(dir.join("cache"));
    at_path(&cache, "s".to_owned(), &dir.join(path)).unwrap()
}

#[test]
fn an_image_in_a_build_tree_has_its_configuration_and_modules() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "linux/arch/x86/boot/bzImage", bzimage(RELEASE));
    put(dir.path(), "linux/.config", "CONFIG_OVERLAY_FS=m\nCONFIG_VIRTIO_FS=y\n");
    put(dir.path(), "linux/include/config/kernel.release", format!("{RELEASE}\n"));
    put(dir.path(), "linux/modules.order", "fs/overlay.o\n");
    put(dir.path(), "linux/modules.builtin", "");
    let path = "linux/arch/x86/boot/bzImage";
    // Modules that cannot be used take nothing else away, and it is known why.
    let kernel = image_at(dir.path(), path);
    assert_eq!((kernel.modules.as_ref(), kernel.config.is_some()), (None, true));
    assert!(kernel.no_modules.unwrap().contains("has no fs/overlay.ko"));
    put(dir.path(), "linux/fs/overlay.ko", module(0));
    let kernel = image_at(dir.path(), path);
    assert_eq!(kernel.boot_image, dir.path().join(path));
    assert!(matches!(kernel.origin, Origin::File { .. }));
    let file = fs::canonicalize(dir.path().join("linux/.config")).unwrap();
    assert_eq!(kernel.config_source, Some(ConfigSource::File(file)));
    let features = kernel.features().unwrap();
    assert_eq!(features.get(Feature::Virtiofs), Availability::BuiltIn);
    assert_eq!(features.get(Feature::Overlay), Availability::Module);
    // Through a link from elsewhere, too.
    std::os::unix::fs::symlink(path, dir.path().join("link")).unwrap();
    assert!(image_at(dir.path(), "link").modules.is_some());
    // An image of another build than the tree's last one has nothing of it.
    put(dir.path(), path, bzimage("6.12.1-other"));
    let kernel = image_at(dir.path(), path);
    assert_eq!((kernel.modules, kernel.config), (None, None));
    assert!(
        kernel.no_modules.unwrap().contains(&format!("is {RELEASE}, not this image's 6.12.1-o"))
    );
}

#[test]
fn an_installed_image_given_by_its_path_has_what_lies_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    host(dir.path());
    let root = fs::canonicalize(dir.path()).unwrap();
    let path = format!("boot/vmlinuz-{RELEASE}");
    let kernel = image_at(dir.path(), &path);
    assert_eq!(kernel.release, RELEASE);
    assert_eq!(kernel.modules, Some(root.join(format!("lib/modules/{RELEASE}"))));
    assert_eq!(kernel.features().unwrap().get(Feature::NineP), Availability::Module);
    // A name that the image contradicts is none.
    put(dir.path(), &path, bzimage("6.12.1-other"));
    let other = image_at(dir.path(), &path);
    assert_eq!((other.modules.is_some(), other.config.is_some()), (false, false));
}

#[test]
fn an_image_among_its_modules_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let tree = format!("usr/lib/modules/{RELEASE}");
    put(dir.path(), &format!("{tree}/vmlinuz"), bzimage(RELEASE));
    put(dir.path(), &format!("{tree}/config"), "CONFIG_9P_FS=y\n");
    put(dir.path(), &format!("{tree}/modules.dep"), "");
    let kernel = image_at(dir.path(), &format!("{tree}/vmlinuz"));
    assert_eq!(kernel.modules, Some(fs::canonicalize(dir.path()).unwrap().join(&tree)));
    assert_eq!(kernel.config.unwrap().value("CONFIG_9P_FS"), Some("y"));
}
