use super::*;
use crate::test_support::{DebBuilder, bzimage, chain};

mod repository;

const RELEASE: &str = "6.12.1+deb12-amd64";

fn image_deb(dir: &Path) -> PathBuf {
    DebBuilder::new(&format!("linux-image-{RELEASE}"), "6.12.1-1")
        .file(&format!("./boot/vmlinuz-{RELEASE}"), &bzimage(RELEASE))
        .file(&format!("./boot/config-{RELEASE}"), b"CONFIG_PVH=y\n")
        .file(&format!("./lib/modules/{RELEASE}/modules.order"), b"")
        .file(&format!("./lib/modules/{RELEASE}/modules.builtin"), b"")
        .file("./usr/share/doc/linux/README", b"left out")
        .write(dir)
}

fn path_spec(path: &Path) -> KernelSpec {
    KernelSpec::Path(path.to_owned())
}

#[test]
fn the_generic_flavour_of_a_version_is_preferred() {
    let kernel = |release: &str| StoredKernel {
        key: release.to_owned(),
        release: release.to_owned(),
        distro: None,
        flavour: None,
        arch: Arch::HOST,
        package: String::new(),
        version: String::new(),
        suites: Vec::new(),
        bytes: 0,
        valid: true,
    };
    let wanted = ["6.12.9-cloud-amd64", "6.12.9-amd64", "7.2.1-cloud-amd64", "7.2.1-amd64"];
    let mut kernels: Vec<_> = wanted.iter().rev().map(|release| kernel(release)).collect();
    kernels.sort_by(order);
    let releases: Vec<_> = kernels.iter().map(|kernel| kernel.release.as_str()).collect();
    assert_eq!(releases, wanted);
}

#[test]
fn a_deb_is_imported_once_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let deb = image_deb(dir.path());
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    let kernel = store.resolve(&path_spec(&deb), &Silent).unwrap();
    assert_eq!(kernel.release, RELEASE);
    assert!(kernel.modules.as_ref().unwrap().join("modules.dep").is_file());
    assert!(kernel.config.is_some());
    let Origin::Package { entry, package, version, suites } = &kernel.origin else { panic!() };
    assert!(entry.starts_with("deb-"));
    assert_eq!(
        (package.as_str(), version.as_str()),
        ("linux-image-6.12.1+deb12-amd64", "6.12.1-1")
    );
    assert!(suites.is_empty());
    assert!(!store.cache().root().join(KERNELS).join(entry).join("usr").exists());

    let list = store.list().unwrap();
    assert_eq!(list.len(), 1);
    assert!(list[0].valid && list[0].bytes > 1000);

    // Damage is seen in the list, and repaired by the next use.
    std::fs::write(&kernel.boot_image, "cut").unwrap();
    assert!(!store.list().unwrap()[0].valid);
    let repaired = store.resolve(&path_spec(&deb), &Silent).unwrap();
    assert_eq!(repaired.release, RELEASE);
    assert!(store.list().unwrap()[0].valid);

    // A VM that runs keeps its kernel.
    let error = store.remove(RELEASE).unwrap_err().to_string();
    assert!(error.contains("is in use by a VM"), "{error}");
    assert_eq!(store.list().unwrap().len(), 1);
    drop(repaired);
    assert_eq!(&store.remove(RELEASE).unwrap(), entry);
    assert!(store.list().unwrap().is_empty());
    let gone = store.remove(RELEASE).unwrap_err();
    assert!(matches!(gone, KernelError::NoEntry { .. }));
}

#[test]
fn parts_beside_a_split_kernel_are_taken_along() {
    let dir = tempfile::tempdir().unwrap();
    let release = "7.2.1-amd64";
    let image = DebBuilder::new(&format!("linux-image-{release}"), "7.2.1-1")
        .depends(&format!(
            "linux-binary-{release} (= 7.2.1-1), linux-modules-{release} (= 7.2.1-1)"
        ))
        .write(dir.path());
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    let error = store.resolve(&path_spec(&image), &Silent).unwrap_err();
    let text = chain(&error);
    assert!(matches!(error, KernelError::MissingParts { .. }), "{text}");
    assert!(text.contains("linux-binary-7.2.1-amd64_7.2.1-1_amd64.deb"), "{text}");
    assert!(text.contains("linux-modules-7.2.1-amd64_7.2.1-1_amd64.deb"), "{text}");

    DebBuilder::new(&format!("linux-modules-{release}"), "7.2.1-1")
        .file(&format!("./usr/lib/modules/{release}/modules.builtin"), b"")
        .write(dir.path());
    DebBuilder::new(&format!("linux-binary-{release}"), "7.2.1-1")
        .depends(&format!("linux-base-{release}"))
        .file(&format!("./usr/lib/modules/{release}/vmlinuz"), &bzimage(release))
        .write(dir.path());
    DebBuilder::new(&format!("linux-base-{release}"), "7.2.1-1")
        .file(&format!("./usr/lib/modules/{release}/config"), b"CONFIG_PVH=y\n")
        .file(&format!("./usr/lib/modules/{release}/modules.order"), b"")
        .write(dir.path());
    let kernel = store.resolve(&path_spec(&image), &Silent).unwrap();
    assert_eq!(kernel.release, release);
    assert!(kernel.config.is_some() && kernel.modules.is_some());
}

