//! VMs that a test starts by itself: what their kernels say, and where their time went.

use std::sync::{Arc, Mutex};

use vmlab_artifacts::Kernel;

use crate::DebugInfo;
use crate::events::KernelEvent;
use crate::hypervisor::VmHandle;
use crate::prepared::Watcher;
use crate::report::Report;
use crate::runner::{Watch, decode_reports};
use crate::sync::lock;

/// Sees all VMs that are made from a builder and its clones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observer {
    vms: Arc<Mutex<Vec<Arc<ObservedVm>>>>,
}

/// One of these VMs.
#[derive(Debug)]
pub(crate) struct ObservedVm {
    kernel: Option<Kernel>,
    watch: Watch,
    report: Mutex<Option<Report>>,
}

/// What is known of a VM in the end.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) events: Vec<KernelEvent>,
    /// There is none of a VM that still runs.
    pub(super) report: Option<Report>,
}

impl Observer {
    /// A VM will be started.
    pub(crate) fn vm(&self, kernel: Option<&Kernel>) -> Arc<ObservedVm> {
        let vm = Arc::new(ObservedVm {
            kernel: kernel.cloned(),
            watch: Watch::default(),
            report: Mutex::new(None),
        });
        lock(&self.vms).push(Arc::clone(&vm));
        vm
    }

    /// All that was seen, in the order of the VMs' starts.
    pub(super) fn seen(&self) -> Vec<Observed> {
        std::mem::take(&mut *lock(&self.vms)).iter().map(|vm| vm.seen()).collect()
    }
}

impl Watcher for ObservedVm {
    fn started(&self, handle: &Arc<dyn VmHandle>) {
        self.watch.started(handle);
    }

    fn ready(&self) {
        self.watch.ready();
    }
}

impl ObservedVm {
    /// It has ended, or never came up.
    pub(crate) fn ended(&self, report: Report) {
        *lock(&self.report) = Some(report);
    }

    fn seen(&self) -> Observed {
        let report = lock(&self.report).take();
        // The console of a VM that somebody still has does not end.
        let mut events = match &report {
            Some(_) => self.watch.finish(),
            None => self.watch.so_far(),
        };
        if let Some(kernel) = &self.kernel {
            decode_reports(&DebugInfo::of(kernel, std::env::current_dir()), &mut events);
        }
        Observed { events, report }
    }
}
