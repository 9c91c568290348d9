//! The VMs that run at the moment, so that all of them can be ended at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::hypervisor::{ExitReason, VmHandle};
use crate::sync::lock;

/// VMs by the numbers of their runs.
#[derive(Debug, Default)]
pub struct Group {
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
    pub fn add(&self, number: u64, vm: &Arc<dyn VmHandle>) {
        let mut state = lock(&self.state);
        if state.cancelled {
            drop(state);
            vm.kill(ExitReason::Killed);
        } else {
            state.vms.insert(number, Arc::clone(vm));
        }
    }

    /// A run is over.
    pub fn remove(&self, number: u64) {
        lock(&self.state).vms.remove(&number);
    }

    /// Ends all VMs, and those that are still to come.
    pub fn cancel(&self) {
        let vms = {
            let mut state = lock(&self.state);
            state.cancelled = true;
            std::mem::take(&mut state.vms)
        };
        for vm in vms.values() {
            vm.kill(ExitReason::Killed);
        }
    }

    /// Whether they were ended.
    pub fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }
}
