//! Reads what the kernel says of itself while an attempt goes on.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::events::{EventKinds, EventReader, KernelEvent};
use crate::hypervisor::VmHandle;
use crate::prepared::Watcher;
use crate::sync::lock;

/// A console that is read.
#[derive(Debug)]
struct Reading {
    reader: Arc<Mutex<EventReader>>,
    thread: JoinHandle<()>,
    /// Whether its VM got ready.
    ready: bool,
}

/// Reads the console of the last VM that an attempt has started: a first one may have been there only for a
/// snapshot, and the second has its console from the beginning. One that got ready and was reset counts, too.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    earlier: Mutex<Vec<Reading>>,
    last: Mutex<Option<Reading>>,
}

impl Watcher for Watch {
    fn started(&self, handle: &Arc<dyn VmHandle>) {
        let was_ready = lock(&self.last).take_if(|reading| reading.ready);
        lock(&self.earlier).extend(was_ready);
        self.vm(handle);
    }

    fn ready(&self) {
        if let Some(reading) = &mut *lock(&self.last) {
            reading.ready = true;
        }
    }
}

impl Watch {
    /// An attempt has started a VM.
    pub(crate) fn vm(&self, vm: &Arc<dyn VmHandle>) {
        let output = vm.serial().subscribe();
        let reader = Arc::new(Mutex::new(EventReader::all()));
        let fed = Arc::clone(&reader);
        let thread = std::thread::spawn(move || {
            for bytes in output {
                lock(&fed).feed(&bytes);
            }
        });
        *lock(&self.last) = Some(Reading { reader, thread, ready: false });
    }

    /// The kinds of what it is still saying.
    pub(crate) fn unfinished(&self) -> EventKinds {
        let last = lock(&self.last);
        last.as_ref().map(|reading| lock(&reading.reader).unfinished()).unwrap_or_default()
    }

    /// What it said so far.
    pub(crate) fn so_far(&self) -> Vec<KernelEvent> {
        let last = lock(&self.last);
        last.as_ref().map(|reading| lock(&reading.reader).events().to_vec()).unwrap_or_default()
    }

    /// What it said, once the VM has ended.
    pub(crate) fn finish(&self) -> Vec<KernelEvent> {
        let mut readings = std::mem::take(&mut *lock(&self.earlier));
        readings.extend(lock(&self.last).take());
        let events = readings.into_iter().flat_map(|Reading { reader, thread, .. }| {
            // A reader that panicked has nothing more to say.
            let _ = thread.join();
            let mut reader = lock(&reader);
            reader.finish();
            reader.events().to_vec()
        });
        events.collect()
    }
}
