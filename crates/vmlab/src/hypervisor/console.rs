//! What a guest writes to its serial port: kept, scanned and handed on from the first byte.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use crate::error::EmulatorFault;
use crate::sync::{lock, wait_until};

/// How much of the output is kept in memory; all of it is in the log.
const KEPT: usize = 256 * 1024;

/// The longest line that is scanned; a guest that writes no newline costs no more than this.
const MAX_LINE: usize = 4096;

/// What every kernel says, as an error, in a VM without PCI. It explains nothing.
const NO_PCI: &str = "PCI: Fatal: No config space access function found";

/// Output and input of a guest's first serial port.
#[derive(Debug, Clone)]
pub struct SerialConsole {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    log_path: PathBuf,
    /// Apart from the state: writing waits for a guest that does not read.
    input: Mutex<Option<Box<dyn WriteDebug>>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<u8>,
    line: Vec<u8>,
    /// Where that line began, as a number of bytes before it.
    line_start: u64,
    /// Where the first line about damage began.
    damage: Option<u64>,
    panic: Option<String>,
    oops: Option<(Instant, String)>,
    /// Whether a report shows flags that no processor has.
    impossible_flags: bool,
    restart: bool,
    /// Bytes that came in all.
    taken: u64,
    /// Why the log does not have all of it.
    log_failure: Option<String>,
    subscribers: Vec<Sender<Vec<u8>>>,
    closed: bool,
}

trait WriteDebug: Write + Send + std::fmt::Debug {}
impl<T: Write + Send + std::fmt::Debug> WriteDebug for T {}

