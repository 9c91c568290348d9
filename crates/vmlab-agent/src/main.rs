//! The agent of vmlab guests.
//!
//! As PID 1 it loads the modules of its initramfs, opens the channel to the host, makes the guest
//! ready as the host says and runs commands. With the argument `guest` it does the same in a system that
//! has a PID 1 of its own. With `applet`, it is one of its own commands, which copy files and read the
//! kernel's log. Otherwise it serves commands on its standard input, which is how everything but the boot is
//! tested without a VM.

mod applet;
mod boot;
mod boot_log;
mod channel;
mod exec;
mod guest;
mod kernel_log;
mod kmsg;
mod module;
mod modules;
mod power;
mod session;
mod setup;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    let started_ns = sys::monotonic_ns();
    if rustix::process::getpid().is_init() {
        kmsg::install_panic_hook();
        boot::run(started_ns)
    } else {
        let mut arguments = std::env::args_os().skip(1);
        match arguments.next() {
            Some(argument) if argument == "guest" => guest::run(started_ns),
            Some(argument) if argument == applet::WORD => applet::run(arguments),
            _ => session::serve_stdin(started_ns),
        }
    }
}
