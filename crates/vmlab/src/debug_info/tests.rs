//! Objects that the host's compiler makes, which are like modules: not linked, with places in sections.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object, ObjectSymbol};
use vmlab_artifacts::Arch;

use super::*;

/// Two functions in two sections, both at its beginning, and one in a third that has another inlined.
const SOURCE: &str = "\
int volatile seen;
__attribute__((noinline)) int first(int n)
{
\tseen = n;
\treturn seen + 1;
}
__attribute__((noinline, section(\".init.text\"))) int second(int n)
{
\tseen = n + 5;
\treturn seen + 2;
}
static inline __attribute__((always_inline)) int inner(int n)
{
\tseen = n * 3;
\treturn seen;
}
__attribute__((noinline, section(\".exit.text\"))) int outer(int n)
{
\treturn inner(n);
}
int last(int n)
{
\treturn seen - n;
}
";

/// Compiles it as a module of a name.
fn object(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    std::fs::write(dir.join("source.c"), SOURCE).unwrap();
    let path = dir.join(name);
    let mut gcc = Command::new("gcc");
    gcc.current_dir(dir).args(["-O1", "-fcf-protection=none", "-c", "source.c", "-o"]).arg(&path);
    assert!(gcc.args(options).status().expect("gcc is there: apt-get install gcc").success());
    path
}

const RELEASE: &str = "6.12.0-test";

/// A kernel of which nothing but this is known.
fn kernel(origin: Origin) -> Kernel {
    Kernel {
        spec: String::new(),
        release: RELEASE.to_owned(),
        arch: Arch::X86_64,
        version_string: None,
        boot_image: PathBuf::from("/nonexistent"),
        config: None,
        config_source: None,
        modules: None,
        no_modules: None,
        origin,
        leases: Default::default(),
    }
}

/// Debug information in a directory in the place of the system's, and in the directories of the user's.
fn info(root: &Path, dirs: &[&Path]) -> DebugInfo {
    DebugInfo::below(root, &kernel(Origin::Installed), dirs.iter().map(|dir| (*dir).to_owned()))
}

/// The size of a function, as its symbol has it.
fn size(path: &Path, function: &str) -> u64 {
    let content = std::fs::read(path).unwrap();
    let file = object::File::parse(&*content).unwrap();
    file.symbols().find(|symbol| symbol.name() == Ok(function)).unwrap().size()
}

/// What is known of each byte of a function: each answer once.
fn lines(info: &DebugInfo, module: Option<&str>, function: &str, size: u64) -> BTreeSet<String> {
    let symbols = info.symbols();
    let at = |offset| {
        let place = Place { function, offset, size, module };
        let shown: Vec<String> = symbols.locate(&place).iter().map(Location::to_string).collect();
        shown.join(" < ")
    };
    (0..size).map(at).collect()
}

/// The lines of a source that answers are of.
fn numbers(lines: &BTreeSet<String>) -> BTreeSet<u32> {
    lines.iter().map(|line| line.rsplit_once(':').unwrap().1.parse().unwrap()).collect()
}

#[test]
fn code_of_each_section_of_a_module_is_found() {
    for options in [&["-g"][..], &["-gdwarf-4"], &["-gdwarf-5", "-gz=zlib"]] {
        let dir = tempfile::tempdir().unwrap();
        let path = object(dir.path(), "my-module.ko", options);
        let info = info(Path::new("/nonexistent"), &[dir.path()]);
        let of = |function| lines(&info, Some("my_module"), function, size(&path, function));
        let first = numbers(&of("first"));
        assert!(first.is_subset(&(2..=6).collect()), "{options:?}: {first:?}");
        assert!(first.contains(&4) && first.contains(&5), "{options:?}: {first:?}");
        let second = numbers(&of("second"));
        assert!(second.is_subset(&(7..=11).collect()), "{options:?}: {second:?}");
        assert!(second.contains(&9) && second.contains(&10), "{options:?}: {second:?}");
        let outer = of("outer");
        let source = dir.path().join("source.c").canonicalize().unwrap();
        let source = source.display();
        let inlined = format!("{source}:14 in inner < {source}:19");
        assert!(outer.contains(&inlined), "{options:?}: {outer:?}");
    }
}

#[test]
fn another_build_of_a_function_is_not_taken_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = object(dir.path(), "m.ko", &["-g"]);
    let info = info(Path::new("/nonexistent"), &[dir.path()]);
    let size = size(&path, "first");
    let locate = |function, offset, size, module| {
        info.symbols().locate(&Place { function, offset, size, module }).len()
    };
    assert_eq!(locate("first", 0, size, Some("m")), 1);
    // The kernel counts what pads it.
    assert_eq!(locate("first", 0, size + 15, Some("m")), 1);
    assert_eq!(locate("first", 0, size + 64, Some("m")), 0);
    // The last of a section reaches to the end of its pages.
    assert_eq!(locate("last", 0, 0xc80, Some("m")), 1);
    assert_eq!(locate("last", 0, 1, Some("m")), 0);
    assert_eq!(locate("first", 0, size - 1, Some("m")), 0);
    assert_eq!(locate("first", size, size, Some("m")), 0);
    assert_eq!(locate("no_such", 0, size, Some("m")), 0);
    assert_eq!(locate("first", 0, size, Some("other")), 0);
    assert_eq!(locate("first", 0, size, None), 0);
    // A guest says what its modules are called.
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::copy(&path, dir.path().join("sub/m.ko")).unwrap();
    assert_eq!(locate("first", 0, size, Some("sub/m")), 0);
    assert_eq!(locate("first", 0, size, Some("sub/../m")), 0);
}

#[test]
fn kernels_have_theirs_in_build_trees_and_packages() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().canonicalize().unwrap();
    let link = ["-g", "-nostdlib", "-static", "-Wl,-e,first"];
    let make = |dir: &Path, name: &str| {
        std::fs::create_dir_all(dir).unwrap();
        let made = object(&top, "object.o", &["-g"]);
        let mut gcc = Command::new("gcc");
        gcc.args(link).arg(&made).arg("-o").arg(dir.join(name));
        assert!(gcc.status().unwrap().success());
        std::fs::remove_file(made).unwrap();
        size(&dir.join(name), "second")
    };
    // A build tree, whose sources are shown as within it.
    let size = make(&top, "vmlinux");
    let tree = kernel(Origin::BuildTree { path: top.clone() });
    let built = DebugInfo::below(Path::new("/nonexistent"), &tree, []);
    assert_eq!(built.vmlinux().unwrap(), top.join("vmlinux"));
    let found = lines(&built, None, "second", size);
    assert!(found.contains("source.c:9") && found.contains("source.c:10"), "{found:?}");
    std::fs::remove_file(top.join("vmlinux")).unwrap();
    let missing = built.vmlinux().unwrap_err();
    assert!(missing.starts_with(&format!("none in {}/vmlinux, ", top.display())), "{missing}");
    assert_eq!(lines(&built, None, "second", size), BTreeSet::from([String::new()]));

    // Packages of debug information.
    for (below, name) in [
        ("boot".to_owned(), format!("vmlinux-{RELEASE}")),
        (format!("lib/modules/{RELEASE}"), "vmlinux".to_owned()),
    ] {
        let root = top.join(&below).join("root");
        let size = make(&root.join(&below), &name);
        let found = lines(&info(&root, &[]), None, "second", size);
        let line = format!("{}/source.c:9", top.display());
        assert!(found.contains(&line), "{found:?}");
    }

    // Those are named as in the kernel's sources, where it is known where they were.
    let build = top.join("builder/linux");
    std::fs::create_dir_all(build.join("init")).unwrap();
    std::fs::create_dir_all(build.join("root/boot")).unwrap();
    std::fs::write(build.join("init/main.c"), SOURCE.replace("first", "kernel_init")).unwrap();
    let vmlinux = build.join("root/boot").join(format!("vmlinux-{RELEASE}"));
    let mut gcc = Command::new("gcc");
    gcc.current_dir(&build).args(["-O1", "-fcf-protection=none", "-Wl,-e,kernel_init"]);
    gcc.args(&link[..3]).arg(build.join("init/main.c")).arg("-o").arg(&vmlinux);
    assert!(gcc.status().unwrap().success());
    let size = self::size(&vmlinux, "second");
    let found = lines(&info(&build.join("root"), &[]), None, "second", size);
    assert!(found.contains("init/main.c:9"), "{found:?}");
}

#[test]
fn modules_are_found_where_the_kernels_tree_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("modules").join(RELEASE);
    let place = "kernel/drivers/some";
    let debug = dir.path().join("debug");
    let debug_place = debug.join("lib/modules").join(RELEASE).join(place);
    for dir in [&tree.join(place), &debug_place] {
        std::fs::create_dir_all(dir).unwrap();
    }
    let with = object(dir.path(), "with.ko", &["-g"]);
    let without = object(dir.path(), "without.ko", &[]);
    let size = size(&with, "first");
    std::fs::write(tree.join("modules.dep"), format!("{place}/my-mod.ko:\n")).unwrap();
    for name in ["modules.builtin", "modules.order"] {
        std::fs::write(tree.join(name), "").unwrap();
    }
    let found = || {
        let kernel = Kernel { modules: Some(tree.clone()), ..kernel(Origin::Installed) };
        let info = DebugInfo::below(&debug, &kernel, []);
        numbers_or_none(&lines(&info, Some("my_mod"), "first", size))
    };
    std::fs::copy(&without, tree.join(place).join("my-mod.ko")).unwrap();
    assert!(!found());
    std::fs::copy(&with, debug_place.join("my-mod.ko")).unwrap();
    assert!(found());
    std::fs::rename(debug_place.join("my-mod.ko"), debug_place.join("my-mod.ko.debug")).unwrap();
    assert!(found());
    std::fs::remove_dir_all(&debug).unwrap();
    assert!(!found());
    std::fs::copy(&with, tree.join(place).join("my-mod.ko")).unwrap();
    assert!(found());
}

fn numbers_or_none(lines: &BTreeSet<String>) -> bool {
    lines.iter().any(|line| line.ends_with("source.c:4"))
}

#[test]
fn damaged_files_are_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = object(dir.path(), "m.ko", &["-g"]);
    let size = size(&path, "outer");
    let content = std::fs::read(&path).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for _ in 0..3000 {
        let mut damaged = content.clone();
        for _ in 0..=random(8) {
            let at = random(damaged.len());
            damaged[at] = random(256) as u8;
        }
        if random(4) == 0 {
            damaged.truncate(random(content.len()));
        }
        let Some(file) = ObjectFile::of_module(&damaged) else { continue };
        for offset in 0..size {
            let _ = file.locate(&Place { function: "outer", offset, size, module: None });
        }
    }
}
