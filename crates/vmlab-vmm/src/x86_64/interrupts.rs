//! What devices in slots interrupt the guest by.
//!
//! There are more slots than inputs of the I/O APIC, so that some share one. For each signal of an irqfd, KVM raises the
//! input and lowers it again, and does so for several irqfds at once. If one is raised between the raising and the
//! lowering of another one on the same input, that is no edge (`ioapic_set_irq` in `arch/x86/kvm/ioapic.c` of Linux),
//! and a guest that has handled the first interrupt by then would never hear of the second. So slots that share an
//! input share an irqfd: what KVM does for one is never done twice at once, and is done once more after each signal that
//! came since it was begun.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use vmlab_devices::Event;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, host};
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
    /// What raises an input. `route` has KVM wait for it, the first time.
    pub(super) fn get(
        &self,
        gsi: u32,
        route: impl FnOnce(&EventFd) -> Result<(), Error>,
    ) -> Result<Event, Error> {
        const EVENT: &str = "make an event for a device";
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = all.get(&gsi) {
            return interrupt.event.try_clone().map_err(host(EVENT));
        }
        let event = Event::new().map_err(host(EVENT))?;
        let irqfd = for_kvm(event.as_fd()).map_err(host(EVENT))?;
        let of_device = event.try_clone().map_err(host(EVENT))?;
        route(&irqfd)?;
        all.insert(gsi, Interrupt { event, irqfd });
        Ok(of_device)
    }

    /// Gives all of them up.
    pub(super) fn let_go(&self, mut unroute: impl FnMut(&EventFd, u32)) {
        let all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        all.iter().for_each(|(gsi, interrupt)| unroute(&interrupt.irqfd, *gsi));
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
        let mut given_up = Vec::new();
        interrupts.let_go(|_, gsi| given_up.push(gsi));
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
