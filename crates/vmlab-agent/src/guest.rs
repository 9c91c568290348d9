//! The agent in a system that has a PID 1 of its own: one that an image has booted.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use vmlab_wire::message::Ready;

use crate::session::{Over, Role, Session};
use crate::{boot, kernel_log, kmsg, setup, sys};

/// How long the port may take to appear after its driver was loaded.
const PORT_TRIES: u32 = 100;

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Serves the host until it has gone, unless another agent does so already.
pub(crate) fn run(started_ns: u64) -> ExitCode {
    let served = match open_port() {
        Ok(Some(port)) => serve(port, started_ns),
        // It came in by another way.
        Ok(None) => return ExitCode::SUCCESS,
        Err(why) => Err(io::Error::other(why)),
    };
    match served {
        Ok(Over::PowerOff | Over::HungUp) => ExitCode::SUCCESS,
        Ok(Over::Broken(_)) => ExitCode::FAILURE,
        Err(e) => {
            kmsg::error(&format!("the host cannot be served: {e}"));
            ExitCode::FAILURE
        }
    }
}

/// Opens the port; `None` where another agent has it.
fn open_port() -> Result<Option<OwnedFd>, String> {
    let mut missing = String::new();
    for tried in 0..PORT_TRIES {
        match boot::find_port() {
            Ok(Some(path)) => {
                return match boot::open_device(&path) {
                    Ok(port) => Ok(Some(port)),
                    Err(Errno::BUSY) => Ok(None),
                    Err(e) => Err(format!("opening the virtio port {path}: {e}")),
                };
            }
            Ok(None) => missing = "the port `vmlab` is not there".to_string(),
            Err(why) => missing = why,
        }
        if tried == 0 {
            let mut driver = Command::new("modprobe");
            driver.arg("virtio_console").stdin(Stdio::null()).stderr(Stdio::null());
            // Where udev has loaded it already, this does nothing. Where there is none, that is told.
            let _ = driver.status();
            continue;
        }
        sleep(LOOK);
    }
    Err(missing)
}

fn serve(port: OwnedFd, started_ns: u64) -> io::Result<Over> {
    // The host would lose the guest. That this is refused is no reason to do without.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    // Until here, its unit has put it before all other services that start at this time. Commands are no
    // better than others.
    let _ = rustix::process::setpriority_process(None, 0);
    setup::release_bridges();
    let mut session = Session::new(Role::Guest, port)?;
    // Its thread has SIGCHLD blocked only now: else that would be the thread's to take, and to ignore.
    kernel_log::copy_to_console();
    let ready_ns = sys::monotonic_ns();
    let release = boot::release();
    let (steps, modules) = (Vec::new(), Vec::new());
    let ready = Ready { release, started_ns, ready_ns, steps, modules, revivable: 0 };
    let over = session.run(ready);
    session.end(&over);
    Ok(over)
}
