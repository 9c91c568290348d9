//! The root file system and what boots, made by mmdebstrap.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use super::disk::{Layout, ROOT_NUMBER};
use super::error::ImageBuildError;
use super::recipe::ImageRecipe;
use crate::source::apt::SuiteSources;
use crate::{Arch, Digest, Progress, SYSTEM_DIRS, child, find_program};

const MMDEBSTRAP: &str = "mmdebstrap";

const PREPARE: &str = include_str!("prepare.sh");
const FINISH: &str = include_str!("finish.sh");

/// What an image does not need to run: manuals, translations and documents, all but licences.
const LEFT_OUT: [&str; 6] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    // Nobody needs half an image after a power cut.
    "force-unsafe-io",
];

/// Lines that begin with this, a hook of ours wrote.
const PHASE: &str = "vmlab-phase: ";

/// How many of the last lines an error repeats, and how long each may be.
const MAX_LINES: usize = 25;
const MAX_LINE: usize = 400;

/// A program of the host that is needed, and the package that has it.
struct Tool(&'static str, &'static str);

const TOOLS: [Tool; 5] = [
    Tool(MMDEBSTRAP, "mmdebstrap"),
    Tool("mke2fs", "e2fsprogs"),
    Tool("apt-get", "apt"),
    Tool("dpkg-deb", "dpkg"),
    Tool("tar", "tar"),
];
const UEFI_TOOLS: [Tool; 3] =
    [Tool("mkfs.vfat", "dosfstools"), Tool("mcopy", "mtools"), Tool("mmd", "mtools")];
const USER_TOOLS: [Tool; 2] = [Tool("newuidmap", "uidmap"), Tool("newgidmap", "uidmap")];

/// Looks, before anything is done, whether this host and user can build an image.
pub(super) fn check(recipe: &ImageRecipe) -> Result<(), ImageBuildError> {
    if Arch::HOST != Arch::X86_64 {
        return Err(ImageBuildError::Arch(Arch::HOST));
    }
    let root = rustix::process::geteuid().is_root();
    let uefi: &[Tool] = if recipe.firmware.uefi() { &UEFI_TOOLS } else { &[] };
    let user: &[Tool] = if root { &[] } else { &USER_TOOLS };
    let missing = TOOLS.iter().chain(uefi).chain(user);
    tools_error(missing.filter(|tool| find_program(tool.0).is_none()))?;
    match root {
        true => Ok(()),
        false => check_subordinate_ids(),
    }
}

fn tools_error<'a>(missing: impl Iterator<Item = &'a Tool>) -> Result<(), ImageBuildError> {
    let (mut programs, mut packages) = (Vec::new(), Vec::new());
    for Tool(program, package) in missing {
        programs.push((*program).to_owned());
        if !packages.iter().any(|known| known == package) {
            packages.push((*package).to_owned());
        }
    }
    match programs.is_empty() {
        true => Ok(()),
        false => Err(ImageBuildError::Tools { programs, packages }),
    }
}

/// mmdebstrap takes this user's first range of at least so many numbers.
const WANTED_IDS: u64 = 65536;

fn check_subordinate_ids() -> Result<(), ImageBuildError> {
    let number = rustix::process::getuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = user_name(&passwd, &number).unwrap_or_else(|| number.clone());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if !has_range(&text, &[&name, &number]) {
            return Err(ImageBuildError::NoSubordinateIds { user: name, file });
        }
    }
    Ok(())
}

fn user_name(passwd: &str, number: &str) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    })
}

/// Whether a file in the format of subuid(5) has a range that is large enough.
fn has_range(text: &str, names: &[&str]) -> bool {
    text.lines().any(|line| {
        let mut fields = line.split(':');
        let own = fields.next().is_some_and(|name| names.contains(&name));
        own && fields.nth(1).is_some_and(|n| n.parse().is_ok_and(|n: u64| n >= WANTED_IDS))
    })
}

