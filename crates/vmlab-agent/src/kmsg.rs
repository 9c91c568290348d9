//! Messages on the guest's console, by way of the kernel's log.

use std::io::Write;

/// Log level that reaches the console even with `quiet`.
const ERROR: u8 = 3;

/// Writes a line to the kernel's log, as an error so that the console shows it.
pub(crate) fn error(message: &str) {
    // One write is one record, and a record ends at its first newline.
    let line = format!("<{ERROR}>vmlab-agent: {}\n", message.replace('\n', " | "));
    let written = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(line.as_bytes()));
    if written.is_err() {
        // Nobody is left to tell when stderr fails as well.
        let _ = std::io::stderr().write_all(&line.as_bytes()[3..]);
    }
}

/// Makes a panic of the agent visible on the console. The process then aborts, and the kernel's own
/// panic (`Attempted to kill init`) tells the host.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| error(&format!("panic: {info}"))));
}
