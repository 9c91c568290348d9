//! Loading and unloading modules, and a look at what the guest is like around that.

mod allocations;
mod follow;
mod observe;
mod ring_buffer;

use std::collections::HashSet;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vmlab_wire::observation::{Load, MAX_FILES, ModuleAnswer, ModuleFile, Section};

use crate::sys;
use observe::Depth;

/// How long a module may be in use by what runs beside the cycles before that counts.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// How long is waited before it is tried again.
const BUSY_STEP: Duration = Duration::from_millis(1);

/// After so many cycles the trace buffer is emptied, which has room for some hundreds.
const CYCLES_PER_READING: u32 = 16;

/// What the host wants, and the number of the first record of the kernel's log that it does not know.
#[derive(Debug)]
pub(crate) struct Asked {
    log_from: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    /// At all of it, or only at what changes at once.
    Look(Depth),
    /// The modules on the standard input, in their order.
    Insert,
    /// These, in their order.
    Remove(Vec<String>),
    /// The modules on the standard input, so often, and unload them in the opposite order.
    Cycle(u32),
    /// Show the log, and these trace events, as they come.
    Follow(Vec<String>),
}

/// Why a module was not loaded or unloaded.
struct Refused {
    module: String,
    error: io::Error,
}

impl Asked {
    pub(crate) fn of(what: &OsString, rest: &[OsString]) -> Option<Self> {
        let (from, rest) = rest.split_first()?;
        let log_from = from.to_str()?.parse().ok()?;
        let name = |name: &OsString| name.to_str().map(str::to_owned);
        let what = match (what.as_bytes(), rest) {
            (b"look", []) => What::Look(Depth::Whole),
            (b"glance", []) => What::Look(Depth::Glance),
            (b"insert", []) => What::Insert,
            (b"remove", names) => What::Remove(names.iter().map(name).collect::<Option<_>>()?),
            (b"cycle", [count]) => What::Cycle(count.to_str()?.parse().ok()?),
            (b"follow", events) => What::Follow(events.iter().map(name).collect::<Option<_>>()?),
            _ => return None,
        };
        Some(Self { log_from, what })
    }
}

/// Does what was asked, and writes how that went and what the guest is like now.
pub(crate) fn answer(asked: &Asked, input: File, mut output: File) -> io::Result<()> {
    if let What::Follow(events) = &asked.what {
        return follow::follow(asked.log_from, events, input, output);
    }
    let mut answer = ModuleAnswer::default();
    let mut tracked = Ok(());
    let files = match asked.what {
        What::Insert | What::Cycle(_) => {
            let mut bytes = Vec::new();
            input.take(MAX_FILES).read_to_end(&mut bytes)?;
            tracked = allocations::begin();
            ModuleFile::decode_all(&bytes).map_err(io::Error::other)?
        }
        What::Look(_) | What::Remove(_) | What::Follow(_) => Vec::new(),
    };
    let since = Instant::now();
    let mut loads = HashSet::new();
    let done = match &asked.what {
        What::Look(_) | What::Follow(_) => Ok(()),
        What::Insert => insert(&files, &mut loads),
        What::Remove(names) => remove(names.iter().map(String::as_str), Duration::ZERO),
        What::Cycle(count) => cycle(&files, *count, &mut loads, &mut answer.cycles),
    };
    answer.took_us = since.elapsed().as_micros() as u64;
    answer.loads = loads.into_iter().collect();
    let depth = match (&asked.what, &done) {
        (What::Look(depth), _) => *depth,
        (What::Remove(_) | What::Cycle(_), Ok(())) => Depth::Removed,
        _ => Depth::Glance,
    };
    if let Err(Refused { module, error }) = done {
        answer.errno = error.raw_os_error().unwrap_or(libc::EIO);
        answer.module = module;
    }
    answer.observation = observe::look(asked.log_from, depth);
    if let Err(error) = tracked {
        answer.observation.untracked = Some(error.to_string());
    }
    output.write_all(&answer.encode())
}

fn insert(files: &[ModuleFile], loads: &mut HashSet<Load>) -> Result<(), Refused> {
    for ModuleFile { name, parameters, content } in files {
        let refused = |error| Refused { module: name.clone(), error };
        let parameters = CString::new(parameters.as_str()).map_err(|e| refused(e.into()))?;
        sys::init_module(content, &parameters).map_err(refused)?;
        loads.insert(Load { module: name.clone(), sections: sections(name) });
    }
    Ok(())
}

/// Unloads modules; one that is in use is tried for so long.
fn remove<'a>(names: impl Iterator<Item = &'a str>, busy: Duration) -> Result<(), Refused> {
    for name in names {
        let refused = |error| Refused { module: name.to_owned(), error };
        let text = CString::new(name).map_err(|e| refused(e.into()))?;
        let until = Instant::now() + busy;
        while let Err(error) = sys::delete_module(&text) {
            let in_use = matches!(error.raw_os_error(), Some(libc::EWOULDBLOCK | libc::EBUSY));
            if !in_use || Instant::now() >= until {
                return Err(refused(error));
            }
            std::thread::sleep(BUSY_STEP);
        }
    }
    Ok(())
}

fn cycle(
    files: &[ModuleFile],
    count: u32,
    loads: &mut HashSet<Load>,
    done: &mut u32,
) -> Result<(), Refused> {
    while *done < count {
        insert(files, loads)?;
        remove(files.iter().rev().map(|file| file.name.as_str()), BUSY_TIME)?;
        *done += 1;
        if done.is_multiple_of(CYCLES_PER_READING) {
            // What goes wrong with it is seen when it is read at the end.
            let _ = allocations::unfreed();
        }
    }
    Ok(())
}

/// Where a loaded module's sections are; nothing of one that is not loaded.
fn sections(name: &str) -> Vec<Section> {
    let dir = Path::new("/sys/module").join(name).join("sections");
    let items = fs::read_dir(&dir).into_iter().flatten().flatten();
    let section = |item: fs::DirEntry| {
        let text = fs::read_to_string(item.path()).ok()?;
        let address = u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()?;
        Some(Section { name: item.file_name().into_string().ok()?, address })
    };
    items.filter_map(section).collect()
}