/// Fills the root partition of the disk, and `boot` with what else is needed to boot, as a tar archive.
pub(super) fn run(
    recipe: &ImageRecipe,
    sources: &SuiteSources,
    layout: &Layout,
    (disk, boot): (&File, &File),
    progress: &dyn Progress,
) -> Result<(), ImageBuildError> {
    let settings = settings(recipe, sources, layout, disk.as_raw_fd(), boot.as_raw_fd());
    let program = find_program(MMDEBSTRAP).unwrap_or_else(|| MMDEBSTRAP.into());
    let mut command = Command::new(program);
    let mode = if rustix::process::geteuid().is_root() { "root" } else { "unshare" };
    command.arg(format!("--mode={mode}"));
    command.args(["--variant=minbase", "--format=null", "--architectures=amd64"]);
    // The last script has cleaned up, and it had to do so before it made the file system.
    command.arg("--skip=cleanup");
    command.arg(format!("--include={}", recipe.all_packages().join(",")));
    for option in LEFT_OUT {
        command.arg(format!("--dpkgopt={option}"));
    }
    for option in &sources.apt_options {
        command.arg(format!("--aptopt={option}"));
    }
    // Not as they are: it prints the text of its hooks, when it runs them and when they fail.
    command.arg("--essential-hook=sh -c \"$VMLAB_PREPARE\" prepare \"$1\"");
    command.arg("--customize-hook=sh -c \"$VMLAB_FINISH\" finish \"$1\"");
    command.env("VMLAB_PREPARE", PREPARE).env("VMLAB_FINISH", settings + FINISH);
    // The rest: no suite, for it is in the sources; no target; the sources come by its input.
    command.args([&recipe.suite, "-", "-"]);
    environment(&mut command);
    command.env("TMPDIR", work_dir());
    child::ends_with_us(&mut command, Signal::TERM);
    inherits(&mut command, disk);
    inherits(&mut command, boot);
    let doing = || format!("install {recipe}");
    attend(command, MMDEBSTRAP, doing, Some(&sources.text), progress)
}

/// A digest of all that decides what this makes of a recipe, besides the packages.
pub(super) fn version() -> Digest {
    Digest::of([PREPARE, FINISH, &LEFT_OUT.concat()].concat().as_bytes())
}

/// Where the system is unpacked: a place on disk, which all of this user's subordinate numbers reach.
fn work_dir() -> PathBuf {
    let own = std::env::var_os("TMPDIR").map(PathBuf::from);
    let root = rustix::process::geteuid().is_root();
    let fits = |dir: &PathBuf| dir.is_absolute() && dir.is_dir() && (root || is_open_to_all(dir));
    own.filter(fits).unwrap_or_else(|| "/var/tmp".into())
}

fn is_open_to_all(dir: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    dir.ancestors().all(|dir| dir.metadata().is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}

/// The settings that stand before the last script. All values are made here or were checked, and are
/// quoted all the same.
fn settings(
    recipe: &ImageRecipe,
    sources: &SuiteSources,
    layout: &Layout,
    disk_fd: i32,
    boot_fd: i32,
) -> String {
    let yes = |wanted: bool| if wanted { "yes" } else { "" };
    let mut packages = Vec::new();
    if recipe.firmware.bios() {
        packages.extend(["grub-pc-bin", "grub-common", "libdevmapper1.02.1"]);
    }
    if recipe.firmware.uefi() {
        packages.extend(["grub-efi-amd64-signed", "shim-signed"]);
    }
    let mut text = String::new();
    for (name, value) in [
        ("suite", recipe.suite.clone()),
        ("date", sources.date.clone()),
        ("root_uuid", layout.file_system.to_string()),
        ("hash_seed", layout.hash_seed.to_string()),
        ("root_number", ROOT_NUMBER.to_string()),
        ("root_start", layout.root.start.to_string()),
        ("root_kib", (layout.root.len >> 10).to_string()),
        ("disk_fd", disk_fd.to_string()),
        ("boot_fd", boot_fd.to_string()),
        ("bios", yes(recipe.firmware.bios()).to_owned()),
        ("uefi", yes(recipe.firmware.uefi()).to_owned()),
        ("boot_packages", packages.join(" ")),
        ("apt_sources", sources.for_image.clone()),
    ] {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}={}", quoted(&value));
    }
    text
}

