//! Tests that run in virtual machines: what `#[vmlab::test]` becomes. The attribute is described in
//! `docs/rust-tests.md`.
//!
//! A test with the attribute is an ordinary one of the standard harness. On the host it starts a VM, and in
//! that the same program with this test alone, which runs the test's body. What happened comes back in the
//! program's standard output, between what the body writes.
//!
//! ```
//! use vmlab::prelude::*;
//!
//! #[vmlab::test(kernel = ["debian:6.1", "debian:6.12"], memory = "512M")]
//! fn the_clock_goes(ctx: &Ctx) -> Result {
//!     let uptime = std::fs::read_to_string("/proc/uptime")?;
//!     let seconds: f64 = uptime.split(' ').next().unwrap_or_default().parse()?;
//!     assert!(seconds > 0.0, "under {}", ctx.kernel());
//!     ctx.measure("uptime", seconds, "s");
//!     Ok(())
//! }
//!
//! #[vmlab::test(host)]
//! fn from_the_outside(vm: &mut Vm, recorder: &Recorder) -> Result {
//!     let status = vm.exec(["true"])?.status;
//!     assert!(status.success());
//!     recorder.measure("CPU time", status.cpu_time_us().1 as f64, "µs");
//!     Ok(())
//! }
//! ```

mod ctx;
mod defaults;
mod guest;
mod host;
mod observed;
mod output;
mod plan;
mod recorder;
mod records;
mod report;
mod verdict;

use std::convert::Infallible;
use std::fmt::Debug;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

pub use ctx::Ctx;
pub(crate) use observed::{ObservedVm, Observer};
pub use plan::disk;
pub use recorder::Recorder;
pub use report::{MAX_RESULT_FILE, ReadReportsError, read_reports};

use crate::{Vm, VmBuilder};

/// Names the test that a program in a guest is to run; [`WHOLE`] where all of the program's tests run in one.
pub const INSIDE: &str = "VMLAB_INSIDE";

/// The value of [`INSIDE`] in a guest that has a whole test program to run, as by `vmlab runner`.
pub const WHOLE: &str = "*";

/// Tells records in the output of a test from all else. Its value is another one for each VM.
const CHANNEL: &str = "VMLAB_CHANNEL";

/// A test, as the attribute describes it.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// `module_path!()` of the test.
    pub module: &'static str,
    pub name: &'static str,
    pub package: &'static str,
    pub manifest_dir: &'static str,
    pub settings: Settings,
}

/// What is in the attribute's parentheses.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub kernel: Option<&'static str>,
    /// Whether the test is one of several that differ in their kernel.
    pub named_by_kernel: bool,
    pub cpus: Option<u32>,
    pub topology: Option<&'static str>,
    pub memory: Option<&'static str>,
    pub shares: &'static [SharedDir],
    pub disks: &'static [&'static [(&'static str, &'static str)]],
    pub network: Option<&'static str>,
    pub timeout: Option<&'static str>,
    pub fail_on: Option<&'static [&'static str]>,
    pub expect_err: bool,
    pub expect_event: Option<&'static str>,
    /// What the panic that makes it pass has to have in its message, if one does.
    pub should_panic: Option<&'static str>,
    pub rootfs: Option<&'static str>,
    pub image: Option<&'static str>,
    pub user: Option<&'static str>,
    pub append: &'static [&'static str],
}

/// A `share(...)` of the attribute.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct SharedDir {
    pub host: &'static str,
    pub guest: Option<&'static str>,
    pub writable: bool,
}

impl Test {
    /// The test's name for the harness: its path without the crate.
    fn path(&self) -> String {
        match self.module.split_once("::") {
            Some((_, module)) => format!("{module}::{}", self.name),
            None => self.name.to_owned(),
        }
    }
}

/// What a test's function may return.
#[diagnostic::on_unimplemented(
    message = "a test cannot return `{Self}`",
    note = "it returns nothing, a `Result` whose error is `Debug`, or an `ExitCode`"
)]
pub trait Returned {
    /// Why the test failed, if it did.
    fn failure(self) -> Option<String>;
}

