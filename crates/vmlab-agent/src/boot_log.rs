//! What the kernel's log says of its boot.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use vmlab_wire::message::BootLog;

use crate::{kmsg, sys};

/// Messages that every kernel from 5.4 on logs in its boot, each with the name of the part that begins
/// with it: of `start_kernel` and what it calls, in this order.
const MILESTONES: [(&str, &str); 7] = [
    ("Linux version ", "memory map, firmware tables"),
    ("Kernel command line: ", "allocators, scheduler, interrupts"),
    ("Calibrating delay loop", "CPU features"),
    ("devtmpfs: initialized", "subsystems, ACPI, PCI"),
    ("Trying to unpack rootfs image", "drivers"),
    ("Freeing unused ", "freeing what only the boot needed"),
    ("Run /init ", "start of the agent"),
];

/// What marks the log's end, so that a guest which logs for ever is not read for ever.
const MARK: &str = "the host asks for the boot's times";

/// More records than any log buffer has; the mark may have been overwritten.
pub(crate) const MAX_RECORDS: usize = 1 << 20;

/// The longest record that the kernel gives out: `PRINTK_MESSAGE_MAX`, with room for what is in front.
pub(crate) const MAX_RECORD: usize = 8192;

/// Reads the log. What cannot be read is not told: it is for measuring only.
pub(crate) fn read() -> BootLog {
    read_log().unwrap_or_default()
}

/// The log from its first record on.
pub(crate) fn open() -> io::Result<File> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    OpenOptions::new().read(true).custom_flags(nonblocking).open("/dev/kmsg")
}

fn read_log() -> io::Result<BootLog> {
    let mut log = open()?;
    let now_ns = sys::monotonic_ns();
    kmsg::debug(MARK);
    let mut buffer = vec![0; MAX_RECORD];
    let mut found = Milestones::default();
    for _ in 0..MAX_RECORDS {
        let Some(record) = next_record(&mut log, &mut buffer)? else { break };
        let record = String::from_utf8_lossy(record);
        if let Some(Record { time_us, text, .. }) = Record::parse(&record) {
            found.take(time_us, text);
            if text.ends_with(MARK) {
                return Ok(found.on_clock(time_us, now_ns));
            }
        }
    }
    // Without the mark the two clocks are taken to be one, which they nearly are.
    Ok(found.on_clock(0, 0))
}

/// The next record; `None` at the end. Those that were overwritten while they were read are passed over.
pub(crate) fn next_record<'a>(
    log: &mut File,
    buffer: &'a mut [u8],
) -> io::Result<Option<&'a [u8]>> {
    let count = loop {
        match log.read(buffer) {
            Ok(count) => break count,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
    };
    Ok((count > 0).then(|| &buffer[..count]))
}

/// A record of the log (`Documentation/ABI/testing/dev-kmsg`). It is shown as `dmesg` does.
pub(crate) struct Record<'a> {
    /// Whether the kernel has written it, and no program.
    pub(crate) of_kernel: bool,
    /// Its number since the kernel's start.
    pub(crate) number: u64,
    time_us: u64,
    /// Its first line; behind it are properties of a device.
    text: &'a str,
}

impl<'a> Record<'a> {
    /// Reads one; `None` for what is none.
    pub(crate) fn parse(record: &'a str) -> Option<Self> {
        let (head, text) = record.split_once(';')?;
        let mut fields = head.split(',').map(str::parse::<u64>);
        let mut field = || fields.next()?.ok();
        let (priority, number, time_us) = (field()?, field()?, field()?);
        // The facility is above the three bits of the level; the kernel's is 0.
        let of_kernel = priority >> 3 == 0;
        Some(Self { of_kernel, number, time_us, text: text.lines().next().unwrap_or_default() })
    }
}

impl fmt::Display for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time_us, text, .. } = self;
        write!(f, "[{:5}.{:06}] {text}", time_us / 1_000_000, time_us % 1_000_000)
    }
}

/// The first message of each part, with its time on the log's clock.
#[derive(Debug, Default)]
struct Milestones {
    times_us: [Option<u64>; MILESTONES.len()],
}

impl Milestones {
    fn take(&mut self, time_us: u64, text: &str) {
        for (time, (message, _)) in self.times_us.iter_mut().zip(MILESTONES) {
            if time.is_none() && text.starts_with(message) {
                *time = Some(time_us);
            }
        }
    }

    /// The parts on the clock of which `now_ns` is what the log's clock calls `log_us`.
    fn on_clock(&self, log_us: u64, now_ns: u64) -> BootLog {
        let ns = |us: u64| {
            let before = log_us.saturating_sub(us).saturating_mul(1000);
            if log_us == 0 { us.saturating_mul(1000) } else { now_ns.saturating_sub(before) }
        };
        let found = self.times_us.iter().zip(MILESTONES);
        let parts = found.filter_map(|(time, (_, name))| Some((name.to_owned(), ns((*time)?))));
        BootLog { parts: parts.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: [&str; 9] = [
        "5,0,0,-;Linux version 6.12.117 (gcc)\n",
        "5,60,30000,-;Kernel command line: console=ttyS0 panic=-1\n",
        "6,61,31000,-;x: Kernel command line: is no milestone\n",
        "6,90,50000,-,caller=T1;devtmpfs: initialized\n SUBSYSTEM=x\n",
        "6,91,60000,-;devtmpfs: initialized\n",
        "6,99,70000,-;Freeing unused kernel image (initmem) memory: 4024K\n",
        "6,99,71000,-;Freeing unused kernel image (rodata/data gap) memory: 1376K\n",
        "garbage",
        "6,100,90000,-;Run /init as init process\n",
    ];

    fn milestones() -> Milestones {
        let mut found = Milestones::default();
        for record in LOG.iter().filter_map(|record| Record::parse(record)) {
            found.take(record.time_us, record.text);
        }
        found
    }

    #[test]
    fn the_first_message_of_each_part_counts() {
        let log = milestones().on_clock(0, 0);
        let parts: Vec<_> = log.parts.iter().map(|(name, ns)| (name.as_str(), ns / 1000)).collect();
        assert_eq!(
            parts,
            [
                ("memory map, firmware tables", 0),
                ("allocators, scheduler, interrupts", 30_000),
                ("subsystems, ACPI, PCI", 50_000),
                ("freeing what only the boot needed", 70_000),
                ("start of the agent", 90_000),
            ]
        );
    }

    #[test]
    fn times_are_moved_to_the_agents_clock() {
        let log = milestones().on_clock(100_000, 250_000_000);
        assert_eq!(log.parts.last(), Some(&("start of the agent".to_owned(), 240_000_000)));
        // The kernel's clocks start at different times.
        let log = milestones().on_clock(100_000, 50_000_000);
        assert_eq!(log.parts[0].1, 0);
    }
}
