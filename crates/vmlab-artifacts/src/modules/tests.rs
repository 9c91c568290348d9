use std::fs;

use super::*;
use crate::compress::encode;

const RELEASE: &str = "6.12.0-test";

/// A module tree with the given index files.
fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Result<ModuleTree, ModulesError>) {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("lib/modules").join(RELEASE);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("modules.builtin"), "").unwrap();
    for (name, content) in files {
        fs::write(dir.join(name), content).unwrap();
    }
    let tree = ModuleTree::open(&dir);
    (base, tree)
}

/// The load order for `wanted`, optional modules with a question mark, with bars between the waves.
fn order(files: &[(&str, &str)], wanted: &[&str]) -> String {
    let (_base, tree) = tree(files);
    let modules = tree.unwrap().closure(wanted).unwrap();
    let name = |m: &ModuleRef| format!("{}{}", m.name, if m.optional { "?" } else { "" });
    let waves = modules.chunk_by(|a, b| a.wave == b.wave);
    let waves = waves.map(|wave| wave.iter().map(name).collect::<Vec<_>>().join(" "));
    waves.collect::<Vec<_>>().join(" | ")
}

const DEP: &str = "\
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/crypto/crc32c_generic.ko.zst:
kernel/arch/x86/crypto/crc32c-intel.ko.gz:
";
const ALIAS: &str = "\
# Aliases extracted from modules themselves.
alias fs-9p 9p
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias crypto-crc32c crc32c_intel
alias crypto-crc32c crc32c_generic
alias fs-gone gone
";
const BUILTIN: &str = "kernel/fs/fuse/fuse.ko\nkernel/drivers/char/hw_random/rng-core.ko\n";
const MODINFO: &str = "fuse.alias=fs-fuse\0fuse.alias=devname:*\0fuse.license=GPL\0junk\0";

fn files() -> Vec<(&'static str, &'static str)> {
    vec![
        ("modules.dep", DEP),
        ("modules.alias", ALIAS),
        ("modules.builtin", BUILTIN),
        ("modules.builtin.modinfo", MODINFO),
    ]
}

#[test]
fn names_are_found_with_either_dash() {
    let (base, tree) = tree(&files());
    let tree = tree.unwrap();
    assert_eq!(tree.release(), RELEASE);
    for (name, expected) in [
        ("9p", Tristate::Module),
        ("virtio_pci", Tristate::Module),
        ("virtio-pci", Tristate::Module),
        ("crc32c_intel", Tristate::Module),
        ("fs-9p", Tristate::Module),
        ("fs_9p", Tristate::Module),
        ("fuse", Tristate::BuiltIn),
        ("rng_core", Tristate::BuiltIn),
        ("rng-core", Tristate::BuiltIn),
        ("fs-fuse", Tristate::BuiltIn),
        ("fs-gone", Tristate::Absent),
        ("overlay", Tristate::Absent),
        ("", Tristate::Absent),
        ("9p.ko", Tristate::Absent),
    ] {
        assert_eq!(tree.availability(name), expected, "{name}");
    }
    let dir = base.path().join("lib/modules").join(RELEASE);
    let path = dir.join("kernel/drivers/virtio/virtio-pci.ko");
    assert_eq!(tree.path("virtio_pci"), Some(path));
    assert_eq!(tree.path("fuse"), None);
    assert_eq!(tree.path("overlay"), None);
    assert_eq!(tree.names().count(), 8);
}

#[test]
fn dependencies_come_first_and_once() {
    assert_eq!(order(&files(), &["9p"]), "netfs | 9pnet | 9p");
    assert_eq!(order(&files(), &["9p", "9pnet", "9p", "fs-9p"]), "netfs | 9pnet | 9p");
    assert_eq!(order(&files(), &["virtio-pci"]), "virtio_ring | virtio | virtio_pci");
    assert_eq!(order(&files(), &["virtio", "9p"]), "virtio_ring netfs | virtio 9pnet | 9p");
    assert_eq!(order(&files(), &["fuse", "fs-fuse", "rng-core"]), "");
    assert_eq!(order(&files(), &["crypto-crc32c"]), "crc32c_intel crc32c_generic");
    assert_eq!(order(&files(), &[]), "");
}

#[test]
fn absent_modules_are_named() {
    let (_base, tree) = tree(&files());
    let error = tree.unwrap().closure(&["9p", "over-lay"]).unwrap_err().to_string();
    assert!(error.contains("kernel 6.12.0-test has no module over-lay"), "{error}");
}

#[test]
fn a_dependency_that_is_not_listed_is_named() {
    let (_base, tree) = tree(&[("modules.dep", "a.ko: b.ko\nb.ko: c-d.ko\nz.ko:\n")]);
    let tree = tree.unwrap();
    let error = tree.closure(&["a"]).unwrap_err();
    assert!(
        matches!(
            &error,
            ModulesError::MissingDependency { module, needed, .. }
                if module == "b" && needed == "c_d"
        ),
        "{error:?}"
    );
    assert_eq!(tree.closure(&["z"]).unwrap().len(), 1);
}

#[test]
fn a_dependency_that_is_built_in_by_now_is_skipped() {
    let files = [("modules.dep", "a.ko: b.ko\n"), ("modules.builtin", "kernel/b.ko\n")];
    assert_eq!(order(&files, &["a"]), "a");
}

#[test]
fn cycles_end() {
    let dep = ("modules.dep", "a.ko: b.ko\nb.ko: c.ko\nc.ko: a.ko\nself.ko: self.ko\n");
    assert_eq!(order(&[dep], &["a"]), "c | b | a");
    assert_eq!(order(&[dep], &["b"]), "a | c | b");
    assert_eq!(order(&[dep], &["self"]), "self");
}

