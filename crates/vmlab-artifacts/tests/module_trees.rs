//! Module trees as the host's depmod (from the package kmod) makes them, from modules built here.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use std::fs;
use std::path::Path;

use object::write::{Object, Symbol, SymbolSection};
use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind};
use vmlab_artifacts::kconfig::Tristate;
use vmlab_artifacts::modules::{self, ModuleTree, ModulesError};

const RELEASE: &str = "6.12.0-vmlab-test";

/// A module, as far as depmod looks at it.
fn module(exports: &str, needs: &[&str], modinfo: &str) -> Vec<u8> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let mut section = |name: &str, content: &str| {
        let id = object.add_section(Vec::new(), name.into(), SectionKind::ReadOnlyData);
        object.append_section_data(id, content.as_bytes(), 1);
    };
    section(".modinfo", modinfo);
    section("__ksymtab_strings", exports);
    for needed in needs {
        object.add_symbol(Symbol {
            name: needed.as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind: SymbolKind::Unknown,
            scope: object::SymbolScope::Unknown,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        });
    }
    object.write().unwrap()
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// The files of three modules: `top` needs `middle-part`, which needs `bottom`.
fn modules_in(dir: &Path) {
    let top = module("", &["middle_symbol"], "alias=fs-top\0softdep=pre: extra\0license=GPL\0");
    write(&dir.join("fs/top/top.ko"), top);
    let middle = module("middle_symbol\0", &["bottom_symbol"], "license=GPL\0");
    write(&dir.join("kernel/middle-part.ko"), middle);
    write(&dir.join("lib/bottom.ko"), module("bottom_symbol\0", &[], "license=GPL\0"));
    write(&dir.join("lib/extra.ko"), module("", &[], "license=GPL\0"));
}

fn check(tree: &ModuleTree) {
    assert_eq!(tree.release(), RELEASE);
    let loaded = tree.closure(&["fs-top"]).unwrap();
    let names: Vec<_> = loaded.iter().map(|m| (m.name.as_str(), m.optional)).collect();
    assert_eq!(names, [("extra", true), ("bottom", false), ("middle_part", false), ("top", false)]);
    for module in &loaded {
        assert!(tree.read(module).unwrap().starts_with(b"\x7fELF"), "{}", module.name);
    }
}

#[test]
fn depmod_makes_the_index_that_is_read() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("lib/modules").join(RELEASE);
    modules_in(&dir.join("kernel"));
    write(&dir.join("modules.builtin"), "kernel/fs/fuse/fuse.ko\n");
    write(&dir.join("modules.order"), "");

    assert!(matches!(ModuleTree::open(&dir), Err(ModulesError::NotIndexed { .. })));
    modules::depmod(base.path(), RELEASE).unwrap();
    let tree = ModuleTree::open(&dir).unwrap();
    check(&tree);
    assert_eq!(tree.availability("fuse"), Tristate::BuiltIn);
}

