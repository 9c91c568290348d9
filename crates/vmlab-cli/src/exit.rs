//! Exit codes, and the one place where failures become them.

use vmlab::{Error, ErrorClass};

/// Text for `--help` and the man page.
pub(crate) const HELP: &str = "\
Exit codes:
  0-255  the command's own; 128+N when signal N killed it
  122    the guest reset or powered itself off before the command had ended
  123    the guest's kernel panicked
  124    a time limit passed (--timeout, --boot-timeout)
  125    vmlab itself failed, or its arguments are wrong
  126    the command cannot be executed
  127    the command was not found
With several kernels or runs, the code is that of the first that did not give 0.";

/// Text for `--help` of `test`.
pub(crate) const TEST_HELP: &str = "\
Exit codes:
  0      all targets passed
  1      a target failed
  125    a target could not be run, or vmlab's arguments or the file are wrong
  128+N  signal N ended everything";

const TARGET_FAILED: u8 = 1;
/// What vmtest gives where the VM could not be run.
const NO_VM: u8 = 69;
const GUEST_ENDED: u8 = 122;
const GUEST_PANIC: u8 = 123;
const TIMEOUT: u8 = 124;
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// What the process ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Code(pub(crate) u8);

impl Code {
    pub(crate) const SUCCESS: Code = Code(0);
    pub(crate) const FAILED: Code = Code(FAILED);
    pub(crate) const NO_VM: Code = Code(NO_VM);
    pub(crate) const TARGET_FAILED: Code = Code(TARGET_FAILED);

    /// The code for a signal that ended vmlab.
    pub(crate) fn of_signal(signal: i32) -> Self {
        Code(128u8.saturating_add(signal as u8 & 0x7f))
    }

    /// Whether a signal has ended vmlab.
    pub(crate) fn is_of_signal(self) -> bool {
        self.0 > 128
    }

    pub(crate) fn of_error(error: &Error) -> Self {
        Code(match error.class() {
            ErrorClass::Vmlab => FAILED,
            ErrorClass::TimeLimit => TIMEOUT,
            ErrorClass::GuestPanic => GUEST_PANIC,
            ErrorClass::GuestEnded => GUEST_ENDED,
            ErrorClass::NotFound => NOT_FOUND,
            ErrorClass::NotExecutable => NOT_EXECUTABLE,
        })
    }
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        code.0.into()
    }
}
