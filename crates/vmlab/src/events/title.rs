//! Titles of reports: as syzkaller words them, without what differs each time.

use super::head::{Head, Site};

/// The longest title; what a guest puts into one is cut there.
pub(super) const MAX_TITLE: usize = 160;

/// Functions that only carry or handle a report, by how their names begin: the one that matters is behind them.
const HANDLERS: [&str; 42] = [
    "__pfx_",
    "dump_stack",
    "__dump_stack",
    "show_stack",
    "show_trace",
    "print_",
    "panic",
    "_printk",
    "printk",
    "vprintk",
    "__warn",
    "warn_",
    "report_",
    "handle_bug",
    "exc_",
    "asm_",
    "do_error_trap",
    "do_trap",
    "die_",
    "__die",
    "oops_",
    "page_fault_oops",
    "__bad_area",
    "bad_area",
    "no_context",
    "kasan_",
    "__kasan_",
    "__asan_",
    "kmsan_",
    "__msan_",
    "kcsan_",
    "__tsan_",
    "kfence_",
    "ubsan_",
    "__ubsan_",
    "nmi_",
    "lockdep_",
    "__might_",
    "check_preemption_disabled",
    "debug_smp_processor_id",
    "debug_object",
    "refcount_warn_saturate",
];

/// Functions that are where reports come from, but not to blame: what called them is.
const HELPERS: [&str; 60] = [
    "delay_",
    "__delay",
    "__const_udelay",
    "__udelay",
    "__schedule",
    "schedule",
    "preempt_schedule",
    "io_schedule",
    "mutex_lock",
    "__mutex_lock",
    "mutex_unlock",
    "__mutex_unlock",
    "down_",
    "__down",
    "up_",
    "rwsem_",
    "wait_",
    "__wait_",
    "do_wait_",
    "bit_wait",
    "out_of_line_wait",
    "rt_mutex",
    "msleep",
    "usleep",
    "lock_acquire",
    "__lock_acquire",
    "lock_release",
    "__lock_release",
    "lock_is_held",
    "_raw_",
    "do_raw_",
    "native_queued_",
    "queued_",
    "rcu_read_lock",
    "memcpy",
    "__memcpy",
    "memset",
    "__memset",
    "memmove",
    "__memmove",
    "memcmp",
    "strlen",
    "strnlen",
    "strcpy",
    "strscpy",
    "strncpy",
    "kfree",
    "kmalloc",
    "__kmalloc",
    "kmem_cache_",
    "__kmem_cache_",
    "kzalloc",
    "krealloc",
    "vfree",
    "kvfree",
    "slab_",
    "___slab_",
    "__slab_",
    "__list_",
    "debug_spin_",
];

/// What a processor that has nothing to do is in, when somebody asks all processors.
const IDLE: [&str; 6] = [
    "native_safe_halt",
    "pv_native_safe_halt",
    "default_idle",
    "intel_idle",
    "mwait_idle",
    "acpi_idle",
];

fn skipped(function: &str) -> bool {
    begins(&HANDLERS, function) || begins(&HELPERS, function) || begins(&IDLE, function)
}

fn begins(names: &[&str], function: &str) -> bool {
    names.iter().any(|name| function.starts_with(name))
}

/// Text without numbers, addresses, offsets into functions and double spaces, not longer than a title.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text.trim();
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        if out.len() >= MAX_TITLE {
            break;
        }
        let offset = if c == '+' { offset_length(rest) } else { 0 };
        let word = before.is_ascii_alphanumeric() || before == '_';
        let number = if word || offset > 0 { 0 } else { number_length(rest) };
        if offset + number > 0 {
            if number > 0 {
                out.push('N');
            }
            rest = &rest[offset + number..];
            before = 'N';
            continue;
        }
        if !(c == ' ' && out.ends_with(' ')) {
            out.push(c);
        }
        before = c;
        rest = &rest[c.len_utf8()..];
    }
    out.trim_end().to_owned()
}

/// The length of `+0x1c9/0x2800`, or 0.
fn offset_length(text: &str) -> usize {
    let hex = |text: &str| {
        text.strip_prefix("0x").map(|rest| 2 + digits(rest)).filter(|length| *length > 2)
    };
    let Some(offset) = text.strip_prefix('+').and_then(hex) else { return 0 };
    let size = text[1 + offset..].strip_prefix('/').and_then(hex).map_or(0, |size| 1 + size);
    1 + offset + size
}

fn digits(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_hexdigit).count()
}

/// The length of a decimal number, of `0x...` or of an address without it, or 0.
fn number_length(text: &str) -> usize {
    const ADDRESS: usize = 8;
    if let Some(hex) = text.strip_prefix("0x").map(digits).filter(|length| *length > 0) {
        return 2 + hex;
    }
    let hex = digits(text);
    let ends = |length: usize| !text[length..].starts_with(|c: char| c.is_ascii_alphanumeric());
    if hex >= ADDRESS && ends(hex) {
        return hex;
    }
    let decimal = text.bytes().take_while(u8::is_ascii_digit).count();
    if decimal > 0 && ends(decimal) { decimal } else { 0 }
}

/// A function, an offset into it and, of a module, that: `func+0x1c9/0x2800 [module]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) symbol: &'a str,
    pub(super) offset: u64,
    /// How long the function is.
    pub(super) size: u64,
    pub(super) module: Option<&'a str>,
    /// Whether the kernel is certain of it; it puts `?` before what it found on the stack by chance.
    pub(super) certain: bool,
}

impl<'a> Frame<'a> {
    /// The first word of this form in `text`.
    pub(super) fn find(text: &'a str) -> Option<Self> {
        let plus = text.match_indices("+0x").map(|(at, _)| at);
        plus.filter_map(|at| Self::around(text, at)).next()
    }

