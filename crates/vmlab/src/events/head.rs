//! How reports of the kernel begin.

use super::EventKind;
use super::filesystems;
use super::title::{plain, symbol_in};

use EventKind::{
    Bug, FilesystemError, GeneralProtection, HardLockup, HungTask, Kasan, Kcsan, Kfence, Kmsan,
    Lockdep, MemoryLeak, OomKill, Oops, Panic, RcuStall, SoftLockup, Ubsan, Warning,
};

/// Where a report names the function that its title ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Site {
    /// Nowhere.
    None,
    /// Its first line.
    Head,
    /// The processor's registers, else the call trace.
    Rip,
    /// The call trace.
    Trace,
    /// Where the lock was to be taken.
    Lock,
}

/// What the first line of a report says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: EventKind,
    /// The title without the function.
    pub(super) title: String,
    pub(super) site: Site,
    /// Whether the report has but this line.
    pub(super) single: bool,
    /// Whether it is how an exception is announced, which may be the second line of a report.
    pub(super) banner: bool,
}

fn head_of(kind: EventKind, title: impl Into<String>, site: Site) -> Head {
    Head { kind, title: title.into(), site, single: false, banner: false }
}

/// What parts of the kernel put before everything that they say (`pr_fmt`).
const SUBSYSTEMS: [&str; 5] = ["watchdog: ", "NMI watchdog: ", "rcu: ", "kmemleak: ", "traps: "];

/// Whether a report begins here. `sure` says that the line is the kernel's; if it is not, only what no program
/// would write by chance counts.
pub(super) fn head(text: &str, sure: bool) -> Option<Head> {
    // Reports begin in the first column, and most lines do not begin like one.
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[') {
        return None;
    }
    let body = SUBSYSTEMS.iter().find_map(|name| text.strip_prefix(name)).unwrap_or(text);
    if let Some(message) = body.strip_prefix("Kernel panic - not syncing") {
        let message = message.trim_start_matches([':', ' ']);
        return Some(head_of(Panic, format!("kernel panic: {}", plain(message)), Site::None));
    }
    if let Some(rest) = body.strip_prefix("BUG: ") {
        return bug(rest, sure);
    }
    if let Some(rest) = body.strip_prefix("WARNING: ") {
        return lockdep(rest).or_else(|| warning(rest));
    }
    if let Some(rest) = body.strip_prefix("INFO: ") {
        return lockdep(rest).or_else(|| info(rest));
    }
    if let Some(inner) = body.strip_prefix("[ ").and_then(|rest| rest.strip_suffix(" ]")) {
        let rest = inner.strip_prefix("BUG: ").or_else(|| inner.strip_prefix("INFO: "))?;
        return lockdep(rest);
    }
    if let Some(place) = body.strip_prefix("kernel BUG at ") {
        return place.ends_with('!').then(|| head_of(Bug, "kernel BUG", Site::Rip));
    }
    exception(body).or_else(|| other(body, sure))
}

fn bug(rest: &str, sure: bool) -> Option<Head> {
    for (kind, name) in
        [(Kasan, "KASAN: "), (Kmsan, "KMSAN: "), (Kcsan, "KCSAN: "), (Kfence, "KFENCE: ")]
    {
        if let Some(what) = rest.strip_prefix(name) {
            let what = what.split(" in ").next().unwrap_or(what);
            return Some(head_of(kind, format!("{name}{}", plain(what)), Site::Head));
        }
    }
    // How arch/x86/mm/fault.c words it differs between releases; titles do not.
    let (kind, title, site) = if rest.starts_with("kernel NULL pointer dereference")
        || rest.starts_with("unable to handle kernel NULL pointer dereference")
    {
        (Oops, "BUG: unable to handle kernel NULL pointer dereference", Site::Rip)
    } else if rest.starts_with("unable to handle ") {
        (Oops, "BUG: unable to handle kernel paging request", Site::Rip)
    } else if rest.contains("stack guard page was hit at ") {
        (Oops, "BUG: stack guard page was hit", Site::Rip)
    } else if rest.starts_with("soft lockup - CPU#") {
        (SoftLockup, "BUG: soft lockup", Site::Rip)
    } else if rest.starts_with("sleeping function called from invalid context") {
        (Lockdep, "BUG: sleeping function called from invalid context", Site::Trace)
    } else if rest.starts_with("scheduling while atomic: ") {
        (Bug, "BUG: scheduling while atomic", Site::Trace)
    } else if rest.starts_with("workqueue lockup") {
        (Bug, "BUG: workqueue lockup", Site::None)
    } else if rest.starts_with("MAX_LOCK") || rest.starts_with("MAX_STACK_TRACE_ENTRIES") {
        // The validator ran out of its own tables.
        return None;
    } else {
        let title = format!("BUG: {}", clause(rest));
        let whose = ["Bad page ", "Bad rss-counter ", "Dentry ", "non-zero "];
        let site = if whose.iter().any(|w| rest.starts_with(w)) { Site::None } else { Site::Trace };
        return sure.then(|| head_of(Bug, title, site));
    };
    Some(head_of(kind, title, site))
}

