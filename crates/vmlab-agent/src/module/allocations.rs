//! Memory that code of modules allocates and does not free, by the kernel's own trace events. Any distribution's
//! kernel has them; kmemleak, which finds more, is in none.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vmlab_wire::observation::Unfreed;

use super::ring_buffer::{self, word};

/// Places of tracefs.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Our own buffer, which no one else's settings concern.
const INSTANCE: &str = "instances/vmlab-module";

/// Its size for each processor, in KiB: two hundred thousand events.
const BUFFER_KB: u32 = 8192;

/// Where modules may be loaded, and more: `MODULES_VADDR` of an x86-64 kernel without CONFIG_RANDOMIZE_BASE, which is below that
/// of one with it. Most of what the kernel itself allocates is left out so.
#[cfg(target_arch = "x86_64")]
const MODULES: u64 = 0xffff_ffff_a000_0000;
#[cfg(not(target_arch = "x86_64"))]
const MODULES: u64 = 0;

/// Events of memory that is given out, and those of memory that is taken back. A kernel has some of them.
const ALLOCATED: [&str; 4] =
    ["kmalloc", "kmalloc_node", "kmem_cache_alloc", "kmem_cache_alloc_node"];
const FREED: [&str; 2] = ["kfree", "kmem_cache_free"];

/// Why it is not known what was not freed.
#[derive(Debug, Clone)]
pub(super) enum Untracked {
    NoTracing,
    NoEvents,
    TooMany,
    Io(String),
}

impl fmt::Display for Untracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTracing => f.write_str("this kernel has no tracing (CONFIG_FTRACE)"),
            Self::NoEvents => f.write_str("this kernel has no trace events of memory"),
            Self::TooMany => f.write_str("there was more going on than the trace buffer holds"),
            Self::Io(error) => write!(f, "tracing cannot be used: {error}"),
        }
    }
}

impl std::error::Error for Untracked {}

impl From<io::Error> for Untracked {
    fn from(error: io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

/// Where in an event's bytes its fields are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    Allocated { call_site: usize, pointer: usize, bytes: usize },
    Freed { pointer: usize },
}

/// Memory that is in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allocation {
    call_site: u64,
    bytes: u64,
}

/// The top of tracefs.
pub(super) fn tracing() -> Result<&'static Path, Untracked> {
    let root = ROOTS.iter().map(Path::new).find(|root| root.join("events").is_dir());
    root.ok_or(Untracked::NoTracing)
}

/// Follows allocations from a moment on.
#[derive(Debug, Default)]
pub(super) enum Tracker {
    /// It has not begun.
    #[default]
    Idle,
    Following {
        dir: PathBuf,
        kinds: HashMap<u16, Event>,
        /// Memory that is in use, by its address.
        alive: HashMap<u64, Allocation>,
    },
    Failed(Untracked),
}

impl Tracker {
    /// Begins, if that has not happened yet.
    pub(super) fn begin(&mut self) {
        if let Self::Idle = self {
            *self = match follow() {
                Ok(dir) => {
                    let kinds = kinds(&dir);
                    Self::Following { dir, kinds, alive: HashMap::new() }
                }
                Err(why) => Self::Failed(why),
            };
        }
    }

    /// Takes what the kernel has noted, whose buffer would overflow in the end.
    pub(super) fn take(&mut self) {
        if let Self::Following { dir, kinds, alive } = self
            && let Err(why) = take(dir, kinds, alive)
        {
            *self = Self::Failed(why);
        }
    }

    /// What was allocated and not freed since it has begun, by the place of the call.
    pub(super) fn unfreed(&mut self) -> Result<Vec<Unfreed>, Untracked> {
        self.take();
        let alive = match self {
            Self::Idle => return Ok(Vec::new()),
            Self::Following { alive, .. } => alive,
            Self::Failed(why) => return Err(why.clone()),
        };
        let mut sites: HashMap<u64, Unfreed> = HashMap::new();
        for Allocation { call_site, bytes } in alive.values() {
            let new = Unfreed { call_site: *call_site, count: 0, bytes: 0 };
            let site = sites.entry(*call_site).or_insert(new);
            site.count += 1;
            site.bytes += bytes;
        }
        let mut sites: Vec<Unfreed> = sites.into_values().collect();
        sites.sort_by_key(|site| site.call_site);
        Ok(sites)
    }
}

/// Has the kernel note allocations, in a buffer of ours.
fn follow() -> Result<PathBuf, Untracked> {
    let dir = tracing()?.join(INSTANCE);
    fs::create_dir(&dir)?;
    // The same clock for all processors, as memory may be freed by another one.
    fs::write(dir.join("trace_clock"), "global")?;
    fs::write(dir.join("buffer_size_kb"), BUFFER_KB.to_string())?;
    let mut found = false;
    for (names, filter) in [(&ALLOCATED[..], true), (&FREED[..], false)] {
        for name in names {
            let event = dir.join("events/kmem").join(name);
            if !event.is_dir() {
                continue;
            }
            if filter && MODULES > 0 {
                fs::write(event.join("filter"), format!("call_site >= {MODULES:#x}"))?;
            }
            fs::write(event.join("enable"), "1")?;
            found = true;
        }
    }
    if found { Ok(dir) } else { Err(Untracked::NoEvents) }
}