    fn around(text: &'a str, plus: usize) -> Option<Self> {
        let is_symbol = |c: char| c.is_ascii_alphanumeric() || "_.$".contains(c);
        let start = text[..plus]
            .rfind(|c: char| !is_symbol(c))
            .map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
        let symbol = &text[start..plus];
        let length = offset_length(&text[plus..]);
        let (offset, size) = text[plus + 3..plus + length.max(3)].split_once('/')?;
        let offset = u64::from_str_radix(offset, 16).ok()?;
        let size = u64::from_str_radix(size.trim_start_matches("0x"), 16).unwrap_or(0);
        let module = text[plus + length..].strip_prefix(" [").and_then(|rest| rest.split_once(']'));
        let certain = !text[..start].trim_end().ends_with('?');
        let named = symbol.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        named.then_some(Self {
            symbol,
            offset,
            size,
            module: module.map(|(name, _)| name),
            certain,
        })
    }

    /// A line of a call trace.
    pub(super) fn of_trace(line: &'a str) -> Option<Self> {
        let mut inner = line.trim_start();
        if let Some((_, rest)) = inner.strip_prefix("[<").and_then(|rest| rest.split_once(">] ")) {
            inner = rest;
        }
        let name = inner.strip_prefix("? ").unwrap_or(inner);
        let first = name.split(' ').next()?;
        first.contains("+0x").then(|| Self::find(inner)).flatten()
    }

    /// The function as the source has it, without what compilers append to copies of it.
    pub(super) fn function(&self) -> &'a str {
        // Rust's names have dots nowhere, and C's none at all.
        self.symbol.split('.').next().unwrap_or(self.symbol)
    }
}

/// The function of the first `func+0x1/0x2` in a text.
pub(super) fn symbol_in(text: &str) -> Option<&str> {
    Frame::find(text).map(|frame| frame.function())
}

/// The title of a whole report whose first line is `lines[at]`.
pub(super) fn title(head: &Head, lines: &[String], at: usize) -> String {
    let first = lines.get(at).map_or("", String::as_str);
    let (mut title, function) = match corrupted_list(lines) {
        true => ("BUG: corrupted list".to_owned(), after_call_trace(lines)),
        false => (head.title.clone(), function(head, lines, first)),
    };
    if title == "WARNING" {
        title = match symbol_in(first) {
            Some("refcount_warn_saturate") => "WARNING: refcount bug".to_owned(),
            Some("debug_print_object") => "WARNING: ODEBUG bug".to_owned(),
            _ => title,
        };
    }
    if title.starts_with("KASAN: ") {
        let access = lines.iter().find_map(|line| {
            ["Read", "Write"].into_iter().find(|a| line.starts_with(&format!("{a} of size ")))
        });
        title.extend(access.map(|access| format!(" {access}")));
    }
    let mut title = match function {
        Some(function) => format!("{title} in {function}"),
        None => title,
    };
    let end = (0..=MAX_TITLE.min(title.len())).rev().find(|end| title.is_char_boundary(*end));
    title.truncate(end.unwrap_or(0));
    title
}

/// lib/list_debug.c says what is wrong before the BUG or WARNING.
fn corrupted_list(lines: &[String]) -> bool {
    lines
        .iter()
        .take(4)
        .any(|l| l.starts_with("list_del corruption") || l.starts_with("list_add corruption"))
}

fn function(head: &Head, lines: &[String], first: &str) -> Option<String> {
    match head.site {
        Site::None => None,
        Site::Head if first.contains("data-race in ") => races(first),
        Site::Head => match symbol_in(first) {
            Some(function) if !skipped(function) => Some(function.to_owned()),
            _ => after_call_trace(lines),
        },
        Site::Rip => at_rip(lines).or_else(|| after_call_trace(lines)),
        Site::Trace => after_call_trace(lines),
        Site::Lock => lines
            .iter()
            .find_map(|line| {
                // "ffff888 (&lock){+.+.}-{3:3}, at: func+0x1/0x2"
                symbol_in(line.split_once(" at: ")?.1).filter(|function| !skipped(function))
            })
            .map(str::to_owned)
            .or_else(|| after_call_trace(lines)),
    }
}

/// Where the first processor was that did something, or what had called that.
fn at_rip(lines: &[String]) -> Option<String> {
    let rips = lines.iter().enumerate().filter_map(|(at, line)| {
        Some((at, symbol_in(line.trim_start().strip_prefix("RIP: 0010:")?)?))
    });
    let mut busy = rips.filter(|(_, function)| !begins(&IDLE, function));
    let (at, function) = busy.next()?;
    if skipped(function) { after_call_trace(&lines[at..]) } else { Some(function.to_owned()) }
}

/// `BUG: KCSAN: data-race in one+0x1/0x2 / two+0x3/0x4`
fn races(first: &str) -> Option<String> {
    let (_, both) = first.split_once(" in ")?;
    let names: Vec<&str> = both
        .split(" / ")
        .filter_map(|one| symbol_in(one).or_else(|| one.split(' ').next()))
        .collect();
    Some(plain(&names.join(" / ")))
}

/// The first function of the call trace that does not only handle or carry the report.
fn after_call_trace(lines: &[String]) -> Option<String> {
    let begin = lines.iter().position(|line| line.trim_start().starts_with("Call Trace:"));
    let frames = || lines[begin.unwrap_or(0)..].iter().filter_map(|line| Frame::of_trace(line));
    let good = |frame: &Frame<'_>| !skipped(frame.function());
    let certain = frames().filter(|frame| frame.certain).find(good);
    certain.or_else(|| frames().find(good)).map(|frame| frame.function().to_owned())
}