/// The words of a message up to where it says who or where, without numbers.
fn clause(text: &str) -> String {
    let end = [" in process ", " on CPU", " at ", " - "].iter().filter_map(|w| text.find(w)).min();
    let words = text[..end.unwrap_or(text.len())].split(' ').filter(|word| {
        let value = word.trim_end_matches(':').contains(|c: char| "{}[]=/#:".contains(c));
        !word.is_empty() && !value && !word.contains(|c: char| c.is_ascii_digit())
    });
    let mut out: Vec<&str> = Vec::new();
    for word in words.take(8) {
        out.push(word.trim_end_matches([':', ',', '.', '!']));
        if word.ends_with([':', ',']) {
            break;
        }
    }
    plain(&out.join(" "))
}

/// What the lock validator (kernel/locking/lockdep.c) says behind `WARNING: `, formerly `INFO: `.
fn lockdep(rest: &str) -> Option<Head> {
    const HEADS: [(&str, &str, Site); 14] = [
        ("possible circular locking dependency", "possible deadlock", Site::Lock),
        ("possible recursive locking", "possible deadlock", Site::Lock),
        ("possible irq lock inversion dependency", "possible deadlock", Site::Lock),
        ("inconsistent lock state", "inconsistent lock state", Site::Lock),
        ("suspicious RCU usage", "WARNING: suspicious RCU usage", Site::Trace),
        ("Invalid wait context", "BUG: invalid wait context", Site::Trace),
        ("bad unlock balance detected", "WARNING: bad unlock balance", Site::Trace),
        ("bad contention detected", "WARNING: bad contention", Site::Trace),
        ("held lock freed", "WARNING: held lock freed", Site::Trace),
        ("lock held when returning", "WARNING: lock held when returning to user space", Site::Lock),
        ("Nested lock was not taken", "WARNING: nested lock was not taken", Site::Trace),
        (
            "trying to register non-static key",
            "INFO: trying to register non-static key",
            Site::Trace,
        ),
        ("still has locks held", "WARNING: still has locks held", Site::Trace),
        ("possible deadlock", "possible deadlock", Site::Lock),
    ];
    if rest.ends_with(" lock order detected") {
        return Some(head_of(Lockdep, "possible deadlock", Site::Lock));
    }
    // One names the task first: "WARNING: insmod/123 still has locks held!"
    let held = rest.find("still has locks held").map_or(rest, |at| &rest[at..]);
    let (_, title, site) = HEADS.iter().find(|(words, ..)| held.starts_with(words))?;
    Some(head_of(Lockdep, *title, *site))
}

/// `CPU: 0 PID: 1 at file:line func+0x1/0x2`, since 6.19 `file:line at func+0x1/0x2, CPU#0: comm/1`
/// (`__warn` in kernel/panic.c). Whatever else begins so is a remark.
fn warning(rest: &str) -> Option<Head> {
    let old = (rest.starts_with("CPU: ") && rest.contains(" PID: "))
        || (rest.starts_with("at ") && symbol_in(rest).is_some());
    let new = rest.contains(" at ") && rest.contains(", CPU#");
    (old || new).then(|| head_of(Warning, "WARNING", Site::Head))
}

fn info(rest: &str) -> Option<Head> {
    if rest.starts_with("task ") && rest.contains(" blocked") && rest.contains(" for more than ") {
        return Some(head_of(HungTask, "INFO: task hung", Site::Trace));
    }
    let stall = ["self-detected stall", "detected stall", "detected expedited stall"];
    if rest.starts_with("rcu") && stall.iter().any(|words| rest.contains(words)) {
        return Some(head_of(RcuStall, "INFO: rcu detected stall", Site::Rip));
    }
    None
}

