//! The way through apt, with a signed archive made for the test: what it proves holds for any
//! distribution and mirror. It needs apt-get, gpg and depmod.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

use super::*;
use crate::cache::CACHE_DIR_ENV;

const RELEASE: &str = "6.8.0-31-generic";
const VERSION: &str = "6.8.0-31.31";

/// Tells the child test which spec to resolve.
const SPEC_ENV: &str = "VMLAB_TEST_STORE_SPEC";

/// A key made for one test.
struct Key {
    home: PathBuf,
    public: PathBuf,
}

impl Key {
    fn make(dir: &Path, name: &str) -> Key {
        // gpg's agent puts a socket there, and a socket's path has to be short.
        let home = dir.join(name);
        std::fs::DirBuilder::new().create(&home).unwrap();
        let key = Key { public: dir.join(format!("{name}.gpg")), home };
        let user = format!("{name} <{name}@example.org>");
        let made =
            key.gpg(&["--passphrase", "", "--quick-gen-key", &user, "rsa2048", "sign", "never"]);
        assert!(made.status.success(), "gpg: {}", String::from_utf8_lossy(&made.stderr));
        let exported = key.gpg(&["--export"]);
        std::fs::write(&key.public, exported.stdout).unwrap();
        key
    }

    fn gpg(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("gpg");
        command.arg("--homedir").arg(&self.home).args(["--batch", "--yes", "--quiet"]);
        command.args(arguments).output().expect("gpg is needed for this test")
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // The agent that gpg started would stay for as long as its directory is there.
        let _ = Command::new("gpgconf")
            .arg("--homedir")
            .arg(&self.home)
            .args(["--kill", "all"])
            .status();
    }
}