#[test]
fn a_chain_of_any_depth_is_no_problem() {
    let mut dep: String = (0..100_000).map(|i| format!("m{i}.ko: m{}.ko\n", i + 1)).collect();
    dep.push_str("m100000.ko:\n");
    let (_base, tree) = tree(&[("modules.dep", &dep)]);
    let modules = tree.unwrap().closure(&["m0"]).unwrap();
    assert_eq!(modules.len(), 100_001);
    assert_eq!(modules[0].name, "m100000");
}

#[test]
fn soft_dependencies_are_loaded_around_their_module() {
    let dep = ("modules.dep", "fs.ko: lib.ko\nlib.ko:\npre-1.ko: base.ko\nbase.ko:\npost.ko:\n");
    let soft = "# comment\nsoftdep fs pre: pre-1 nowhere post: post\nsoftdep lib\njunk\n";
    assert_eq!(
        order(&[dep, ("modules.softdep", soft)], &["fs"]),
        "base? lib | pre_1? | fs | post?"
    );
    // What is wanted anyway is not optional.
    assert_eq!(
        order(&[dep, ("modules.softdep", soft)], &["fs", "post", "base"]),
        "base lib post | pre_1? | fs"
    );
    // Soft dependencies can be aliases, of modules or of what is built in.
    let files = [
        dep,
        ("modules.softdep", "softdep fs pre: crypto-a crypto-b\n"),
        ("modules.alias", "alias crypto-a base\nalias crypto-b post\n"),
        ("modules.builtin.modinfo", "post.alias=crypto-b\0"),
    ];
    assert_eq!(order(&files, &["fs"]), "base? lib | fs");
}

#[test]
fn soft_dependencies_never_break_the_hard_ones() {
    // What should come before a module may need that module: then it has to wait.
    let dep = ("modules.dep", "a.ko:\nb.ko: a.ko\nc.ko: b.ko\n");
    assert_eq!(order(&[dep, ("modules.softdep", "softdep a pre: b\n")], &["a"]), "a | b?");
    assert_eq!(order(&[dep, ("modules.softdep", "softdep a pre: c\n")], &["c"]), "a | b | c");
    let each_other = "softdep a pre: b\nsoftdep b pre: a\n";
    let free = ("modules.dep", "a.ko:\nb.ko:\n");
    assert_eq!(order(&[free, ("modules.softdep", each_other)], &["a"]), "b? | a");
    // One that cannot be loaded is left out.
    let broken = ("modules.dep", "a.ko:\nb.ko: gone.ko\n");
    assert_eq!(order(&[broken, ("modules.softdep", "softdep a pre: b post: b\n")], &["a"]), "a");
    // A soft dependency's own soft dependency may need the first module.
    let nested = ("modules.dep", "a.ko:\nb.ko:\nc.ko: a.ko\n");
    let soft = ("modules.softdep", "softdep a pre: b\nsoftdep b pre: c post: c\n");
    assert_eq!(order(&[nested, soft], &["a"]), "b? | a | c?");
}

#[test]
fn a_tree_without_index_says_what_to_run() {
    let (base, tree) = tree(&[]);
    let error = tree.unwrap_err().to_string();
    let command = format!("run `depmod -b {} {RELEASE}`", base.path().display());
    assert!(error.contains(&command), "{error}");

    let error = ModuleTree::open(&base.path().join("lib/modules/6.0")).unwrap_err();
    assert!(matches!(error, ModulesError::Read { .. }), "{error:?}");
}

#[test]
fn a_tree_without_its_builtin_list_is_not_whole() {
    let (base, tree) = tree(&files());
    let dir = tree.unwrap().dir().to_owned();
    fs::remove_file(dir.join("modules.builtin")).unwrap();
    let error = ModuleTree::open(&dir).unwrap_err();
    assert!(matches!(error, ModulesError::NoBuiltinList { .. }), "{error:?}");
    drop(base);
}

#[test]
fn damaged_indexes_are_refused() {
    for dep in [
        "kernel/a.ko kernel/b.ko\n",
        "../../../etc/a.ko:\n",
        "README:\n",
        "a.ko: b.txt\n",
        "a.komma:\n",
    ] {
        let (_base, tree) = tree(&[("modules.dep", dep)]);
        let error = tree.unwrap_err();
        assert!(matches!(error, ModulesError::BadIndex { .. }), "{dep:?}: {error:?}");
    }
}

#[test]
fn modules_are_read_in_every_compression() {
    let elf = b"\x7fELF and the rest of a module".as_slice();
    let base = tempfile::tempdir().unwrap();
    let write = |content: &[u8]| {
        let path = base.path().join("module.ko");
        fs::write(&path, content).unwrap();
        read_module(&path)
    };
    assert_eq!(write(elf).unwrap(), elf);
    for format in [Compression::Xz, Compression::Zstd, Compression::Gzip] {
        let stream = encode::compress(format, elf);
        assert_eq!(write(&stream).unwrap(), elf, "{format}");
        let error = write(&stream[..stream.len() - 4]).unwrap_err();
        assert!(matches!(error, ModulesError::Decompress { .. }), "{format}: {error:?}");
        let error = write(&encode::compress(format, b"no module")).unwrap_err();
        assert!(matches!(error, ModulesError::NotAModule { .. }), "{format}: {error:?}");
    }
    for content in [b"".as_slice(), b"\x7fEL", b"text"] {
        let error = write(content).unwrap_err();
        assert!(matches!(error, ModulesError::NotAModule { .. }), "{content:?}: {error:?}");
    }
}
