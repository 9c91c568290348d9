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

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmlab_wire::message;
use vmlab_wire::observation::{
    LENGTH, Load, MAX_REQUEST, ModuleAnswer, ModuleFile, ModuleRequest, Section, framed,
};

use crate::sys;
use allocations::Tracker;
use observe::{Depth, Log};

/// How long a module may be in use by what runs beside the cycles before that counts.
const BUSY_TIME: Duration = Duration::from_secs(2);

/// How long is waited before it is tried again.
const BUSY_STEP: Duration = Duration::from_millis(1);

/// How often the trace buffer is emptied while nothing is asked. It holds some hundred thousand events.
const TAKE_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// After so many cycles the trace buffer is emptied, which has room for some hundreds.
const CYCLES_PER_READING: u32 = 16;

/// Why a module was not loaded or unloaded.
struct Refused {
    module: String,
    error: io::Error,
}

/// What the arguments name.
#[derive(Debug)]
pub(crate) enum Asked {
    /// Answer requests; records of the log count from this number on.
    Serve(u64),
    /// Show the log from this number on, and these trace events, as they come.
    Follow(u64, Vec<String>),
}

impl Asked {
    pub(crate) fn of(what: &OsString, rest: &[OsString]) -> Option<Self> {
        let (from, rest) = rest.split_first()?;
        let from = from.to_str()?.parse().ok()?;
        let text = |word: &OsString| word.to_str().map(str::to_owned);
        match (what.as_bytes(), rest) {
            (b"serve", []) => Some(Self::Serve(from)),
            (b"follow", events) => {
                Some(Self::Follow(from, events.iter().map(text).collect::<Option<_>>()?))
            }
            _ => None,
        }
    }
}

/// Does what was asked, until the input ends.
pub(crate) fn run(asked: Asked, input: File, output: File) -> io::Result<()> {
    match asked {
        Asked::Serve(from) => serve(from, input, output),
        Asked::Follow(from, events) => follow::follow(from, &events, input, output),
    }
}

fn serve(from: u64, mut input: File, mut output: File) -> io::Result<()> {
    let mut log = Log::open(from)?;
    let mut tracker = Tracker::default();
    observe::clear_kmemleak();
    loop {
        // Meanwhile a command may keep the kernel busy.
        let mut waited = [PollFd::new(&input, PollFlags::IN)];
        if poll(&mut waited, Some(&TAKE_EVERY))? == 0 {
            tracker.take();
            continue;
        }
        let Some(request) = next_request(&mut input)? else { return Ok(()) };
        output.write_all(&framed(&answer(request, &mut log, &mut tracker)))?;
    }
}

fn next_request(input: &mut File) -> io::Result<Option<ModuleRequest>> {
    let mut length = [0; LENGTH];
    match input.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_REQUEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    input.take(length.into()).read_to_end(&mut bytes)?;
    message::decode(&bytes).map(Some).map_err(io::Error::other)
}

/// Does what is asked, and says how that went and what the guest is like now.
fn answer(request: ModuleRequest, log: &mut Log, tracker: &mut Tracker) -> ModuleAnswer {
    let mut answer = ModuleAnswer::default();
    if let ModuleRequest::Insert(_) | ModuleRequest::Cycle { .. } = request {
        tracker.begin();
    }
    let since = Instant::now();
    let mut loads = HashSet::new();
    let (done, depth) = match &request {
        ModuleRequest::Look => (Ok(()), Depth::Whole),
        ModuleRequest::Glance => (Ok(()), Depth::Glance),
        ModuleRequest::Insert(files) => (insert(files, &mut loads), Depth::Glance),
        ModuleRequest::Remove(names) => {
            (remove(names.iter().map(String::as_str), Duration::ZERO), Depth::Removed)
        }
        ModuleRequest::Cycle { files, count } => {
            (cycle(files, *count, &mut loads, (&mut answer.cycles, tracker)), Depth::Removed)
        }
    };
    answer.took_us = since.elapsed().as_micros() as u64;
    answer.loads = loads.into_iter().collect();
    answer.observation =
        observe::look(log, tracker, if done.is_ok() { depth } else { Depth::Glance });
    if let Err(Refused { module, error }) = done {
        answer.errno = error.raw_os_error().unwrap_or(libc::EIO);
        answer.module = module;
    }
    answer
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
    (done, tracker): (&mut u32, &mut Tracker),
) -> Result<(), Refused> {
    while *done < count {
        insert(files, loads)?;
        remove(files.iter().rev().map(|file| file.name.as_str()), BUSY_TIME)?;
        *done += 1;
        if done.is_multiple_of(CYCLES_PER_READING) {
            tracker.take();
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
