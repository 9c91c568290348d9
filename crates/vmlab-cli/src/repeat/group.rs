//! The VMs that run at the moment, so that all of them can be ended at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmlab::hypervisor::{ExitReason, VmHandle};

/// VMs by the numbers of their runs.
#[derive(Debug, Default)]
pub(crate) struct Group {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    vms: BTreeMap<u64, Arc<dyn VmHandle>>,
}

impl Group {
    /// Takes a VM in that was just started, in the place of an earlier one of the same run. It is ended
    /// at once where all others were.
    pub(super) fn add(&self, number: u64, vm: &Arc<dyn VmHandle>) {
        let mut state = self.lock();
        if state.cancelled {
            drop(state);
            vm.kill(ExitReason::Killed);
        } else {
            state.vms.insert(number, Arc::clone(vm));
        }
    }

    /// A run is over.
    pub(super) fn remove(&self, number: u64) {
        self.lock().vms.remove(&number);
    }

    /// Ends all VMs, and those that are still to come.
    pub(crate) fn cancel(&self) {
        let vms = {
            let mut state = self.lock();
            state.cancelled = true;
            std::mem::take(&mut state.vms)
        };
        for vm in vms.values() {
            vm.kill(ExitReason::Killed);
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
