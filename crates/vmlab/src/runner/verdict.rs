//! When an attempt counts as passed.

use std::time::Duration;

use vmlab_artifacts::module_build::ModuleBuildError;

use crate::error::chain;
use crate::events::KernelEvent;
use crate::hypervisor::ExitReason;
use crate::results::Failure;
use crate::targets::VerdictSpec;
use crate::{Error, ExitStatus};

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum End {
    /// The command came to its end.
    Exited(ExitStatus),
    /// It took too long.
    TimedOut(Duration),
    /// A script before it failed: which, and how.
    SetupFailed(String),
    /// Something was wrong with the target's module.
    Misbehaved(Vec<String>),
    /// The VM did not start, or ended before the command did; or the command could not be started.
    Lost(Box<Error>),
}

/// Why an attempt does not count as passed.
pub(super) fn judge(spec: &VerdictSpec, end: &End, events: &[KernelEvent]) -> Option<Failure> {
    if let End::Lost(error) = end
        && let Some(failure) = of_the_host(error)
    {
        return Some(failure);
    }
    if let End::SetupFailed(how) = end {
        return Some(Failure::Setup { how: how.clone() });
    }
    let wanted = spec.expect.and_then(|kind| events.iter().position(|event| event.kind == kind));
    // What follows from the expected event is expected as well.
    let unexpected = &events[..wanted.unwrap_or(events.len())];
    if let Some(event) = unexpected.iter().find(|event| spec.fail_on.contains(&event.kind)) {
        return Some(Failure::Event { title: event.title.clone() });
    }
    if wanted.is_some() {
        return None;
    }
    let failure = match end {
        End::Exited(status) if status.success() => None,
        End::Exited(status) => Some(Failure::Command { how: status.to_string() }),
        End::TimedOut(limit) => {
            let what = format!("the command took longer than {}", seconds(*limit));
            return Some(Failure::Timeout { what });
        }
        End::Lost(error) => Some(of_the_guest(error)),
        End::Misbehaved(problems) => Some(Failure::Module { how: problems.join("\n") }),
        End::SetupFailed(_) => None,
    };
    match (failure, spec.expect) {
        (Some(Failure::Command { .. }) | None, Some(expected)) => {
            Some(Failure::MissingEvent { expected })
        }
        (Some(Failure::Command { .. }), None) if spec.should_fail => None,
        (None, None) if spec.should_fail => Some(Failure::UnexpectedSuccess),
        (failure, _) => failure,
    }
}

/// What it means that a VM did not start, or ended before what ran in it did.
pub(crate) fn of_a_vm(error: &Error) -> Failure {
    of_the_host(error).unwrap_or_else(|| of_the_guest(error))
}

/// A failure that says nothing of the guest.
fn of_the_host(error: &Error) -> Option<Failure> {
    let reason = error.exit_reason();
    if let Error::ModuleTests { .. } = error {
        return Some(Failure::Module { how: error.to_string() });
    }
    if let Error::ModuleBuild(
        error @ (ModuleBuildError::Failed { .. } | ModuleBuildError::NoModules { .. }),
    ) = error
    {
        return Some(Failure::Module { how: error.to_string() });
    }
    let guests = matches!(
        error,
        Error::BootTimeout { .. }
            | Error::Setup { .. }
            | Error::CommandNotFound { .. }
            | Error::CommandNotExecutable { .. }
            | Error::WorkingDirectory { .. }
    ) || matches!(
        reason,
        Some(
            ExitReason::Shutdown
                | ExitReason::Reset
                | ExitReason::GuestPanic(_)
                | ExitReason::TripleFault
                | ExitReason::Timeout
        )
    );
    (!guests).then(|| Failure::Infrastructure { message: chain(error) })
}

fn of_the_guest(error: &Error) -> Failure {
    let how = chain(error);
    match error {
        Error::BootTimeout { .. } => Failure::Timeout { what: how },
        Error::Ended { reason: ExitReason::Timeout, .. } => Failure::Timeout { what: how },
        Error::CommandNotFound { .. }
        | Error::CommandNotExecutable { .. }
        | Error::WorkingDirectory { .. } => Failure::Command { how },
        _ => Failure::GuestEnded { how },
    }
}

fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds.fract() == 0.0 { format!("{seconds} s") } else { format!("{seconds:.1} s") }
}
