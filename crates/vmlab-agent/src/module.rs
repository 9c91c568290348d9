//! Loading and unloading a module, and a look at what the guest is like around that.

mod allocations;
mod observe;
mod ring_buffer;

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use vmlab_wire::observation::{ModuleAnswer, Section};

use observe::Depth;

use crate::sys;

/// The largest module that is taken, in bytes.
const MAX_MODULE: u64 = 1 << 30;

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
    /// With these parameters; the module itself is on the standard input.
    Insert {
        name: String,
        parameters: CString,
    },
    Remove {
        name: CString,
    },
}

impl Asked {
    pub(crate) fn of(what: &OsString, rest: &[OsString]) -> Option<Self> {
        let text = |word: &OsString| CString::new(word.as_bytes()).ok();
        let (from, rest) = rest.split_first()?;
        let log_from = from.to_str()?.parse().ok()?;
        let what = match (what.as_bytes(), rest) {
            (b"look", []) => What::Look(Depth::Whole),
            (b"glance", []) => What::Look(Depth::Glance),
            (b"insert", [name, parameters]) => {
                What::Insert { name: name.to_str()?.to_owned(), parameters: text(parameters)? }
            }
            (b"remove", [name]) => What::Remove { name: text(name)? },
            _ => return None,
        };
        Some(Self { log_from, what })
    }
}

/// Does what was asked, and writes how that went and what the guest is like now.
pub(crate) fn answer(asked: &Asked, input: File, mut output: File) -> io::Result<()> {
    let mut answer = ModuleAnswer::default();
    let mut tracked = Ok(());
    let mut since = Instant::now();
    let done = match &asked.what {
        What::Look(_) => Ok(()),
        What::Insert { name, parameters } => {
            let mut module = Vec::new();
            input.take(MAX_MODULE).read_to_end(&mut module)?;
            tracked = allocations::begin();
            since = Instant::now();
            let done = sys::init_module(&module, parameters);
            answer.took_us = since.elapsed().as_micros() as u64;
            answer.sections = sections(name);
            done
        }
        What::Remove { name } => sys::delete_module(name),
    };
    if answer.took_us == 0 {
        answer.took_us = since.elapsed().as_micros() as u64;
    }
    if let Err(error) = done {
        answer.errno = error.raw_os_error().unwrap_or(libc::EIO);
    }
    let depth = match asked.what {
        What::Look(depth) => depth,
        What::Remove { .. } if answer.errno == 0 => Depth::Removed,
        What::Insert { .. } | What::Remove { .. } => Depth::Glance,
    };
    answer.observation = observe::look(asked.log_from, depth);
    if let Err(error) = tracked {
        answer.observation.untracked = Some(error.to_string());
    }
    output.write_all(&answer.encode())
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
