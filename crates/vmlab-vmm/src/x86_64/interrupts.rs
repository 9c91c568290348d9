//! What interrupts the guest.
//!
//! There are more slots than inputs of the I/O APIC, so that some share one. For each signal of an irqfd, KVM raises the
//! input and lowers it again, and does so for several irqfds at once. If one is raised between the raising and the
//! lowering of another one on the same input, that is no edge (`ioapic_set_irq` in `arch/x86/kvm/ioapic.c` of Linux),
//! and a guest that has handled the first interrupt by then would never hear of the second. So slots that share an
//! input share an irqfd: what KVM does for one is never done twice at once, and is done once more after each signal that
//! came since it was begun.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vmlab_devices::Event;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, host, kvm};
use crate::event::for_kvm;

/// Those that are in use, by their inputs.
#[derive(Debug, Default)]
pub(super) struct Interrupts(Mutex<BTreeMap<u32, Interrupt>>);

#[derive(Debug)]
struct Interrupt {
    event: Event,
    irqfd: EventFd,
}

impl Interrupts {
    /// What raises an input of this VM.
    ///
    /// # Errors
    /// KVM or the host refuses something.
    pub(super) fn of(&self, vm: &VmFd, gsi: u32) -> Result<Event, Error> {
        self.get(gsi, |irqfd| vm.register_irqfd(irqfd, gsi).map_err(kvm("route an interrupt")))
    }

    /// Ends what KVM does for all of them. When this returns, none is on its way.
    ///
    /// # Errors
    /// KVM refuses something.
    pub(super) fn let_go(&self, vm: &VmFd) -> Result<(), Error> {
        self.take().iter().try_for_each(|(gsi, interrupt)| {
            let unregistered = vm.unregister_irqfd(&interrupt.irqfd, *gsi);
            unregistered.map_err(kvm("end the routing of an interrupt"))
        })
    }

    /// What raises an input. `route` has KVM wait for it, the first time.
    fn get(
        &self,
        gsi: u32,
        route: impl FnOnce(&EventFd) -> Result<(), Error>,
    ) -> Result<Event, Error> {
        const EVENT: &str = "make an event";
        let mut all = self.lock();
        if let Some(interrupt) = all.get(&gsi) {
            return interrupt.event.try_clone().map_err(host(EVENT));
        }
        let event = Event::new().map_err(host(EVENT))?;
        let irqfd = for_kvm(event.as_fd()).map_err(host(EVENT))?;
        let given = event.try_clone().map_err(host(EVENT))?;
        route(&irqfd)?;
        all.insert(gsi, Interrupt { event, irqfd });
        Ok(given)
    }

    /// All of them, which are no more from then on.
    fn take(&self) -> BTreeMap<u32, Interrupt> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Interrupt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::super::layout::{MAX_SLOTS, gsi, slot_gsi};
    use super::*;

    fn signalled(event: &Event) -> bool {
        poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    #[test]
    fn slots_that_share_an_input_share_its_irqfd_and_others_do_not() {
        let interrupts = Interrupts::default();
        let mut routed = Vec::new();
        let mut get = |slot| {
            let gsi = slot_gsi(slot);
            let route = |_: &EventFd| {
                routed.push(gsi);
                Ok(())
            };
            interrupts.get(gsi, route).unwrap()
        };
        let events: Vec<_> = (0..MAX_SLOTS).map(&mut get).collect();
        assert_eq!(routed, gsi::SLOTS);
        for (slot, event) in events.iter().enumerate() {
            event.signal();
            for (other, of_other) in events.iter().enumerate() {
                assert_eq!(signalled(of_other), slot_gsi(slot) == slot_gsi(other));
            }
            event.clear();
        }
        let given_up: Vec<u32> = interrupts.take().into_keys().collect();
        assert_eq!(given_up, gsi::SLOTS);
    }

    #[test]
    fn an_interrupt_that_cannot_be_routed_is_none() {
        let interrupts = Interrupts::default();
        let refused = |_: &EventFd| Err(Error::Ended);
        assert!(interrupts.get(5, refused).is_err());
        let mut routed = false;
        interrupts
            .get(5, |_| {
                routed = true;
                Ok(())
            })
            .unwrap();
        assert!(routed);
    }
}