#[test]
fn depmod_reports_what_went_wrong() {
    let base = tempfile::tempdir().unwrap();
    let error = modules::depmod(base.path(), RELEASE).unwrap_err();
    assert!(matches!(error, ModulesError::Read { .. }), "{error:?}");
    for release in ["", ".", "..", "a/b", "/a", "a/", "-a"] {
        let error = modules::depmod(base.path(), release).unwrap_err();
        assert!(matches!(error, ModulesError::BadRelease { .. }), "{release:?}: {error:?}");
    }
    // depmod wants a release to begin with a version.
    fs::create_dir_all(base.path().join("lib/modules/nonsense")).unwrap();
    match modules::depmod(base.path(), "nonsense") {
        Err(ModulesError::Depmod { message, .. }) => assert!(!message.is_empty()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_index_without_the_modules_is_an_error() {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("lib/modules").join(RELEASE);
    // A module in a compression that no depmod knows.
    write(&dir.join("kernel/lib/a.ko.unknown"), "");
    write(&dir.join("modules.builtin"), "");
    write(&dir.join("modules.order"), "kernel/lib/a.ko\n");
    let result = modules::depmod(base.path(), RELEASE);
    assert!(matches!(result, Err(ModulesError::NothingIndexed { .. })), "{result:?}");
    // A kernel without modules is none.
    write(&dir.join("modules.order"), "");
    modules::depmod(base.path(), RELEASE).unwrap();
    assert_eq!(ModuleTree::open(&dir).unwrap().names().count(), 0);
}

/// A kernel build directory whose `modules.order` has the given lines.
fn build_dir(order: &str) -> tempfile::TempDir {
    let build = tempfile::tempdir().unwrap();
    modules_in(build.path());
    write(&build.path().join("include/config/kernel.release"), format!("{RELEASE}\n"));
    write(&build.path().join("modules.order"), order);
    write(&build.path().join("modules.builtin"), "kernel/fs/fuse/fuse.ko\n");
    write(&build.path().join("modules.builtin.modinfo"), "fuse.alias=fs-fuse\0");
    build
}

#[test]
fn build_directories_of_all_ages_become_trees() {
    let orders = [
        "kernel/fs/top/top.ko\nkernel/kernel/middle-part.ko\nkernel/lib/bottom.ko\nkernel/lib/extra.ko\n",
        "fs/top/top.ko\nkernel/middle-part.ko\nlib/bottom.ko\nlib/extra.ko\n",
        "fs/top/top.o\nkernel/middle-part.o\nlib/bottom.o\nlib/extra.o\n",
    ];
    for order in orders {
        let (build, out) = (build_dir(order), tempfile::tempdir().unwrap());
        let dir = modules::tree_from_build(build.path(), out.path()).unwrap();
        // The tree holds without the build directory, which the guest may not see.
        drop(build);
        assert_eq!(dir, out.path().join("lib/modules").join(RELEASE));
        let tree = ModuleTree::open(&dir).unwrap();
        check(&tree);
        assert_eq!(tree.availability("fs-fuse"), Tristate::BuiltIn);
        let path = dir.join("kernel/kernel/middle-part.ko");
        assert_eq!(tree.path("middle_part"), Some(path.clone()));
        assert!(!path.is_symlink());
        assert_eq!(
            fs::read_to_string(dir.join("modules.order")).unwrap(),
            "kernel/fs/top/top.ko\nkernel/kernel/middle-part.ko\n\
             kernel/lib/bottom.ko\nkernel/lib/extra.ko\n"
        );
    }
}

#[test]
fn the_lists_of_directories_stand_in_for_the_list_of_all() {
    // As `make lib/bottom.ko` leaves it.
    let build = build_dir("");
    fs::remove_file(build.path().join("modules.order")).unwrap();
    for (dir, order) in [
        ("fs", "fs/top/top.o\n"),
        ("kernel", "kernel/middle-part.o\n"),
        ("lib", "lib/bottom.o\n"),
        ("arch/x86", "lib/extra.o\n"),
        ("arch/x86/mm", "not/read.o\n"),
    ] {
        write(&build.path().join(dir).join("modules.order"), order);
    }
    let out = tempfile::tempdir().unwrap();
    let dir = modules::tree_from_build(build.path(), out.path()).unwrap();
    check(&ModuleTree::open(&dir).unwrap());
}

#[test]
fn unfinished_builds_say_what_is_missing() {
    for (file, named) in [
        ("include/config/kernel.release", "include/config/kernel.release"),
        ("modules.order", "modules.order"),
        ("modules.builtin", "modules.builtin"),
        ("lib/extra.ko", "lib/extra.ko"),
    ] {
        let build = build_dir("fs/top/top.o\nlib/extra.o\n");
        fs::remove_file(build.path().join(file)).unwrap();
        let out = tempfile::tempdir().unwrap();
        match modules::tree_from_build(build.path(), out.path()) {
            Err(ModulesError::NotBuilt { missing, .. }) => assert_eq!(missing, named),
            other => panic!("{file}: {other:?}"),
        }
    }
}

#[test]
fn lists_cannot_reach_out_of_the_build_directory() {
    let base = tempfile::tempdir().unwrap();
    let build = base.path().join("build");
    write(&build.join("include/config/kernel.release"), RELEASE);
    write(&build.join("modules.builtin"), "");
    write(&base.path().join("outside.ko"), module("", &[], ""));
    write(&build.join("modules.order"), "../outside.o\n");
    let out = base.path().join("out");
    let result = modules::tree_from_build(&build, &out);
    assert!(matches!(result, Err(ModulesError::NotBuilt { .. })), "{result:?}");
}
