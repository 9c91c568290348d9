//! Reads what the kernel says of itself while an attempt goes on.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::events::{EventKinds, EventReader, KernelEvent};
use crate::hypervisor::VmHandle;
use crate::sync::lock;

/// A console's reader, and the thread that feeds it.
type Reading = (Arc<Mutex<EventReader>>, JoinHandle<()>);

/// Reads the console of the last VM that an attempt has started: a first one may have been there only for a
/// snapshot, and the second has its console from the beginning.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    last: Mutex<Option<Reading>>,
}

impl Watch {
    /// An attempt has started a VM.
    pub(crate) fn vm(&self, vm: &Arc<dyn VmHandle>) {
        let output = vm.serial().subscribe();
        let reader = Arc::new(Mutex::new(EventReader::all()));
        let fed = Arc::clone(&reader);
        let reading = std::thread::spawn(move || {
            for bytes in output {
                lock(&fed).feed(&bytes);
            }
        });
        *lock(&self.last) = Some((reader, reading));
    }

    /// The kinds of what it is still saying.
    pub(crate) fn unfinished(&self) -> EventKinds {
        let last = lock(&self.last);
        last.as_ref().map(|(reader, _)| lock(reader).unfinished()).unwrap_or_default()
    }

    /// What it said so far.
    pub(crate) fn so_far(&self) -> Vec<KernelEvent> {
        let last = lock(&self.last);
        last.as_ref().map(|(reader, _)| lock(reader).events().to_vec()).unwrap_or_default()
    }

    /// What it said, once the VM has ended.
    pub(crate) fn finish(self) -> Vec<KernelEvent> {
        let last = lock(&self.last).take();
        let Some((reader, reading)) = last else { return Vec::new() };
        // A reader that panicked has nothing more to say.
        let _ = reading.join();
        let mut reader = lock(&reader);
        reader.finish();
        reader.events().to_vec()
    }
}