/// A word of the shell's.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The C locale, and system programs in the path of a user who does not have them there.
pub(super) fn environment(command: &mut Command) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> =
        std::env::split_paths(&path).chain(SYSTEM_DIRS.iter().map(Into::into)).collect();
    if let Ok(path) = std::env::join_paths(dirs) {
        command.env("PATH", path);
    }
    command.env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE");
    command.env("DEBIAN_FRONTEND", "noninteractive");
}

/// Lets a program have a file under the same descriptor.
fn inherits(command: &mut Command, file: &File) {
    use std::os::unix::process::CommandExt;
    let fd = file.as_raw_fd();
    let prepare = move || {
        // SAFETY: the caller holds the file open until the program was spawned.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        Ok(rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty())?)
    };
    // SAFETY: between fork and exec, `prepare` only makes a system call.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Runs a program to its end, shows what it does, and repeats its last words where it fails.
pub(super) fn attend(
    mut command: Command,
    program: &'static str,
    doing: impl Fn() -> String,
    input: Option<&str>,
    progress: &dyn Progress,
) -> Result<(), ImageBuildError> {
    let failed = |status: String, words: String| ImageBuildError::Program {
        program,
        doing: doing(),
        status,
        words,
    };
    let cannot = |error: std::io::Error| failed(error.to_string(), "nothing".to_owned());
    let (reader, writer) = std::io::pipe().map_err(cannot)?;
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(writer.try_clone().map_err(cannot)?).stderr(writer);
    let mut child = command.spawn().map_err(cannot)?;
    // The other end of the pipe is in it, too.
    drop(command);
    if let (Some(mut pipe), Some(text)) = (child.stdin.take(), input) {
        // A program that does not read its input says why, and that is the better error.
        let _ = pipe.write_all(text.as_bytes());
    }
    let mut last = VecDeque::new();
    let mut lines = BufReader::new(reader);
    let mut line = Vec::new();
    while matches!(lines.read_until(b'\n', &mut line), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if let Some(phase) = phase(text) {
            progress.phase(phase);
        }
        if !text.is_empty() {
            if last.len() == MAX_LINES {
                last.pop_front();
            }
            last.push_back(text.chars().take(MAX_LINE).collect::<String>());
        }
        line.clear();
    }
    let status = child.wait().map_err(cannot)?;
    match status.success() {
        true => Ok(()),
        false => Err(failed(status.to_string(), words(last))),
    }
}

/// What a line says of a new phase.
fn phase(line: &str) -> Option<&str> {
    let said = match line.strip_prefix(PHASE) {
        Some(phase) => phase,
        None => line.strip_prefix("I: ")?.trim_end_matches('.'),
    };
    // Our hooks say for themselves what they do.
    let dull = ["running --", "success in", "chroot architecture", "reading sources", "using /"];
    (!dull.iter().any(|start| said.starts_with(start))).then_some(said)
}

/// What a person needs of the last lines.
fn words(lines: VecDeque<String>) -> String {
    // That a hook failed, and that all of it did, says less than what the hook said before.
    let dull = |line: &String| {
        line.starts_with("I: ")
            || line.starts_with(PHASE)
            || line.starts_with("E: command failed")
            || line.contains("mmdebstrap failed to run")
            || line.contains("received signal")
    };
    let told: Vec<&str> = lines.iter().filter(|l| !dull(l)).map(String::as_str).collect();
    let errors: Vec<&str> = told.iter().filter_map(|line| line.strip_prefix("E: ")).collect();
    match (errors.is_empty(), told.is_empty()) {
        (false, _) => errors.join("; "),
        (true, false) => told.join("\n"),
        (true, true) => "nothing".to_owned(),
    }
}

/// The files of a tar archive, by name.
pub(super) fn boot_files(mut archive: &File) -> std::io::Result<BTreeMap<String, Vec<u8>>> {
    use std::io::{Read, Seek};
    /// Far more than any of them has, so that a damaged archive cannot fill the memory.
    const MAX_FILE: u64 = 64 << 20;
    archive.rewind()?;
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries()? {
        let entry = entry?;
        if entry.header().entry_type().is_file() {
            let name = entry.path()?.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.take(MAX_FILE).read_to_end(&mut bytes)?;
            files.insert(name, bytes);
        }
    }
    Ok(files)
}

/// Runs a program on a file that it is to write.
pub(super) fn run_tool(
    program: &'static str,
    args: &[&std::ffi::OsStr],
    dir: &Path,
    doing: &str,
) -> Result<(), ImageBuildError> {
    let mut command = Command::new(find_program(program).unwrap_or_else(|| program.into()));
    command.args(args).current_dir(dir);
    environment(&mut command);
    child::ends_with_us(&mut command, Signal::KILL);
    attend(command, program, || doing.to_owned(), None, &crate::Silent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_directory_is_no_place_for_others() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let open = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(dir.path(), mode).unwrap();
            is_open_to_all(&inner)
        };
        assert!(!open(0o700));
        assert!(is_open_to_all(Path::new("/usr/bin")));
        assert!(!is_open_to_all(Path::new("/nonexistent")));
    }

    #[test]
    fn ranges_of_numbers() {
        let text = "# none\nada:100000:65536\n1002:165536:70000\nbob:1:2\n";
        assert!(has_range(text, &["ada", "1000"]));
        assert!(has_range(text, &["cy", "1002"]));
        assert!(!has_range(text, &["bob", "1003"]));
        assert!(!has_range("ada:100000\nada:1:x\n", &["ada"]));
        let passwd = "root:x:0:0::/:/bin/sh\nada:x:1000:1000::/:/bin/sh\n";
        assert_eq!(user_name(passwd, "1000").as_deref(), Some("ada"));
        assert_eq!(user_name(passwd, "100"), None);
    }

    #[test]
    fn missing_tools_are_named_with_their_packages() {
        assert!(tools_error([].iter()).is_ok());
        let error = tools_error(UEFI_TOOLS.iter()).unwrap_err().to_string();
        assert!(error.contains("mkfs.vfat, mcopy, mmd;"), "{error}");
        assert!(error.ends_with("`sudo apt-get install dosfstools mtools`"), "{error}");
    }

    #[test]
    fn only_phases_are_shown() {
        assert_eq!(phase("I: running apt-get update..."), Some("running apt-get update"));
        assert_eq!(phase("vmlab-phase: make it"), Some("make it"));
        assert_eq!(phase("I: running --customize-hook in shell: sh -c"), None);
        assert_eq!(phase("  vmlab-phase: $*"), None);
        assert_eq!(phase("Get:1 http://m.example"), None);
    }

    #[test]
    fn words_are_quoted_for_the_shell() {
        for text in ["a b", "it's", "$(false)\n`false`", "", "\\"] {
            let script = format!("printf %s {}", quoted(text));
            let out = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(out.stdout, text.as_bytes());
        }
    }

    fn shell(script: &str) -> Result<(), ImageBuildError> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        attend(command, "sh", || "work".to_owned(), Some("input\n"), &crate::Silent)
    }

    #[test]
    fn a_failure_has_the_last_words() {
        shell("read x; [ $x = input ]").unwrap();
        let error = shell("echo a; echo b >&2; exit 3").unwrap_err().to_string();
        assert!(error.contains("work (exit status: 3); it says: a\nb"), "{error}");
        let said = "for i in $(seq 90); do echo $i; done; echo 'E: bad' >&2; echo c; exit 1";
        let error = shell(said).unwrap_err().to_string();
        assert!(error.ends_with("it says: bad"), "{error}");
        let many = shell("seq 1000; exit 1").unwrap_err().to_string();
        assert!(many.contains("\n1000") && !many.contains("\n975\n"), "{many}");
    }

    #[test]
    fn a_program_has_the_file_that_it_was_given() {
        let file = tempfile::tempfile().unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("echo here >/proc/self/fd/{}", file.as_raw_fd()));
        inherits(&mut command, &file);
        attend(command, "sh", String::new, None, &crate::Silent).unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(&mut &file, &mut text).unwrap();
        assert_eq!(text, "here\n");
    }

    #[test]
    fn the_scripts_are_right_for_a_shell() {
        for script in [PREPARE, FINISH] {
            let status = Command::new("sh").args(["-n", "-c", script]).status().unwrap();
            assert!(status.success());
        }
    }
}
