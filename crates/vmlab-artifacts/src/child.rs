//! Programs of the host that this crate runs.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Signal;

/// Makes a command's process die with the *thread* that spawns it, however that ends. That thread
/// has to wait for it.
pub fn dies_with_us(command: &mut Command) {
    ends_with_us(command, Signal::KILL);
}

/// As [`dies_with_us`], by a signal that lets the process clean up.
pub(crate) fn ends_with_us(command: &mut Command, signal: Signal) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // The parent may have died before that was set.
        match rustix::process::getppid() == Some(parent) {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    };
    // SAFETY: between fork and exec, `prepare` only makes system calls; it neither allocates nor
    // takes a lock, whatever other threads were doing at the fork.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_child_ends_with_the_thread_that_made_it() {
        let spawn = || {
            let mut command = Command::new("sleep");
            dies_with_us(command.arg("600"));
            command.spawn().unwrap()
        };
        let mut child = std::thread::spawn(spawn).join().unwrap();
        let killed = rustix::process::Signal::KILL.as_raw();
        assert_eq!(child.wait().unwrap().signal(), Some(killed));
    }
}
