//! The kernel's log and its trace events, as they come, for a person to read beside a command's output.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::allocations;
use crate::boot_log::{self, Record};

/// Our own buffer, beside that of allocations.
const INSTANCE: &str = "instances/vmlab-events";

/// How often events are looked for that were not there yet, as a module's are before it is loaded.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The most that is read of events in one go.
const CHUNK: usize = 64 * 1024;

/// Events that are to be shown.
struct Events {
    dir: PathBuf,
    pipe: File,
    /// Those that are not there yet.
    missing: Vec<String>,
}

impl Events {
    fn begin(wanted: &[String]) -> io::Result<Option<Self>> {
        if wanted.is_empty() {
            return Ok(None);
        }
        let dir = allocations::tracing().map_err(io::Error::other)?.join(INSTANCE);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let pipe =
            options.read(true).custom_flags(libc::O_NONBLOCK).open(dir.join("trace_pipe"))?;
        let mut events = Self { dir, pipe, missing: wanted.to_vec() };
        events.enable();
        Ok(Some(events))
    }

    /// Switches those on that are there.
    fn enable(&mut self) {
        let dir = self.dir.join("events");
        self.missing.retain(|event| {
            let place = event.split(':').fold(dir.clone(), |place, part| place.join(part));
            !plain(event) || fs::write(place.join("enable"), "1").is_err()
        });
    }
}

/// `SYSTEM` or `SYSTEM:EVENT`.
fn plain(event: &str) -> bool {
    let name = |part: &str| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    event.split(':').count() <= 2 && event.split(':').all(name)
}

/// Writes records of the log from a number on, and events, until nobody reads them, or the input ends.
pub(super) fn follow(
    from: u64,
    wanted: &[String],
    input: File,
    mut output: File,
) -> io::Result<()> {
    let mut log = boot_log::open()?;
    let mut events = Events::begin(wanted)?;
    let mut buffer = vec![0; boot_log::MAX_RECORD];
    let mut chunk = vec![0; CHUNK];
    let mut last = false;
    loop {
        while let Some(record) = boot_log::next_record(&mut log, &mut buffer)? {
            if let Some(line) = shown(record, from) {
                output.write_all(line.as_bytes())?;
            }
        }
        if let Some(events) = &mut events {
            events.enable();
            loop {
                match events.pipe.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(count) => output.write_all(&chunk[..count])?,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                }
            }
        }
        if last {
            for event in events.iter().flat_map(|events| &events.missing) {
                output.write_all(format!("there was no trace event {event}\n").as_bytes())?;
            }
            return Ok(());
        }
        let mut waited = vec![
            PollFd::new(&input, PollFlags::IN),
            PollFd::from_borrowed_fd(log.as_fd(), PollFlags::IN),
        ];
        let pipe = events.as_ref().map(|events| &events.pipe);
        waited.extend(pipe.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let pending = events.as_ref().is_some_and(|events| !events.missing.is_empty());
        poll(&mut waited, pending.then_some(&LOOK_AGAIN))?;
        // What was there when the input ended is shown.
        last = !waited[0].revents().is_empty();
    }
}

/// A record as `dmesg` shows it; `None` for earlier ones, and for those of programs.
fn shown(record: &[u8], from: u64) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let record = Record::parse(&text)?;
    (record.of_kernel && record.number >= from).then(|| format!("{record}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_shown_as_by_dmesg() {
        let record = b"7,12,5678901,-;good: the number is 7 now\n SUBSYSTEM=x\n";
        assert_eq!(shown(record, 12).unwrap(), "[    5.678901] good: the number is 7 now\n");
        assert_eq!(shown(record, 13), None);
        assert_eq!(shown(b"30,12,5678901,-;systemd: x", 0), None);
    }

    #[test]
    fn names_of_events_lead_nowhere_else() {
        assert!(plain("sched") && plain("sched:sched_switch") && plain("kvm-x:y"));
        for odd in ["", "a:b:c", "../x", "a:..", "a/b", ":"] {
            assert!(!plain(odd), "{odd}");
        }
    }
}