impl SerialConsole {
    /// A console that logs to `log_path`, takes output through [`pump`](Self::pump) and passes input
    /// to `input`.
    pub(crate) fn new(
        log_path: PathBuf,
        input: impl Write + Send + std::fmt::Debug + 'static,
    ) -> Self {
        let shared = Shared {
            log_path,
            input: Mutex::new(Some(Box::new(input))),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Where all the output is.
    pub fn log_path(&self) -> &Path {
        &self.shared.log_path
    }

    /// All output from the first byte on, as far back as it is kept, and then as it comes. The
    /// channel ends with the VM.
    pub fn subscribe(&self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = channel();
        let mut state = self.lock();
        let _ = sender.send(state.kept());
        if !state.closed {
            state.subscribers.push(sender);
        }
        receiver
    }

    /// Types into the guest's serial port.
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn write_input(&self, bytes: &[u8]) -> io::Result<()> {
        match &mut *lock(&self.shared.input) {
            Some(input) => input.write_all(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// All output, as far back as it is kept.
    pub(crate) fn kept(&self) -> Vec<u8> {
        self.lock().kept()
    }

    /// The same behind what the guest had said before it went on here, together no more than is kept.
    pub(super) fn kept_after(&self, before: &[u8]) -> Vec<u8> {
        let mut all = [before, &self.kept()[..]].concat();
        all.drain(..all.len().saturating_sub(KEPT));
        all
    }

    /// How many bytes have come so far.
    pub(crate) fn position(&self) -> u64 {
        self.lock().taken
    }

    /// The last lines of the output, at most `lines`, without terminal control sequences.
    pub fn tail(&self, lines: usize) -> String {
        self.lock().tail_since(0, lines)
    }

    /// What explains a failure, in at most `lines` lines, of what came after `position`: the beginning
    /// of the kernel's first report of damage to itself, else the last lines.
    pub(crate) fn excerpt(&self, position: u64, lines: usize) -> String {
        let state = self.lock();
        let Some(damage) = state.damage.filter(|damage| *damage >= position) else {
            return state.tail_since(position, lines);
        };
        let mut clean = state.lines_since(damage);
        if clean.len() > lines {
            clean.truncate(lines);
            clean.push("...".to_owned());
        }
        clean.join("\n")
    }

    /// The message of the kernel's panic, once one was seen.
    pub fn panic_message(&self) -> Option<String> {
        self.lock().panic.clone()
    }

    /// When the kernel first reported that it has damaged itself, and the report's first line.
    pub fn oops(&self) -> Option<(Instant, String)> {
        self.lock().oops.clone()
    }

    /// Whether the kernel has said that it is about to reset the machine.
    pub(crate) fn restart_announced(&self) -> bool {
        self.lock().restart
    }

    /// What the kernel's reports of damage say of whoever emulates the processor. A breakpoint proves
    /// nothing where nobody does.
    pub(crate) fn emulator_fault(&self) -> Option<EmulatorFault> {
        let state = self.lock();
        if state.impossible_flags {
            return Some(EmulatorFault::ImpossibleFlags);
        }
        let (_, oops) = state.oops.as_ref()?;
        oops.contains(BREAKPOINT).then_some(EmulatorFault::StaleBreakpoint)
    }

    /// Waits until all output has been taken in, after the VM has ended.
    pub(crate) fn wait_closed(&self, deadline: Instant) {
        let mut state = self.lock();
        while !state.closed {
            let Some(woken) = wait_until(&self.shared.changed, state, Some(deadline)) else {
                return;
            };
            state = woken;
        }
    }

    /// Says that the log cannot be written. The first reason is kept.
    pub(crate) fn log_failed(&self, error: &io::Error) {
        self.lock().log_failure.get_or_insert_with(|| error.to_string());
    }

    /// Why the log does not have all output, if it does not.
    pub(crate) fn log_failure(&self) -> Option<String> {
        self.lock().log_failure.clone()
    }

    /// Takes in everything from `output` until it ends. A log that cannot be written (a full disk)
    /// does not end the VM; memory still has the end of it. Each time that reading from `output` times
    /// out after the kernel has panicked, `stuck` is told the message.
    pub(crate) fn pump(&self, mut output: impl Read, mut log: File, stuck: impl Fn(String)) {
        let mut buffer = [0; 16 * 1024];
        loop {
            match output.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    if let Err(error) = log.write_all(&buffer[..count]) {
                        self.log_failed(&error);
                    }
                    self.take(&buffer[..count]);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(message) = self.panic_message() {
                        stuck(message);
                    }
                }
                Err(_) => break,
            }
        }
        let mut state = self.lock();
        state.closed = true;
        state.subscribers.clear();
        drop(state);
        // The socket is shut, so a writer that waited has failed.
        *lock(&self.shared.input) = None;
        self.shared.changed.notify_all();
    }

    fn take(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.kept.extend(bytes);
        let excess = state.kept.len().saturating_sub(KEPT);
        state.kept.drain(..excess);
        state.subscribers.retain(|subscriber| subscriber.send(bytes.to_vec()).is_ok());
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let room = MAX_LINE - state.line.len();
            state.line.extend_from_slice(&piece[..piece.len().min(room)]);
            state.taken += piece.len() as u64;
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut state.line);
                state.scan(&printable(&String::from_utf8_lossy(&line)));
                state.line_start = state.taken;
            } else if state.line.len() >= MAX_LINE {
                state.line.clear();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }
}

/// How a panic begins, in every kernel since 2.6.
const PANIC: &str = "Kernel panic - not syncing: ";

/// What the kernel says before it resets the machine: by reboot(2), and by the SysRq key.
const RESTARTS: [&str; 3] =
    ["reboot: Restarting system", "reboot: machine restart", "sysrq: Resetting"];

/// How the kernel reports that it ran into a breakpoint that it does not know.
const BREAKPOINT: &str = "int3: 0000 [#";

/// How the kernel begins a report about damage to itself.
const OOPSES: [&str; 7] = [
    BREAKPOINT,
    "BUG: unable to handle",
    "BUG: kernel NULL pointer dereference",
    "Oops: ",
    "kernel BUG at ",
    "general protection fault",
    "double fault",
];

/// The flags of a line that shows a processor's registers.
fn flags(line: &str) -> Option<u32> {
    let (_, flags) = line.split_once("EFLAGS: ")?;
    u32::from_str_radix(flags.split(' ').next()?, 16).ok()
}

/// Whether flags have bits that are zero in every processor.
fn impossible(flags: u32) -> bool {
    flags >> 22 != 0
}

impl State {
    fn kept(&self) -> Vec<u8> {
        let (a, b) = self.kept.as_slices();
        [a, b].concat()
    }

    /// What came after this many bytes, as far as it is kept: lines without control sequences.
    fn lines_since(&self, position: u64) -> Vec<String> {
        let new = usize::try_from(self.taken - position).unwrap_or(usize::MAX);
        let old = self.kept.len().saturating_sub(new);
        let bytes: Vec<u8> = self.kept.iter().skip(old).copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().map(printable);
        lines.filter(|line| !line.is_empty() && !line.ends_with(NO_PCI)).collect()
    }

    /// The last of these lines.
    fn tail_since(&self, position: u64, lines: usize) -> String {
        let clean = self.lines_since(position);
        clean[clean.len().saturating_sub(lines)..].join("\n")
    }

    fn scan(&mut self, line: &str) {
        let panic = line.split_once(PANIC).map(|(_, message)| message);
        let oops = OOPSES.iter().any(|oops| line.contains(oops));
        if panic.is_some() || oops {
            self.damage.get_or_insert(self.line_start);
        }
        if let Some(message) = panic {
            self.panic.get_or_insert_with(|| message.trim().to_owned());
        }
        if oops {
            self.oops.get_or_insert_with(|| (Instant::now(), line.trim().to_owned()));
        }
        self.impossible_flags |= self.oops.is_some() && flags(line).is_some_and(impossible);
        self.restart |= RESTARTS.iter().any(|restart| line.contains(restart));
    }
}

/// A line without escape sequences and other control characters, so that a guest cannot drive the
/// terminal of the person who reads it.
pub(crate) fn printable(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            if chars.next_if_eq(&'[').is_some() {
                while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            } else {
                chars.next();
            }
        } else if c == '\t' {
            out.push(' ');
        } else if !c.is_control() {
            out.push(c);
        }
    }
    out.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn console() -> (SerialConsole, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        (SerialConsole::new(dir.path().join("log"), Vec::new()), dir)
    }

