//! Memory that code of modules allocates and does not free, by the kernel's own trace events. Any distribution's
//! kernel has them; kmemleak, which finds more, is in none.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
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

/// Where modules are loaded: `MODULES_VADDR` of x86-64. What the kernel itself allocates is none of theirs.
#[cfg(target_arch = "x86_64")]
const MODULES: u64 = 0xffff_ffff_c000_0000;
#[cfg(not(target_arch = "x86_64"))]
const MODULES: u64 = 0;

/// Events of memory that is given out, and those of memory that is taken back. A kernel has some of them.
const ALLOCATED: [&str; 4] =
    ["kmalloc", "kmalloc_node", "kmem_cache_alloc", "kmem_cache_alloc_node"];
const FREED: [&str; 2] = ["kfree", "kmem_cache_free"];

/// Files of what was found earlier, since reading the buffer empties it. In memory, for root alone.
const KEPT: &str = "/run/vmlab-module-memory";

/// Why it is not known what was not freed.
#[derive(Debug)]
pub(super) enum Untracked {
    NoTracing,
    NoEvents,
    TooMany,
    Io(io::Error),
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
        Self::Io(error)
    }
}

/// Where in an event's bytes its fields are.
#[derive(Debug, Clone, Copy)]
enum Event {
    Allocated { call_site: usize, pointer: usize, bytes: usize },
    Freed { pointer: usize },
}

/// Memory that is in use.
#[derive(Debug, Clone, Copy)]
struct Allocation {
    call_site: u64,
    bytes: u64,
}

/// The top of tracefs.
pub(super) fn tracing() -> Result<&'static Path, Untracked> {
    let root = ROOTS.iter().map(Path::new).find(|root| root.join("events").is_dir());
    root.ok_or(Untracked::NoTracing)
}

fn instance() -> Result<PathBuf, Untracked> {
    Ok(tracing()?.join(INSTANCE))
}

/// Begins to watch, if that has not begun yet.
pub(super) fn begin() -> Result<(), Untracked> {
    let dir = instance()?;
    match fs::create_dir(&dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) => return Err(e.into()),
    }
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
    if found { Ok(()) } else { Err(Untracked::NoEvents) }
}

/// What was allocated and not freed since it has begun, by the place of the call; nothing if it has not begun.
pub(super) fn unfreed() -> Result<Vec<Unfreed>, Untracked> {
    let dir = instance()?;
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let kinds = kinds(&dir);
    let mut alive = kept()?;
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
        read(&item.path().join("trace_pipe_raw"), &kinds, &mut events)?;
    }
    events.sort_by_key(|(time, ..)| *time);
    for (_, pointer, allocation) in events {
        match allocation {
            Some(allocation) => _ = alive.insert(pointer, allocation),
            None => _ = alive.remove(&pointer),
        }
    }
    keep(&alive)?;
    let mut sites: HashMap<u64, Unfreed> = HashMap::new();
    for Allocation { call_site, bytes } in alive.into_values() {
        let site = sites.entry(call_site).or_insert(Unfreed { call_site, count: 0, bytes: 0 });
        site.count += 1;
        site.bytes += bytes;
    }
    let mut sites: Vec<Unfreed> = sites.into_values().collect();
    sites.sort_by_key(|site| site.call_site);
    Ok(sites)
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
    // Sub-buffers are pages, unless somebody has made them larger.
    let mut page = vec![0; 65536];
    loop {
        let length = match file.read(&mut page) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        for page in page[..length].chunks(PAGE) {
            let found = ring_buffer::parse(page);
            if found.missed {
                return Err(Untracked::TooMany);
            }
            events
                .extend(found.events.iter().filter_map(|(time, data)| change(*time, data, kinds)));
        }
    }
}

/// The size of what the kernel reads in one go.
const PAGE: usize = 4096;

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

/// What was alive when the buffer was read before.
fn kept() -> io::Result<HashMap<u64, Allocation>> {
    let bytes = match fs::read(KEPT) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let one = |bytes: &[u8]| {
        Some((word(bytes, 0)?, Allocation { call_site: word(bytes, 8)?, bytes: word(bytes, 16)? }))
    };
    Ok(bytes.chunks(24).filter_map(one).collect())
}

fn keep(alive: &HashMap<u64, Allocation>) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(alive.len() * 24);
    for (pointer, Allocation { call_site, bytes: size }) in alive {
        for word in [pointer, call_site, size] {
            bytes.extend(word.to_ne_bytes());
        }
    }
    let mut file: File =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(KEPT)?;
    io::Write::write_all(&mut file, &bytes)
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
