//! A test's body in the guest.

use std::any::Any;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Mutex;
use std::thread::{self, ThreadId};

use super::ctx::Skip;
use super::records::{Ended, Record, shortened};
use super::{Ctx, Test, host};
use crate::sync::lock;

/// The exit code of a program with a test that failed, which is the standard harness's.
const FAILED: i32 = 101;

/// Where threads have panicked last.
static PLACES: Mutex<Vec<(ThreadId, String)>> = Mutex::new(Vec::new());

/// How many of these are kept: the body's own is the one that is looked for.
const MAX_PLACES: usize = 64;

/// Runs the body, tells the host how it ended, and ends the program: the harness has nothing to add.
pub(super) fn report(test: &Test, channel: &str, body: fn(&Ctx) -> Option<String>) -> ! {
    // The body may put something else in the place of standard output.
    let out = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let records = out.map(|file| (channel.to_owned(), file));
    let Ok(records) = records else {
        // Without an end that is told, the host takes it for failed.
        std::process::exit(FAILED)
    };
    let ctx = Ctx::new(test, Some(records));
    flush();
    ctx.recorder().tell(Record::Began);
    remember_places();
    let ended = match panic::catch_unwind(AssertUnwindSafe(|| body(&ctx))) {
        Ok(None) => Ended::Passed,
        Ok(Some(failure)) => {
            say(&failure);
            Ended::Failed(shortened(failure))
        }
        Err(payload) => match payload.downcast::<Skip>() {
            Ok(skip) => Ended::Skipped(shortened(skip.0)),
            Err(payload) => {
                let here = thread::current().id();
                let place = lock(&PLACES).iter().rev().find(|(id, _)| *id == here).cloned();
                let message = message(&*payload).map(|text| shortened(text.to_owned()));
                Ended::Panicked { message, place: place.map(|(_, place)| place) }
            }
        },
    };
    flush();
    let code = if matches!(ended, Ended::Passed | Ended::Skipped(_)) { 0 } else { FAILED };
    ctx.recorder().tell(Record::Ended(ended));
    std::process::exit(code)
}

/// Runs the body as the harness would have, in a VM that others have started.
pub(super) fn in_place(test: &Test, body: fn(&Ctx) -> Option<String>) {
    let settings = &test.settings;
    let own = [
        (!settings.disks.is_empty(), "disks"),
        (!settings.shares.is_empty(), "shares"),
        (settings.image.is_some(), "an image"),
        (settings.rootfs.is_some(), "a root filesystem"),
        (settings.topology.is_some() || settings.cpus.is_some(), "CPUs of its own"),
        (settings.named_by_kernel, "a kernel in its name"),
        (settings.expect_event.is_some(), "an event to wait for"),
    ];
    if let Some((_, what)) = own.iter().find(|(has, _)| *has) {
        return host::left_out(test, &format!("it has {what}, and the runner's VM is another one"));
    }
    let ctx = Ctx::new(test, None);
    let failure = match panic::catch_unwind(AssertUnwindSafe(|| body(&ctx))) {
        Ok(failure) => failure,
        Err(payload) => match payload.downcast::<Skip>() {
            Ok(skip) => return host::skipped(test, &skip.0),
            Err(_) if settings.expect_err => return,
            Err(payload) => panic::resume_unwind(payload),
        },
    };
    match (failure, settings.expect_err) {
        (None, false) | (Some(_), true) => {}
        (None, true) => host::fail(test, "it passed, and should have failed".to_owned()),
        (Some(failure), false) => {
            say(&failure);
            panic::resume_unwind(Box::new(failure));
        }
    }
}

/// The text of a panic, if it is one.
pub(super) fn message(payload: &(dyn Any + Send)) -> Option<&str> {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied())
}

/// Keeps where panics happen, before what else is done with them.
fn remember_places() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if let Some(location) = info.location() {
            let mut places = lock(&PLACES);
            if places.len() >= MAX_PLACES {
                places.remove(0);
            }
            places.push((thread::current().id(), location.to_string()));
        }
        before(info);
    }));
}

/// Writes what the body has left in the program.
fn flush() {
    // A stream that is gone cannot be told.
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
}

#[allow(clippy::print_stderr, reason = "the harness captures what is printed, and nothing else")]
fn say(text: &str) {
    eprintln!("{text}");
}