    #[test]
    fn a_panic_is_found_however_the_bytes_are_cut() {
        let text = "[    1.0] x\r\n[    1.2] Kernel panic - not syncing: VFS: no root\r\n";
        for cut in 0..text.len() {
            let (console, _dir) = console();
            console.take(&text.as_bytes()[..cut]);
            console.take(&text.as_bytes()[cut..]);
            assert_eq!(console.panic_message().as_deref(), Some("VFS: no root"), "cut at {cut}");
        }
    }

    #[test]
    fn the_first_oops_counts() {
        let (console, _dir) = console();
        console.take(b"BUG: kernel NULL pointer dereference, address: 0\nOops: 0002 [#1]\n");
        assert!(console.oops().unwrap().1.starts_with("BUG: kernel NULL"));
        assert_eq!(console.panic_message(), None);
    }

    #[test]
    fn an_emulators_faults_are_told_from_the_kernels() {
        use EmulatorFault::{ImpossibleFlags, StaleBreakpoint};
        // As it was seen, and as it should be.
        let double_fault = "[    5.5] Oops: double fault: 0000 [#1] PREEMPT SMP NOPTI\n\
            [    5.5] RIP: 0010:kmem_cache_alloc_node_noprof+0xe0/0x330\n\
            [    5.5] RSP: 0018:ffffc9000000f9b0 EFLAGS: 051e2342\n";
        for (text, fault) in [
            ("[    1.6] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n", Some(StaleBreakpoint)),
            ("[    1.6] int3: 0000 [#1] PREEMPT SMP\n", Some(StaleBreakpoint)),
            ("[    1.6] Oops: 0002 [#1]\n[    1.6] int3: 0000 [#2] SMP\n", None),
            (double_fault, Some(ImpossibleFlags)),
            (&double_fault.replace("051e2342", "00210246"), None),
            (&double_fault.replace("051e2342", "gone"), None),
            // Not of a report.
            ("[    5.5] RSP: 0018:ffffc9000000f9b0 EFLAGS: 051e2342\n", None),
        ] {
            let (console, _dir) = console();
            console.take(text.as_bytes());
            assert_eq!(console.emulator_fault(), fault, "{text}");
        }
    }

    #[test]
    fn the_tail_is_clean_and_short() {
        let (console, _dir) = console();
        console.take(b"one\n\x1b[2J\x1b[1;31mtwo\x07\n\nthree\tfour\r\n");
        console.take(format!("[    0.827106] {NO_PCI}\n").as_bytes());
        assert_eq!(console.tail(2), "two\nthree four");
        assert_eq!(console.tail(9), "one\ntwo\nthree four");
    }

    #[test]
    fn an_excerpt_explains_a_failure() {
        let (console, _dir) = console();
        console.take(b"one\ntwo\n");
        let so_far = console.position();
        assert_eq!(console.excerpt(so_far, 2), "");
        console.take(b"three\nfour\nfi");
        assert_eq!(console.excerpt(so_far, 2), "four\nfi");
        console.take(b"ve\nOops: 0002 [#1]\nRIP: here\nKernel panic - not syncing: Fatal\n");
        assert_eq!(console.excerpt(so_far, 2), "Oops: 0002 [#1]\nRIP: here\n...");
        assert!(
            console.excerpt(so_far, 3).ends_with("RIP: here\nKernel panic - not syncing: Fatal")
        );
        // That a guest survived some damage does not explain what came of it much later.
        let so_far = console.position();
        console.take(b"six\n");
        assert_eq!(console.excerpt(so_far, 2), "six");
    }

    #[test]
    fn memory_is_bounded_and_the_log_is_whole() {
        let (console, dir) = console();
        let output = vec![b'x'; KEPT * 2 + 5];
        let log = File::create(dir.path().join("log")).unwrap();
        let early = console.subscribe();
        console.pump(output.as_slice(), log, |_| panic!("nothing panicked"));
        assert_eq!(console.lock().kept.len(), KEPT);
        assert!(console.lock().line.len() <= MAX_LINE);
        assert_eq!(std::fs::read(console.log_path()).unwrap(), output);
        assert_eq!(early.iter().map(|b| b.len()).sum::<usize>(), output.len());
        let late: Vec<_> = console.subscribe().iter().collect();
        assert_eq!(late.concat().len(), KEPT);
        console.wait_closed(Instant::now() + Duration::from_secs(1));
        assert!(console.write_input(b"x").is_err());
    }
}
