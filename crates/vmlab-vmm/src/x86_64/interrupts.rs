//! What interrupts the guest.
//!
//! Whoever has something for it raises an input of the I/O APIC and lowers it again, itself. An irqfd would have a thread
//! of KVM's do so, since only messages (MSI) are delivered at once (`kvm_arch_set_irq_inatomic` in
//! `arch/x86/kvm/irq_comm.c` of Linux): that is later, and costs two switches of threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vmlab_devices::Interrupt;

/// What has inputs.
pub(super) trait Inputs: Send + Sync {
    /// Raises one or lowers it.
    fn set(&self, gsi: u32, raised: bool);
}

impl Inputs for VmFd {
    fn set(&self, gsi: u32, raised: bool) {
        // It fails only where the VM has no such input.
        let _ = self.set_irq_line(gsi, raised);
    }
}

/// An input of the I/O APIC.
///
/// There are more slots than inputs, so that some share one. If it is raised between the raising and the lowering by
/// another one, that is no edge (`ioapic_set_irq` in `arch/x86/kvm/ioapic.c` of Linux), and a guest that has handled the
/// first interrupt by then would never hear of the second. So they take turns.
pub(super) struct Input {
    vm: Arc<dyn Inputs>,
    gsi: u32,
    turn: Mutex<()>,
}

impl Interrupt for Input {
    fn signal(&self) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.vm.set(self.gsi, true);
        self.vm.set(self.gsi, false);
    }
}

/// The inputs of a VM that are in use.
pub(super) struct Interrupts {
    vm: Arc<dyn Inputs>,
    inputs: Mutex<BTreeMap<u32, Arc<Input>>>,
}

impl Interrupts {
    pub(super) fn new(vm: Arc<dyn Inputs>) -> Self {
        Self { vm, inputs: Mutex::default() }
    }

    /// The input of this number, the same for all who use it.
    pub(super) fn input(&self, gsi: u32) -> Arc<Input> {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Input { vm: Arc::clone(&self.vm), gsi, turn: Mutex::default() });
        Arc::clone(inputs.entry(gsi).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::super::layout::{MAX_SLOTS, gsi, slot_gsi};
    use super::*;

    /// How often each input was raised, and whether it is.
    #[derive(Default)]
    struct Counted(Mutex<BTreeMap<u32, (u32, bool)>>);

    impl Inputs for Counted {
        fn set(&self, gsi: u32, raised: bool) {
            {
                let mut inputs = self.0.lock().unwrap();
                let (count, was) = inputs.entry(gsi).or_default();
                assert_ne!(*was, raised, "no edge of {gsi}");
                (*count, *was) = (*count + u32::from(raised), raised);
            }
            // Others come in between if they can.
            thread::yield_now();
        }
    }

    #[test]
    fn each_signal_is_an_edge_also_where_slots_share_an_input() {
        const SIGNALS: u32 = 200;
        let vm = Arc::new(Counted::default());
        let interrupts = Interrupts::new(Arc::clone(&vm) as Arc<dyn Inputs>);
        thread::scope(|scope| {
            for slot in 0..MAX_SLOTS {
                let input = interrupts.input(slot_gsi(slot));
                scope.spawn(move || (0..SIGNALS).for_each(|_| input.signal()));
            }
        });
        let mut wanted = BTreeMap::<u32, (u32, bool)>::new();
        for slot in 0..MAX_SLOTS {
            wanted.entry(slot_gsi(slot)).or_default().0 += SIGNALS;
        }
        assert_eq!(*vm.0.lock().unwrap(), wanted);
        assert_eq!(wanted.into_keys().collect::<Vec<_>>(), gsi::SLOTS);
    }
}