#[test]
fn a_package_without_a_kernel_leaves_no_entry() {
    let dir = tempfile::tempdir().unwrap();
    let deb = DebBuilder::new("hello", "1").file("./usr/bin/hello", b"x").write(dir.path());
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    let error = store.resolve(&path_spec(&deb), &Silent).unwrap_err();
    assert!(error.to_string().contains("hello_1_amd64.deb has no kernel in it"), "{error}");
    assert!(store.cache().entries(KERNELS).unwrap().is_empty());
}

#[test]
fn inspect_and_pull_say_what_they_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    let spec = "debian:6.12".parse().unwrap();
    let error = store.inspect(&spec).unwrap_err().to_string();
    assert!(error.contains("vmlab kernel pull debian:6.12"), "{error}");
    let error = store.pull(&KernelSpec::Host, &Silent).unwrap_err();
    assert!(matches!(error, KernelError::NotPullable { .. }));
    let path = path_spec(&dir.path().join("bzImage"));
    assert!(matches!(store.pull(&path, &Silent), Err(KernelError::NotPullable { .. })));
}

/// Keeps what it is told.
#[derive(Default)]
struct Notes(std::sync::Mutex<Vec<String>>);

impl Progress for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn a_deb_is_pulled_into_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let deb = image_deb(dir.path());
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    let notes = Notes::default();
    let kernel = store.pull(&path_spec(&deb), &notes).unwrap();
    let Origin::Package { entry, .. } = &kernel.origin else { panic!() };
    let note = format!("stored linux-image-{RELEASE} 6.12.1-1 as {entry}");
    assert_eq!(notes.0.into_inner().unwrap(), [note]);
    assert_eq!(store.list().unwrap()[0].key, *entry);
}

#[test]
fn keys_are_file_names() {
    assert_eq!(entry::sanitise("linux-image-6.1_1:6.1~x+b/1"), "linux-image-6.1_1-6.1~x+b-1");
    let (a, b) = ("x".repeat(300), format!("{}y", "x".repeat(299)));
    assert!(entry::sanitise(&a).len() <= 150);
    assert_ne!(entry::sanitise(&a), entry::sanitise(&b));
}

#[test]
fn threads_that_mark_a_suite_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(Cache::at(dir.path()));
    let Ok(KernelSpec::Distro(spec)) = "debian:trixie".parse() else { panic!() };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| store.mark_suite(&spec, "a-key").unwrap()));
        }
    });
    let mark = store.suite_mark(&spec);
    assert_eq!(fs::read_to_string(&mark).unwrap(), "a-key");
    assert_eq!(fs::read_dir(mark.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn the_default_is_the_first_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(Cache::at(dir.path().join("cache")));
    for release in ["6.1.1-a", "6.6.1-b", "6.12.1-c"] {
        let deb = DebBuilder::new(&format!("linux-image-{release}"), "1")
            .file(&format!("./boot/vmlinuz-{release}"), &bzimage(release))
            .write(dir.path());
        store.resolve(&path_spec(&deb), &Silent).unwrap();
    }
    let running =
        || store.resolve(&path_spec(&dir.path().join("linux-image-6.1.1-a_1_amd64.deb")), &Silent);
    let default = |refused: &[&str]| {
        let fits = |kernel: &Kernel| match refused.contains(&kernel.release.as_str()) {
            true => Err("it lacks CONFIG_9P_FS".to_owned()),
            false => Ok(()),
        };
        let notes = Notes::default();
        let kernel = store.default_of("6.1.1-a", running(), &fits, &notes).unwrap();
        (kernel.release, notes.0.into_inner().unwrap())
    };
    let (release, notes) = default(&[]);
    assert_eq!((release.as_str(), notes.len()), ("6.1.1-a", 1));
    assert!(notes[0].contains("using the running one"), "{notes:?}");
    let (release, notes) = default(&["6.1.1-a"]);
    assert_eq!((release.as_str(), notes.len()), ("6.12.1-c", 1));
    assert!(notes[0].contains("because it lacks CONFIG_9P_FS: using 6.12.1-c"), "{notes:?}");
    let (release, notes) = default(&["6.1.1-a", "6.12.1-c"]);
    assert_eq!((release.as_str(), notes.len()), ("6.6.1-b", 2));
    assert!(notes[0].starts_with("passing over deb-"), "{notes:?}");
}
