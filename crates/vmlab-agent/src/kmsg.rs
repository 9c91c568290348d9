//! Messages on the guest's console, by way of the kernel's log.

use std::io::Write;

/// Log level that reaches the console even with `quiet`.
const ERROR: u8 = 3;

/// Log level that does not.
const DEBUG: u8 = 7;

/// Writes a line to the kernel's log, as an error so that the console shows it.
pub(crate) fn error(message: &str) {
    if write(ERROR, message).is_err() {
        // Nobody is left to tell when stderr fails as well.
        let _ = writeln!(std::io::stderr(), "vmlab-agent: {message}");
    }
}

/// Writes a line to the kernel's log only. It is of no use to anybody but this program.
pub(crate) fn debug(message: &str) {
    let _ = write(DEBUG, message);
}

fn write(level: u8, message: &str) -> std::io::Result<()> {
    // One write is one record, and a record ends at its first newline.
    let line = format!("<{level}>vmlab-agent: {}\n", message.replace('\n', " | "));
    let mut kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg")?;
    kmsg.write_all(line.as_bytes())
}

/// Makes a panic of the agent visible on the console. The process then aborts, and the kernel's own
/// panic (`Attempted to kill init`) tells the host.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| error(&format!("panic: {info}"))));
}