fn take(
    dir: &Path,
    kinds: &HashMap<u16, Event>,
    alive: &mut HashMap<u64, Allocation>,
) -> Result<(), Untracked> {
    let mut events = Vec::new();
    for item in fs::read_dir(dir.join("per_cpu"))?.flatten() {
        let statistics = fs::read_to_string(item.path().join("stats"))?;
        let lost = |name: &str| {
            let value = statistics.lines().find_map(|line| line.strip_prefix(name))?;
            value.trim().parse::<u64>().ok()
        };
        if ["overrun:", "dropped events:"].into_iter().filter_map(lost).any(|count| count > 0) {
            return Err(Untracked::TooMany);
        }
        read(&item.path().join("trace_pipe_raw"), kinds, &mut events)?;
    }
    events.sort_by_key(|(time, ..)| *time);
    for (_, pointer, allocation) in events {
        match allocation {
            Some(allocation) => _ = alive.insert(pointer, allocation),
            None => _ = alive.remove(&pointer),
        }
    }
    Ok(())
}

/// The events by their numbers.
fn kinds(dir: &Path) -> HashMap<u16, Event> {
    let format = |name: &str| fs::read_to_string(dir.join("events/kmem").join(name).join("format"));
    let mut kinds = HashMap::new();
    for name in ALLOCATED {
        let Ok(text) = format(name) else { continue };
        let fields = (
            number(&text),
            field(&text, "call_site"),
            field(&text, "ptr"),
            field(&text, "bytes_alloc"),
        );
        if let (Some(id), Some(call_site), Some(pointer), Some(bytes)) = fields {
            kinds.insert(id, Event::Allocated { call_site, pointer, bytes });
        }
    }
    for name in FREED {
        let Ok(text) = format(name) else { continue };
        if let (Some(id), Some(pointer)) = (number(&text), field(&text, "ptr")) {
            kinds.insert(id, Event::Freed { pointer });
        }
    }
    kinds
}

/// The number of an event, from the description of its format.
fn number(format: &str) -> Option<u16> {
    format.lines().find_map(|line| line.strip_prefix("ID: "))?.trim().parse().ok()
}

/// Where a field of eight bytes is.
fn field(format: &str, name: &str) -> Option<usize> {
    let line = format.lines().find(|line| {
        let declared = line.trim().strip_prefix("field:").and_then(|rest| rest.split(';').next());
        declared.and_then(|text| text.rsplit([' ', '*']).next()) == Some(name)
    })?;
    let value = |key: &str| line.split_once(key)?.1.split(';').next()?.trim().parse().ok();
    (value("size:") == Some(8)).then(|| value("offset:")).flatten()
}

/// Memory that was given out, or taken back, at a time.
type Change = (u64, u64, Option<Allocation>);

/// Reads a processor's buffer until it is empty.
fn read(
    path: &Path,
    kinds: &HashMap<u16, Event>,
    events: &mut Vec<Change>,
) -> Result<(), Untracked> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    // Each read gives one sub-buffer, which is a page of the kernel's, or as large as somebody has made it.
    let mut page = vec![0; LARGEST_PAGE];
    loop {
        let length = match file.read(&mut page) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let found = ring_buffer::parse(&page[..length]);
        if found.missed {
            return Err(Untracked::TooMany);
        }
        events.extend(found.events.iter().filter_map(|(time, data)| change(*time, data, kinds)));
    }
}

/// The largest page of any architecture.
const LARGEST_PAGE: usize = 64 * 1024;

fn change(time: u64, data: &[u8], kinds: &HashMap<u16, Event>) -> Option<Change> {
    let id = u16::from_ne_bytes(data.get(..2)?.try_into().ok()?);
    Some(match *kinds.get(&id)? {
        Event::Allocated { call_site, pointer, bytes } => {
            let (call_site, bytes) = (word(data, call_site)?, word(data, bytes)?);
            (time, word(data, pointer)?, Some(Allocation { call_site, bytes }))
        }
        Event::Freed { pointer } => (time, word(data, pointer)?, None),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: &str = "\
name: kmalloc
ID: 493
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;

\tfield:unsigned long call_site;\toffset:8;\tsize:8;\tsigned:0;
\tfield:const void * ptr;\toffset:16;\tsize:8;\tsigned:0;
\tfield:size_t bytes_alloc;\toffset:32;\tsize:8;\tsigned:0;
\tfield:int node;\toffset:44;\tsize:4;\tsigned:1;
";

    #[test]
    fn formats_of_events_are_read() {
        assert_eq!(number(FORMAT), Some(493));
        assert_eq!(field(FORMAT, "call_site"), Some(8));
        assert_eq!(field(FORMAT, "ptr"), Some(16));
        assert_eq!(field(FORMAT, "bytes_alloc"), Some(32));
        assert_eq!(field(FORMAT, "node"), None);
        assert_eq!(field(FORMAT, "bytes"), None);
    }

    #[test]
    fn events_are_told_apart() {
        let kinds = HashMap::from([
            (1, Event::Allocated { call_site: 8, pointer: 16, bytes: 24 }),
            (2, Event::Freed { pointer: 16 }),
        ]);
        let event = |id: u64| [id, 7, 8, 9].map(u64::to_ne_bytes).concat();
        let (time, pointer, allocation) = change(5, &event(1), &kinds).unwrap();
        let allocation = allocation.unwrap();
        assert_eq!((time, pointer, allocation.call_site, allocation.bytes), (5, 8, 7, 9));
        assert!(matches!(change(6, &event(2), &kinds), Some((6, 8, None))));
        assert!(change(6, &event(3), &kinds).is_none());
        assert!(change(6, &event(1)[..20], &kinds).is_none());
    }
}