/// How `die` of arch/x86/kernel/dumpstack.c announces an exception: its name, a code, `[#1]`. Since 6.11 all
/// begin with `Oops: `.
fn exception(body: &str) -> Option<Head> {
    if body.starts_with("PANIC: double fault") {
        return Some(head_of(Oops, "PANIC: double fault", Site::Rip));
    }
    let at = body.find(" [#")?;
    if !body[at + 3..].starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let oops = body.starts_with("Oops: ");
    let what = body.strip_prefix("Oops: ").unwrap_or(body);
    const NAMES: [(&str, EventKind, &str); 13] = [
        ("general protection fault", GeneralProtection, "general protection fault"),
        ("invalid opcode", Oops, "invalid opcode"),
        ("int3", Oops, "int3"),
        ("divide error", Oops, "divide error"),
        ("double fault", Oops, "double fault"),
        ("stack segment", Oops, "stack segment fault"),
        ("segment not present", Oops, "segment not present"),
        ("stack guard page", Oops, "stack guard page"),
        ("alignment check", Oops, "alignment check"),
        ("control protection fault", Oops, "control protection fault"),
        ("invalid TSS", Oops, "invalid TSS"),
        ("kernel stack overflow", Oops, "kernel stack overflow"),
        ("bounds", Oops, "bounds"),
    ];
    let named = NAMES.iter().find(|(words, ..)| what.starts_with(words));
    let (kind, title) = match named {
        Some((_, kind, title)) => (*kind, *title),
        // "Oops: 0002 [#1]" or "Oops: Oops: 0002 [#1]": a page fault whose first line is missing.
        None if oops => (Oops, "Oops"),
        None => return None,
    };
    Some(Head { banner: true, ..head_of(kind, title, Site::Rip) })
}

fn other(body: &str, sure: bool) -> Option<Head> {
    if let Some(rest) = body.strip_prefix("UBSAN: ") {
        // lib/ubsan.c: "UBSAN: shift-out-of-bounds in file:line:column"
        let (what, _) = rest.split_once(" in ")?;
        return Some(head_of(Ubsan, format!("UBSAN: {}", plain(what)), Site::Trace));
    }
    if body.contains("Watchdog detected hard LOCKUP on cpu") {
        return Some(head_of(HardLockup, "hard LOCKUP", Site::Rip));
    }
    if !sure {
        return None;
    }
    for (words, title) in [
        ("Out of memory: Kill", "OOM kill"),
        ("Out of memory (oom_kill_allocating_task): Kill", "OOM kill"),
        ("Memory cgroup out of memory: Kill", "OOM kill in memory cgroup"),
    ] {
        if body.starts_with(words) {
            let name = body.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'));
            let name = name.map(|(name, _)| name.split(')').next().unwrap_or(name));
            let title = name.map_or(title.to_owned(), |name| format!("{title}: {}", plain(name)));
            return Some(Head { single: true, ..head_of(OomKill, title, Site::None) });
        }
    }
    if body.starts_with("unreferenced object 0x") {
        return Some(head_of(MemoryLeak, "memory leak", Site::Trace));
    }
    if body.contains(" new suspected memory leaks") {
        let title = "kmemleak: new suspected memory leaks";
        return Some(Head { single: true, ..head_of(MemoryLeak, title, Site::None) });
    }
    if let Some(rest) = body.strip_prefix("CFI failure at ") {
        let title = symbol_in(rest).map_or("CFI failure".into(), |f| format!("CFI failure in {f}"));
        return Some(head_of(Bug, title, Site::None));
    }
    if body.starts_with("VFS: Busy inodes after unmount of ") {
        let title = "VFS: Busy inodes after unmount";
        return Some(Head { single: true, ..head_of(Bug, title, Site::None) });
    }
    if let Some(rest) = body.strip_prefix("BUG ") {
        // mm/slub.c: "BUG kmalloc-64 (Tainted: G): Poison overwritten"
        let (cache, rest) = rest.split_once(" (")?;
        let (taint, what) = rest.split_once("): ")?;
        return (taint.starts_with("Tainted") || taint.starts_with("Not tainted"))
            .then(|| head_of(Bug, format!("BUG: slab {cache}: {}", clause(what)), Site::None));
    }
    let title = filesystems::damage(body)?;
    Some(Head { single: true, ..head_of(FilesystemError, title, Site::None) })
}