/// An archive with one suite, and a host that is configured for it.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let world = World { dir: tempfile::tempdir().unwrap() };
        for sub in [
            "pool",
            "dists/noble/main/binary-amd64",
            "etc/sources.list.d",
            "etc/trusted.gpg.d",
            "state",
            "var",
        ] {
            std::fs::create_dir_all(world.path(sub)).unwrap();
        }
        world.add_packages();
        world
    }

    fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    fn add_packages(&self) {
        let modules = format!("linux-modules-{RELEASE}");
        let debs = [
            DebBuilder::new(&format!("linux-image-{RELEASE}"), VERSION)
                .depends(&format!("kmod, linux-base (>= 4.5), {modules}"))
                .file(&format!("./boot/vmlinuz-{RELEASE}"), &bzimage(RELEASE)),
            DebBuilder::new(&modules, VERSION)
                .file(&format!("./boot/config-{RELEASE}"), b"CONFIG_OVERLAY_FS=y\n")
                .file(&format!("./lib/modules/{RELEASE}/modules.order"), b""),
            DebBuilder::new(&format!("linux-modules-extra-{RELEASE}"), VERSION)
                .file(&format!("./lib/modules/{RELEASE}/modules.builtin"), b"kernel/x.ko\n"),
        ];
        let mut packages = String::new();
        for deb in &debs {
            let path = deb.write(&self.path("pool"));
            let bytes = std::fs::read(&path).unwrap();
            packages.push_str(&format!(
                "{}Filename: pool/{}\nSize: {}\nSHA256: {}\n\n",
                deb.control(),
                path.file_name().unwrap().to_str().unwrap(),
                bytes.len(),
                hex(&bytes),
            ));
        }
        std::fs::write(self.path("dists/noble/main/binary-amd64/Packages"), packages).unwrap();
    }

    /// Writes the Release file for what is there now and signs it.
    fn sign(&self, key: &Key) {
        let packages = std::fs::read(self.path("dists/noble/main/binary-amd64/Packages")).unwrap();
        let date = Command::new("date").args(["-u", "-R"]).output().unwrap().stdout;
        let release = format!(
            "Origin: Ubuntu\nLabel: Ubuntu\nSuite: noble\nCodename: noble\nDate: {}\n\
             Architectures: amd64\nComponents: main\nSHA256:\n {} {} main/binary-amd64/Packages\n",
            String::from_utf8(date).unwrap().trim().replace("+0000", "UTC"),
            hex(&packages),
            packages.len(),
        );
        let plain = self.path("dists/noble/Release");
        std::fs::write(&plain, release).unwrap();
        let signed = key.gpg(&[
            "--clearsign",
            "--output",
            self.path("dists/noble/InRelease").to_str().unwrap(),
            plain.to_str().unwrap(),
        ]);
        assert!(signed.status.success(), "gpg: {}", String::from_utf8_lossy(&signed.stderr));
    }

    /// Configures the host to trust `key` for the archive.
    fn trust(&self, key: &Key) {
        let root = self.dir.path().display();
        let source = format!(
            "Types: deb\nURIs: copy:{root}\nSuites: noble\nComponents: main\nSigned-By: {}\n",
            key.public.display()
        );
        std::fs::write(self.path("etc/sources.list.d/archive.sources"), source).unwrap();
        let config = format!(
            "Dir::Etc \"{root}/etc\";\nDir::State \"{root}/state\";\nDir::Cache \"{root}/var\";\n\
             Dir::State::status \"{root}/state/status\";\n"
        );
        std::fs::write(self.path("state/status"), "").unwrap();
        std::fs::write(self.path("apt.conf"), config).unwrap();
    }

    fn resolve(&self, spec: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "store::tests::repository::child"])
            .env("APT_CONFIG", self.path("apt.conf"))
            .env(CACHE_DIR_ENV, self.path("cache"))
            .env(SPEC_ENV, spec)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// What the child printed after `mark`.
    fn answer(&self, spec: &str, mark: &str) -> String {
        let output = self.resolve(spec);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let found = text.lines().find_map(|line| line.strip_prefix(mark)).map(str::to_owned);
        found.unwrap_or_else(|| {
            panic!("{spec}: no {mark} in\n{text}\n{}", String::from_utf8_lossy(&output.stderr))
        })
    }

    fn store(&self) -> KernelStore {
        KernelStore::open(Cache::at(self.path("cache")))
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Not a test: resolves a spec in a process that has the test's apt configuration.
#[test]
#[ignore = "run by other tests as a child process"]
fn child() {
    let spec: KernelSpec = std::env::var(SPEC_ENV).expect("set by the parent").parse().unwrap();
    let store = KernelStore::open(Cache::open_default().unwrap());
    match store.resolve(&spec, &Silent) {
        Ok(kernel) => println!("\nKERNEL {}", serde_json::to_string(&kernel).unwrap()),
        Err(error) => println!("\nERROR {}", chain(&error).replace('\n', " ")),
    }
}

#[test]
fn a_kernel_comes_out_of_a_signed_archive() {
    let world = World::new();
    let key = Key::make(world.dir.path(), "a");
    world.sign(&key);
    world.trust(&key);

    let kernel: serde_json::Value =
        serde_json::from_str(&world.answer("ubuntu:6.8", "KERNEL ")).unwrap();
    assert_eq!(kernel["release"], RELEASE);
    assert_eq!(kernel["origin"]["package"], format!("linux-image-{RELEASE}"));
    assert_eq!(kernel["origin"]["suites"], serde_json::json!(["noble"]));
    let tree = PathBuf::from(kernel["modules"].as_str().unwrap());
    assert!(tree.join("modules.dep").is_file());
    assert!(tree.join("modules.builtin").is_file(), "the extra modules are missing");

    // From now on the store answers, without apt.
    let store = world.store();
    assert_eq!(store.inspect(&"ubuntu:6.8".parse().unwrap()).unwrap().release, RELEASE);
    let suite = "ubuntu:noble".parse().unwrap();
    assert!(matches!(store.inspect(&suite), Err(KernelError::NotInStore { .. })));
    world.answer("ubuntu:noble", "KERNEL ");
    assert_eq!(store.inspect(&suite).unwrap().release, RELEASE);
    assert_eq!(store.list().unwrap().len(), 1);

    // The virtual flavour is the same image without the extra modules.
    let virt: serde_json::Value =
        serde_json::from_str(&world.answer("ubuntu:noble-virtual", "KERNEL ")).unwrap();
    let tree = PathBuf::from(virt["modules"].as_str().unwrap());
    assert!(!tree.join("modules.builtin").is_file());
    assert_eq!(store.list().unwrap().len(), 2);

    for (spec, words) in [
        ("ubuntu:6.9", "there is ubuntu:6.8"),
        ("ubuntu:6.8-kvm", "no package fits ubuntu:6.8-kvm"),
        ("ubuntu:zesty", "has no suite `zesty`"),
        ("debian:6.12", "has no source of debian's packages"),
    ] {
        let error = world.answer(spec, "ERROR ");
        assert!(error.contains(words), "{spec}: {error}");
    }
}

#[test]
fn a_foreign_signature_is_refused() {
    let world = World::new();
    let (trusted, other) = (Key::make(world.dir.path(), "a"), Key::make(world.dir.path(), "b"));
    world.sign(&other);
    world.trust(&trusted);
    let error = world.answer("ubuntu:6.8", "ERROR ");
    assert!(error.contains("apt cannot fetch the package lists of noble"), "{error}");
    assert!(error.contains("not signed") || error.contains("NO_PUBKEY"), "{error}");
    assert!(world.store().list().unwrap().is_empty());
}

#[test]
fn lists_and_packages_that_changed_after_signing_are_refused() {
    let world = World::new();
    let key = Key::make(world.dir.path(), "a");
    world.sign(&key);
    world.trust(&key);
    let list = world.path("dists/noble/main/binary-amd64/Packages");
    let good = std::fs::read_to_string(&list).unwrap();
    std::fs::write(&list, good.replace("Maintainer: T", "Maintainer: U")).unwrap();
    let error = world.answer("ubuntu:6.8", "ERROR ");
    assert!(error.contains("apt cannot fetch the package lists of noble"), "{error}");

    std::fs::write(&list, good).unwrap();
    let deb = world.path(&format!("pool/linux-modules-{RELEASE}_{VERSION}_amd64.deb"));
    let mut bytes = std::fs::read(&deb).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&deb, bytes).unwrap();
    let error = world.answer("ubuntu:6.8", "ERROR ");
    assert!(error.contains("apt cannot download linux-image-6.8.0-31-generic"), "{error}");
    assert!(world.store().list().unwrap().is_empty());
}

#[test]
fn an_unsigned_archive_is_refused() {
    let world = World::new();
    let key = Key::make(world.dir.path(), "a");
    world.sign(&key);
    world.trust(&key);
    std::fs::remove_file(world.path("dists/noble/InRelease")).unwrap();
    let error = world.answer("ubuntu:6.8", "ERROR ");
    assert!(error.contains("is not signed"), "{error}");
}
