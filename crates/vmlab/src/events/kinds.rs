//! The names of kinds, and of groups of them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use vmlab_artifacts::spec::nearest;

use super::{EventKind, EventKinds};

use EventKind::{
    Bug, FilesystemError, GeneralProtection, HardLockup, HungTask, Kasan, Kcsan, Kfence, Kmsan,
    Lockdep, MemoryLeak, OomKill, Oops, Panic, RcuStall, SoftLockup, Taint, Ubsan, Warning,
};

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Panic,
        Oops,
        Bug,
        GeneralProtection,
        Kasan,
        Kmsan,
        Kcsan,
        Ubsan,
        Kfence,
        Lockdep,
        Warning,
        HungTask,
        SoftLockup,
        HardLockup,
        RcuStall,
        OomKill,
        FilesystemError,
        MemoryLeak,
        Taint,
    ];

    /// Those that make a run fail unless it says otherwise: after them the kernel cannot be trusted.
    pub const DEFAULT: [Self; 12] = [
        Panic,
        Oops,
        Bug,
        GeneralProtection,
        Kasan,
        Kmsan,
        Kcsan,
        Ubsan,
        Kfence,
        SoftLockup,
        HardLockup,
        RcuStall,
    ];

    const SANITIZERS: [Self; 5] = [Kasan, Kmsan, Kcsan, Ubsan, Kfence];

    const LOCKUPS: [Self; 4] = [HungTask, SoftLockup, HardLockup, RcuStall];

    /// Its name in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Panic => "panic",
            Oops => "oops",
            Bug => "bug",
            GeneralProtection => "general-protection",
            Kasan => "kasan",
            Kmsan => "kmsan",
            Kcsan => "kcsan",
            Ubsan => "ubsan",
            Kfence => "kfence",
            Lockdep => "lockdep",
            Warning => "warning",
            HungTask => "hung-task",
            SoftLockup => "soft-lockup",
            HardLockup => "hard-lockup",
            RcuStall => "rcu-stall",
            OomKill => "oom-kill",
            FilesystemError => "filesystem-error",
            MemoryLeak => "memory-leak",
            Taint => "taint",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no kind of event has.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no kind of event {name:?}{}; there are: {}", did_you_mean(*.nearest), .known.join(", "))]
pub struct UnknownKind {
    /// What was asked for.
    pub name: String,
    /// The known name that it may be a slip of.
    pub nearest: Option<&'static str>,
    /// All that would do.
    pub known: Vec<&'static str>,
}

fn did_you_mean(name: Option<&str>) -> String {
    name.map(|name| format!(", did you mean {name:?}?")).unwrap_or_default()
}

impl UnknownKind {
    fn new(name: &str, groups: &[&'static str]) -> Self {
        let known: Vec<_> =
            EventKind::ALL.iter().map(|kind| kind.name()).chain(groups.iter().copied()).collect();
        Self { name: name.to_owned(), nearest: nearest(name, &known), known }
    }
}

impl FromStr for EventKind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::named(name).ok_or_else(|| UnknownKind::new(name, &[]))
    }
}

/// Names that stand for several kinds.
pub(crate) const GROUPS: [&str; 5] = ["all", "default", "none", "sanitizers", "lockups"];

/// Those that make a run fail unless it says otherwise.
pub fn default_kinds() -> EventKinds {
    EventKinds::from(EventKind::DEFAULT)
}

/// What a list of kinds and groups names together. Groups are `all`, `default`, `none`, `sanitizers` and
/// `lockups`.
///
/// # Errors
/// The first name that means nothing, with the nearest that does.
pub fn parse_kinds<S: AsRef<str>>(
    names: impl IntoIterator<Item = S>,
) -> Result<EventKinds, UnknownKind> {
    let mut kinds = EventKinds::new();
    for name in names {
        let name = name.as_ref();
        match name {
            "all" => kinds.extend(EventKind::ALL),
            "default" => kinds.extend(EventKind::DEFAULT),
            "none" => {}
            "sanitizers" => kinds.extend(EventKind::SANITIZERS),
            "lockups" => kinds.extend(EventKind::LOCKUPS),
            name => {
                let kind = EventKind::named(name).ok_or_else(|| UnknownKind::new(name, &GROUPS))?;
                kinds.insert(kind);
            }
        }
    }
    Ok(kinds)
}
