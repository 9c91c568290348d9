//! The kernel's log on the serial port, where the system's own configuration does not put it there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};

use crate::boot_log::Record;

/// What the host reads.
const CONSOLE: &str = "ttyS0";

/// The longest record that the kernel gives out: `PRINTK_MESSAGE_MAX`, with room for what is in front.
const MAX_RECORD: usize = 8192;

/// Copies the log from its beginning for as long as this process lives, unless the kernel does so by
/// itself. Without it the host sees nothing of an oops; commands run all the same.
pub(crate) fn copy_to_console() {
    let consoles = fs::read_to_string("/proc/consoles").unwrap_or_default();
    if consoles.lines().any(|line| line.split_whitespace().next() == Some(CONSOLE)) {
        return;
    }
    let (Ok(log), Ok(console)) =
        (File::open("/dev/kmsg"), OpenOptions::new().write(true).open(format!("/dev/{CONSOLE}")))
    else {
        return;
    };
    // A thread that cannot be had is a log that is not copied.
    let _ = std::thread::Builder::new().spawn(move || copy(log, console));
}

fn copy(mut log: File, mut console: File) -> io::Result<()> {
    let mut record = vec![0; MAX_RECORD];
    loop {
        let count = match log.read(&mut record) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            // Records were overwritten before they were read.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(e) => return Err(e),
        };
        let text = String::from_utf8_lossy(&record[..count]);
        if let Some(line) = as_printed(&text) {
            console.write_all(line.as_bytes())?;
        }
    }
}

/// A record of the log as the kernel prints it on a console; `None` for what is no message of the kernel's.
fn as_printed(record: &str) -> Option<String> {
    let record = Record::parse(record).filter(|record| record.of_kernel)?;
    Some(format!("{record}\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_look_as_on_a_console() {
        let line = as_printed("4,1234,5678901,-;WARNING: CPU: 0\n SUBSYSTEM=x\n").unwrap();
        assert_eq!(line, "[    5.678901] WARNING: CPU: 0\r\n");
        assert_eq!(as_printed("30,7,1,-;systemd[1]: hello"), None);
        assert_eq!(as_printed("nonsense"), None);
    }
}
