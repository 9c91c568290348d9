//! What a guest's kernel says of itself that makes a run fail: panics, oopses, sanitizers' reports and the
//! like, read from its console.
//!
//! ```
//! use vmlab::events::{EventKind, EventReader};
//!
//! let mut reader = EventReader::all();
//! reader.feed(b"[    1.500000] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n");
//! reader.finish();
//! let event = &reader.events()[0];
//! assert_eq!((event.kind, event.at_us), (EventKind::Panic, Some(1_500_000)));
//! assert_eq!(event.title, "kernel panic: VFS: Unable to mount root fs");
//! ```

mod extent;
mod filesystems;
mod head;
mod kinds;
mod line;
mod reader;
mod symbols;
mod title;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) use kinds::GROUPS;
pub use kinds::{UnknownKind, default_kinds, parse_kinds};
pub use reader::EventReader;
pub(crate) use symbols::with_places;
pub use symbols::{Location, Place, Symbols, decode};

/// What happened to a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum EventKind {
    /// `Kernel panic - not syncing`.
    Panic,
    /// An access to memory that is not there, or another exception in the kernel.
    Oops,
    /// `kernel BUG at`, and what else begins with `BUG:` and has no kind of its own.
    Bug,
    /// A general protection fault in the kernel.
    GeneralProtection,
    /// Kernel Address Sanitizer.
    Kasan,
    /// Kernel Memory Sanitizer.
    Kmsan,
    /// Kernel Concurrency Sanitizer.
    Kcsan,
    /// Undefined Behaviour Sanitizer.
    Ubsan,
    /// Kernel Electric Fence.
    Kfence,
    /// The lock validator, also sleeping where that is not allowed, and RCU used wrongly.
    Lockdep,
    /// `WARNING:`.
    Warning,
    /// A task that was blocked for too long.
    HungTask,
    /// A CPU that did not schedule.
    SoftLockup,
    /// A CPU that took no interrupts.
    HardLockup,
    /// A grace period of RCU that did not end.
    RcuStall,
    /// The kernel killed a process for want of memory.
    OomKill,
    /// A filesystem found itself damaged.
    FilesystemError,
    /// Memory that nobody refers to any more (kmemleak).
    MemoryLeak,
    /// A new reason for which the kernel calls itself tainted, of those that are damage: a machine check, a
    /// bad page, an oops, a warning, a soft lockup. Modules from elsewhere are none.
    Taint,
}

/// Kinds of events, for what makes a run fail.
pub type EventKinds = BTreeSet<EventKind>;

/// Something that a kernel said of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelEvent {
    /// What happened.
    pub kind: EventKind,
    /// What tells it from other events, without what differs each time: `KASAN: use-after-free in foo`.
    pub title: String,
    /// The kernel's clock, in microseconds since it started, where the line has it.
    pub at_us: Option<u64>,
    /// The lines of the report, without time stamps.
    pub report: Vec<String>,
    /// How often it happened; only the first has its report kept.
    pub count: u32,
}