impl Returned for () {
    fn failure(self) -> Option<String> {
        None
    }
}

impl Returned for Infallible {
    fn failure(self) -> Option<String> {
        match self {}
    }
}

impl Returned for ExitCode {
    fn failure(self) -> Option<String> {
        (self != ExitCode::SUCCESS).then(|| format!("{self:?}"))
    }
}

impl<T: Returned, E: Debug> Returned for Result<T, E> {
    fn failure(self) -> Option<String> {
        match self {
            Ok(returned) => returned.failure(),
            // As the standard library words it.
            Err(error) => Some(format!("Error: {error:?}")),
        }
    }
}

/// Runs a future to its end on this thread, which sleeps while the future waits.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Sleeper(Thread);
    impl Wake for Sleeper {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Sleeper(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::park();
    }
}

/// Where a test finds itself.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Host,
    /// In a VM of its own, to report to the host.
    Guest {
        channel: String,
    },
    /// In a VM that has the whole program to run.
    Runner,
}

impl Place {
    fn of(test: &Test) -> Self {
        let value = |name| std::env::var(name).ok();
        Self::read(&test.path(), value(INSIDE).as_deref(), value(CHANNEL))
    }

    fn read(path: &str, inside: Option<&str>, channel: Option<String>) -> Self {
        match (inside, channel) {
            (Some(WHOLE), _) => Self::Runner,
            (Some(inside), Some(channel)) if inside == path => Self::Guest { channel },
            // Another test's program may be started by a test.
            _ => Self::Host,
        }
    }
}

/// A test whose body runs in the guest.
#[doc(hidden)]
pub fn in_guest(test: &Test, body: fn(&Ctx) -> Option<String>) {
    match Place::of(test) {
        Place::Host => host::in_guest(test),
        Place::Guest { channel } => guest::report(test, &channel, body),
        Place::Runner => guest::in_place(test, body),
    }
}

/// A test whose body stays on the host, with a VM that has started.
#[doc(hidden)]
pub fn with_vm(test: &Test, body: fn(&mut Vm, &Recorder) -> Option<String>) {
    match Place::of(test) {
        Place::Runner => host::left_out(test, STAYS),
        _ => host::with_vm(test, body),
    }
}

/// A test whose body stays on the host and starts VMs itself.
#[doc(hidden)]
pub fn with_builder(test: &Test, body: fn(VmBuilder, &Recorder) -> Option<String>) {
    match Place::of(test) {
        Place::Runner => host::left_out(test, STAYS),
        _ => host::with_builder(test, body),
    }
}

const STAYS: &str = "it stays on the host, and the runner has brought it into a VM";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_known_by_their_path() {
        let channel = || Some("c".to_owned());
        let read = |inside, channel| Place::read("a::b", inside, channel);
        assert_eq!(read(None, None), Place::Host);
        assert_eq!(read(Some("a::b"), channel()), Place::Guest { channel: "c".to_owned() });
        assert_eq!(read(Some("a::c"), channel()), Place::Host);
        assert_eq!(read(Some("a::b"), None), Place::Host);
        assert_eq!(read(Some("*"), None), Place::Runner);
    }

    #[test]
    fn what_is_returned_says_why_it_failed() {
        assert_eq!(().failure(), None);
        assert_eq!(Ok::<(), String>(()).failure(), None);
        assert_eq!(Err::<(), _>("no").failure(), Some("Error: \"no\"".to_owned()));
        assert_eq!(ExitCode::SUCCESS.failure(), None);
        assert!(ExitCode::FAILURE.failure().is_some());
        assert_eq!(Ok::<_, String>(Err::<(), _>(3)).failure(), Some("Error: 3".to_owned()));
    }

    #[test]
    fn futures_are_waited_for() {
        let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
        std::thread::spawn(move || receiver.iter().for_each(Waker::wake));
        let mut polls = 0;
        let future = std::future::poll_fn(|context| {
            polls += 1;
            if polls == 3 {
                return Poll::Ready("done");
            }
            sender.send(context.waker().clone()).unwrap();
            Poll::Pending
        });
        assert_eq!(block_on(future), "done");
        assert_eq!(polls, 3);
    }
}
