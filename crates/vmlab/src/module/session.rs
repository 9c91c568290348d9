//! What is said to the agent's part that looks after modules. It is one process for all of a module's life: starting
//! one takes an emulated processor longer than what it does.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vmlab_wire::message;
use vmlab_wire::observation::{
    LENGTH, MAX_ANSWER, ModuleAnswer, ModuleRequest, Observation, framed,
};

use crate::Error;
use crate::guest::{Child, Command, ExitStatus, GuestUser, Stdio};
use crate::hypervisor::ExitReason;
use crate::vm::Vm;

/// The most of each kind in an answer. No guest has so many by itself, and a hostile one does not keep the host busy.
const MAX_ITEMS: usize = 100_000;
const MAX_LOADS: usize = 1000;
const MAX_SITES: usize = 10_000;

/// How long a process that has closed its output may take to end.
const END_TIME: Duration = Duration::from_secs(5);

/// A running process of the agent's.
pub(super) struct Session<'vm> {
    child: Child<'vm>,
    requests: Sender<Vec<u8>>,
    answers: Receiver<Vec<u8>>,
}

/// What came of asking.
pub(super) enum Reply {
    Answer(Box<ModuleAnswer>),
    /// The kernel killed the process that did it.
    Died(ExitStatus),
    TimedOut,
}

impl<'vm> Session<'vm> {
    /// Starts one. Records of the log count from this number on; with `u64::MAX` from now on.
    pub(super) fn open(vm: &'vm Vm, log_from: u64) -> Result<Self, Error> {
        let command = Command::of_agent(vm, GuestUser::default());
        let command = command.args(["module", "serve", &log_from.to_string()]);
        let mut child = command.stdin(Stdio::Piped).stderr(Stdio::Null).spawn()?;
        let (requests, to_write) = channel::<Vec<u8>>();
        let (read, answers) = channel();
        // Both threads end with the process or the VM, whichever is first.
        if let Some(mut stdin) = child.stdin.take() {
            std::thread::spawn(move || {
                for request in to_write {
                    if stdin.write_all(&request).is_err() {
                        break;
                    }
                }
            });
        }
        if let Some(mut stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                while let Some(answer) = next_answer(&mut stdout) {
                    if read.send(answer).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, requests, answers })
    }

    /// Asks, and waits for the answer for so long.
    pub(super) fn ask(&mut self, request: &ModuleRequest, limit: Duration) -> Result<Reply, Error> {
        // That nobody takes it any more is seen below.
        let _ = self.requests.send(framed(request));
        match self.answers.recv_timeout(limit) {
            Ok(bytes) => {
                let answer = message::decode(&bytes).ok().filter(is_bounded);
                let odd = || Error::ModuleLook { how: "its answer makes no sense".to_owned() };
                Ok(Reply::Answer(Box::new(answer.ok_or_else(odd)?)))
            }
            Err(RecvTimeoutError::Timeout) => Ok(Reply::TimedOut),
            Err(RecvTimeoutError::Disconnected) => {
                let ended = self.child.wait_until(Some(Instant::now() + END_TIME))?;
                Ok(ended.map_or(Reply::TimedOut, Reply::Died))
            }
        }
    }
}

/// The bytes of the next answer; `None` at the end, and for one that is too long.
fn next_answer(from: &mut impl Read) -> Option<Vec<u8>> {
    let mut length = [0; LENGTH];
    from.read_exact(&mut length).ok()?;
    let length = Some(u32::from_le_bytes(length)).filter(|length| *length <= MAX_ANSWER)?;
    let mut bytes = Vec::new();
    from.take(length.into()).read_to_end(&mut bytes).ok()?;
    (bytes.len() == length as usize).then_some(bytes)
}

fn is_bounded(answer: &ModuleAnswer) -> bool {
    let ModuleAnswer { loads, observation, .. } = answer;
    let Observation { modules, names, areas, unfreed, kmemleak, log, .. } = observation;
    let counts = [modules.len(), names.len(), areas.len(), kmemleak.len(), log.len()];
    loads.len() <= MAX_LOADS
        && unfreed.len() <= MAX_SITES
        && counts.iter().all(|count| *count <= MAX_ITEMS)
}

/// Does what waits for the guest, which is ended if that takes longer: one whose only processor never comes back from a
/// module would be waited for without end. `None` then.
pub(super) fn within<T>(
    vm: &Vm,
    limit: Duration,
    what: impl FnOnce() -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    let fired = Arc::new(AtomicBool::new(false));
    let (done, wait) = channel::<()>();
    let (handle, late) = (vm.handle(), Arc::clone(&fired));
    std::thread::spawn(move || {
        // Nothing is sent: what ends the wait is that the sender is dropped.
        if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            late.store(true, Ordering::Release);
            handle.kill(ExitReason::Timeout);
        }
    });
    let outcome = what();
    drop(done);
    match outcome {
        Err(_) if fired.load(Ordering::Acquire) => Ok(None),
        outcome => outcome.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use vmlab_wire::observation::Load;

    use super::*;

    #[test]
    fn answers_are_bounded() {
        let load = Load { module: "m".to_owned(), sections: Vec::new() };
        let mut answer = ModuleAnswer { loads: vec![load; MAX_LOADS], ..ModuleAnswer::default() };
        assert!(is_bounded(&answer));
        answer.loads.push(answer.loads[0].clone());
        assert!(!is_bounded(&answer));
        answer.loads.clear();
        answer.observation.log = vec![Vec::new(); MAX_ITEMS + 1];
        assert!(!is_bounded(&answer));
        let framed = framed(&ModuleAnswer::default());
        let read = next_answer(&mut framed.as_slice()).unwrap();
        assert_eq!(message::decode::<ModuleAnswer>(&read).unwrap(), ModuleAnswer::default());
        assert_eq!(next_answer(&mut &framed[..framed.len() - 1]), None);
        assert_eq!(next_answer(&mut &u32::MAX.to_le_bytes()[..]), None);
    }
}
