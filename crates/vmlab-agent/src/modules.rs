//! Loading the modules of the initramfs.

use std::ffi::CString;
use std::fs;
use std::io;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::sys;

/// Where the modules are.
const DIR: &str = "/modules";

/// One that loads modules needs no more than this of a stack, in bytes.
const STACK: usize = 64 * 1024;

/// What loading one module came to: its name, when it began and ended, and what went wrong.
type Loaded = (String, u64, u64, Result<(), String>);

/// Loads the modules of the initramfs, as many at once as there are CPUs and their needs allow. Returns
/// which ones, with beginning and end, and what went wrong, which matters only when something that is
/// needed is then missing.
pub(crate) fn load() -> (Vec<(String, u64, u64)>, Vec<String>) {
    load_list("list")
}

/// Loads those that the initramfs has for something that only this guest needs, such as the filesystem of
/// its disk. Returns what went wrong.
pub(crate) fn load_for(purpose: &str) -> Vec<String> {
    load_list(&format!("for-{purpose}")).1
}

fn load_list(name: &str) -> (Vec<(String, u64, u64)>, Vec<String>) {
    let mut steps = Vec::new();
    let list = match fs::read_to_string(format!("{DIR}/{name}")) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return (steps, Vec::new()),
        Err(e) => return (steps, vec![format!("reading {DIR}/{name}: {e}")]),
    };
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let mut trouble = Vec::new();
    for wave in waves(&list) {
        for (name, from, to, outcome) in in_parallel(&wave, cpus, &load_timed) {
            steps.push((name, from, to));
            trouble.extend(outcome.err());
        }
    }
    (steps, trouble)
}

/// The list's modules, those together that need nothing of each other: an empty line is between them.
fn waves(list: &str) -> Vec<Vec<&str>> {
    let mut waves = vec![Vec::new()];
    for line in list.lines() {
        match (line, waves.last_mut()) {
            ("", _) | (_, None) => waves.push(Vec::new()),
            (line, Some(wave)) => wave.push(line),
        }
    }
    waves.retain(|wave| !wave.is_empty());
    waves
}

/// Does `work` for each line, in up to `threads` threads, this one among them.
fn in_parallel<R: Send>(
    lines: &[&str],
    threads: usize,
    work: &(impl Fn(&str) -> R + Sync),
) -> Vec<R> {
    let queue = Mutex::new(lines.iter());
    let worker = || {
        let mut done = Vec::new();
        // The lock is held for taking a line only.
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(line) = next() {
            done.push(work(line));
        }
        done
    };
    thread::scope(|scope| {
        let more = threads.min(lines.len()).saturating_sub(1);
        let spawn = |_| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, worker).ok();
        // What no thread could be had for, this one does.
        let helpers: Vec<_> = (0..more).filter_map(spawn).collect();
        let mut done = worker();
        done.extend(helpers.into_iter().filter_map(|helper| helper.join().ok()).flatten());
        done
    })
}

fn load_timed(line: &str) -> Loaded {
    let from = sys::monotonic_ns();
    let outcome = load_module(line);
    let (file, _) = split(line);
    let name = file.split_once('-').map_or(file, |(_, name)| name).trim_end_matches(".ko");
    (name.to_owned(), from, sys::monotonic_ns(), outcome)
}

/// A line's file and parameters.
fn split(line: &str) -> (&str, &str) {
    line.split_once(' ').unwrap_or((line, ""))
}

fn load_module(line: &str) -> Result<(), String> {
    let (file, parameters) = split(line);
    let path = format!("{DIR}/{file}");
    let parameters = CString::new(parameters).map_err(|e| format!("{path}: {e}"))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|e| format!("opening module {path}: {e}"))?;
    match finit_module(&file, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // What the kernel says for a symbol that no loaded module has.
        Err(Errno::NOENT) => {
            Err(format!("loading module {path}: a module that it needs is missing"))
        }
        Err(e) => Err(format!("loading module {path}: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn empty_lines_are_between_waves() {
        let list = "00-virtio.ko\n01-fuse.ko a=1 b=2\n\n02-virtiofs.ko\n\n\n";
        assert_eq!(
            waves(list),
            [vec!["00-virtio.ko", "01-fuse.ko a=1 b=2"], vec!["02-virtiofs.ko"]]
        );
        assert!(waves("").is_empty());
    }

    #[test]
    fn a_wave_is_done_at_once_and_whole() {
        // Neither of the two goes on before the other one has begun.
        let both = Barrier::new(2);
        let mut done = in_parallel(&["a", "b"], 2, &|line| {
            both.wait();
            line.to_owned()
        });
        done.sort();
        assert_eq!(done, ["a", "b"]);
        let lines: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let mut done = in_parallel(&lines, 3, &|line| line.parse::<u32>().unwrap());
        done.sort_unstable();
        assert_eq!(done, (0..100).collect::<Vec<_>>());
        assert_eq!(in_parallel(&["alone"], 8, &str::len), [5]);
    }

    #[test]
    fn steps_have_the_modules_name() {
        let (name, from, to, outcome) = load_timed("07-no-such-module.ko x=1");
        assert_eq!(name, "no-such-module");
        assert!(from <= to && outcome.unwrap_err().contains("/modules/07-no-such-module.ko"));
    }
}
