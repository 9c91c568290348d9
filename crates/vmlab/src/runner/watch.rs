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
    /// What was said by those before.
    earlier: Mutex<Vec<KernelEvent>>,
    last: Mutex<Option<Reading>>,
}

impl Watcher for Watch {
    fn started(&self, handle: &Arc<dyn VmHandle>) {
        if let Some(reading) = lock(&self.last).take_if(|reading| reading.ready) {
            // Its VM has ended, and its console with it.
            lock(&self.earlier).extend(reading.finish());
        }
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
        let mut events = lock(&self.earlier).clone();
        if let Some(reading) = &*lock(&self.last) {
            events.extend_from_slice(lock(&reading.reader).events());
        }
        events
    }

    /// What it said, once the VM has ended.
    pub(crate) fn finish(&self) -> Vec<KernelEvent> {
        let mut events = std::mem::take(&mut *lock(&self.earlier));
        events.extend(lock(&self.last).take().into_iter().flat_map(Reading::finish));
        events
    }
}

impl Reading {
    /// All that was said, once the console has ended.
    fn finish(self) -> Vec<KernelEvent> {
        // A reader that panicked has nothing more to say.
        let _ = self.thread.join();
        let mut reader = lock(&self.reader);
        reader.finish();
        reader.events().to_vec()
    }
}
