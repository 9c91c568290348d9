//! What is remembered from one run to the next goes by the files that it came from.

use std::fs;
use std::time::Duration;

use super::*;

/// Somewhat longer than a file has to be left alone before anything is remembered of it.
const SETTLES: Duration = Duration::from_millis(2200);

const OVERLAY: &str = "kernel/overlay.ko";

/// A kernel whose overlay is a module, and a cache.
struct Site {
    dir: tempfile::TempDir,
}

/// As many sites, whose files are old enough for something to be remembered of them. Each bears one
/// change: what has changed is young, and hides whether another change would be noticed.
fn sites<const N: usize>() -> [Site; N] {
    let sites = std::array::from_fn(|_| Site::new());
    std::thread::sleep(SETTLES);
    sites
}

impl Site {
    fn new() -> Self {
        let site = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(site.tree().join("kernel")).unwrap();
        fs::write(site.dir.path().join("bzImage"), "image").unwrap();
        site.write_config(&all_built_in().replace("OVERLAY_FS=y", "OVERLAY_FS=m"));
        site.write("modules.dep", "kernel/overlay.ko:\nkernel/other.ko:\n");
        site.write("modules.builtin", "");
        for module in [OVERLAY, "kernel/other.ko"] {
            site.write(module, "\x7fELF1");
        }
        site
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("lib/modules/1")
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.tree().join(file), content).unwrap();
    }

    fn write_config(&self, config: &str) {
        fs::write(self.dir.path().join("config"), config).unwrap();
    }

    fn cache(&self) -> Cache {
        Cache::at(self.dir.path().join("cache"))
    }

    /// The kernel, as a run resolves it anew.
    fn kernel(&self) -> Kernel {
        let config = self.dir.path().join("config");
        Kernel {
            spec: "linux".into(),
            release: "1".into(),
            arch: Arch::HOST,
            version_string: None,
            boot_image: self.dir.path().join("bzImage"),
            config: Some(KernelConfig::parse(fs::read(&config).unwrap())),
            config_source: Some(vmlab_artifacts::ConfigSource::File(config)),
            modules: Some(self.tree()),
            no_modules: None,
            origin: vmlab_artifacts::Origin::Installed,
            leases: Leases::default(),
        }
    }

    fn find(&self, needs: Needs) -> Result<Vec<String>, Error> {
        Findings::of(&self.cache(), &self.kernel(), needs, None).map(|found| found.modules)
    }

    fn initramfs(&self) -> PathBuf {
        let wanted = ["overlay".to_owned()];
        let tree = self.tree();
        initramfs(&self.cache(), Some((&tree, &wanted)), false, &Leases::default()).unwrap()
    }

    /// How many answers are remembered.
    fn remembered(&self) -> usize {
        fs::read_dir(self.cache().root().join(".remembered")).map_or(0, Iterator::count)
    }
}

#[test]
fn a_kernels_findings_go_by_its_files_and_the_needs() {
    let [site, other] = sites();
    for site in [&site, &other] {
        assert_eq!(site.find(NEEDS).unwrap(), ["overlay"]);
        assert_eq!(site.remembered(), 1);
        assert_eq!(site.find(NEEDS).unwrap(), ["overlay"]);
    }
    let no_overlay = Needs { overlay: false, ..NEEDS };
    assert!(site.find(no_overlay).unwrap().is_empty());
    assert_eq!(site.remembered(), 2);

    site.write_config(&all_built_in());
    assert!(site.find(NEEDS).unwrap().is_empty());
    other.write("modules.dep", "kernel/other.ko:\n");
    let error = other.find(NEEDS).unwrap_err().to_string();
    assert!(error.contains("CONFIG_OVERLAY_FS"), "{error}");
}

#[test]
fn the_initramfs_goes_by_its_modules_and_their_index() {
    let [site, other, third] = sites();
    let first = site.initramfs();
    for site in [&site, &other, &third] {
        let made = site.initramfs();
        assert_eq!(made.parent().unwrap().file_name(), first.parent().unwrap().file_name());
        assert_eq!(site.remembered(), 1);
        assert_eq!(site.initramfs(), made);
    }
    // The entry can go while its key is remembered.
    fs::remove_dir_all(first.parent().unwrap()).unwrap();
    assert_eq!(site.initramfs(), first);
    assert!(first.exists());

    site.write(OVERLAY, "\x7fELF2");
    assert_ne!(site.initramfs(), first);
    let first = other.initramfs();
    other.write("modules.dep", "kernel/overlay.ko: kernel/other.ko\nkernel/other.ko:\n");
    assert_ne!(other.initramfs(), first);
    // A list that was not there before.
    let first = third.initramfs();
    third.write("modules.softdep", "softdep overlay pre: other\n");
    assert_ne!(third.initramfs(), first);
}
