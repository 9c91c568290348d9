//! The places of virtio devices.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, MmapRegion,
};
use vmlab_devices::transport::mmio::{Mmio, MmioState, Page, register};
use vmlab_devices::{Device, Event, OnFault};
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, Panicked};
use super::interrupts::Interrupts;
use super::layout;
use crate::error::{Error, host, kvm};
use crate::event::for_kvm;
use crate::gate::Gate;

/// A device, and the slot that it goes to.
pub struct Plug {
    /// The slot's number.
    pub slot: usize,
    /// The device.
    pub device: Arc<dyn Device>,
    /// Who is told when one of its threads cannot go on.
    pub on_fault: OnFault,
}

/// All slots of a VM.
pub(super) struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    control: Control,
    interrupts: Interrupts,
    /// A page of registers for each slot, which the guest reads without being left. What it writes there comes
    /// here.
    pages: Arc<MmapRegion>,
    /// Signalled by guests that acknowledge an interrupt of a queue, for which nobody waits.
    acknowledged: Arc<EventFd>,
    slots: Vec<RwLock<Option<Arc<Plugged>>>>,
}

/// A device in a slot.
struct Plugged {
    mmio: Mmio,
    vm: Arc<VmFd>,
    /// The events that writes to its notification register signal, by queue.
    kicks: Vec<EventFd>,
    /// That of all slots.
    acknowledged: Arc<EventFd>,
    page: Page,
    slot: usize,
}

impl Slots {
    /// So many slots, all empty, for the processors that wait at a gate.
    pub(super) fn new(
        vm: Arc<VmFd>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        gate: Arc<Gate>,
        count: usize,
    ) -> Result<Self, Error> {
        let control = Control::new(gate).map_err(host("start a thread"))?;
        let pages = MmapRegion::new(count.max(1) * Page::SIZE);
        let pages = pages.map_err(|e| host("map registers")(io::Error::other(e)))?;
        let acknowledged = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let acknowledged = Arc::new(acknowledged.map_err(host("make an event"))?);
        let pages = Arc::new(pages);
        (0..count).try_for_each(|slot| page(&pages, slot).map(drop))?;
        if count > 0 {
            let region = kvm_userspace_memory_region {
                // Behind those of the memory.
                slot: memory.memory().num_regions() as u32,
                flags: KVM_MEM_READONLY,
                guest_phys_addr: layout::SLOTS,
                memory_size: pages.size() as u64,
                userspace_addr: pages.as_ptr() as u64,
            };
            // SAFETY: the region is a whole mapping, which is kept until no processor runs any more, and which the
            // guest only reads. The host uses it by atomic operations.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("show registers"))?;
        }
        let slots = (0..count).map(|_| RwLock::default()).collect();
        let interrupts = Interrupts::default();
        Ok(Self { vm, memory, control, interrupts, pages, acknowledged, slots })
    }

    fn get(&self, slot: usize) -> Option<Arc<Plugged>> {
        let slot = self.slots.get(slot)?;
        slot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a device into an empty slot.
    pub(super) fn plug(&self, plug: Plug) -> Result<(), Error> {
        let Plug { slot, device, on_fault } = plug;
        let place = self.slots.get(slot).ok_or(Error::Slot { slot, how: "does not exist" })?;
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return Err(Error::Slot { slot, how: "has a device" });
        }
        let gsi = layout::slot_gsi(slot);
        let interrupt = self.interrupts.get(gsi, |irqfd| {
            self.vm.register_irqfd(irqfd, gsi).map_err(kvm("route a device's interrupt"))
        })?;
        let page = page(&self.pages, slot)?;
        let of_slot = (page.clone(), Arc::clone(&self.acknowledged));
        let of_device = (slot, device, on_fault, interrupt);
        let plugged = Plugged::new(&self.vm, self.memory.clone(), of_slot, of_device);
        let plugged = plugged.inspect_err(|_| page.clear())?;
        *place = Some(Arc::new(plugged));
        Ok(())
    }

    /// Takes a device out. When this returns, none of its requests is in progress.
    pub(super) fn unplug(&self, slot: usize) -> Result<(), Error> {
        let place = self.slots.get(slot).ok_or(Error::Slot { slot, how: "does not exist" })?;
        let missing = Error::Slot { slot, how: "has no device" };
        let Some(plugged) = self.get(slot) else { return Err(missing) };
        // This waits for the host. A processor must not wait for it at the lock.
        plugged.mmio.quiesce();
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        let plugged = place.take().ok_or(missing)?;
        plugged.let_go();
        // What its guest has written meanwhile must not come to the page of the next one.
        self.control.drain();
        plugged.page.clear();
        Ok(())
    }

    /// What the calling processor's guest writes to the registers of slots. It may not be done when the processor is to
    /// stop: see [`settle`](Self::settle).
    ///
    /// # Errors
    /// The device panicked at it.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Panicked> {
        let (slot, offset) = place(address);
        let Some(slot) = self.slots.get(slot) else { return Ok(()) };
        // Held until it is done: the page is another device's when this one is gone.
        let plugged = slot.read().unwrap_or_else(PoisonError::into_inner);
        let Some(plugged) = &*plugged else { return Ok(()) };
        if changes_threads(offset, data) {
            let (plugged, data) = (Arc::clone(plugged), data.to_vec());
            return self.control.run(move || plugged.mmio.write(offset, &data));
        }
        plugged.mmio.write(offset, data);
        Ok(())
    }

    /// Waits until all is done that the calling processor's guest has written (true), or the processor is to stop.
    ///
    /// # Errors
    /// A device panicked at it.
    pub(super) fn settle(&self) -> Result<bool, Panicked> {
        self.control.settle()
    }

    /// Ends all that devices do. When this returns, no request is in progress.
    pub(super) fn quiesce(&self) {
        // What a guest has written may have been left to be done when its processors were stopped.
        self.control.drain();
        (0..self.slots.len()).filter_map(|slot| self.get(slot)).for_each(|it| it.mmio.quiesce());
    }

    /// Ends all that KVM does for devices. When this returns, no interrupt of theirs is on its way.
    pub(super) fn let_go(&self) {
        (0..self.slots.len()).filter_map(|slot| self.get(slot)).for_each(|it| it.let_go());
        self.interrupts.let_go(|irqfd, gsi| {
            // It fails only for what is not registered.
            let _ = self.vm.unregister_irqfd(irqfd, gsi);
        });
    }

    /// The devices' registers.
    pub(super) fn state(&self) -> Vec<Option<MmioState>> {
        let state = |slot| self.get(slot).map(|plugged| plugged.mmio.state());
        (0..self.slots.len()).map(state).collect()
    }

    /// Whether the devices that are there can go on with these registers. A slot that was empty may have a
    /// device, which then begins.
    pub(super) fn check(&self, states: &[Option<MmioState>]) -> Result<(), Error> {
        if states.len() != self.slots.len() {
            return Err(Error::State(format!("it has {} slots", states.len())));
        }
        self.with_state(states, |plugged, state| plugged.mmio.check(state))
    }

    /// Has them go on, after [`check`](Self::check).
    pub(super) fn restore(&self, states: &[Option<MmioState>]) -> Result<(), Error> {
        self.with_state(states, |plugged, state| plugged.mmio.restore(state))
    }

    fn with_state<E: std::fmt::Display>(
        &self,
        states: &[Option<MmioState>],
        act: impl Fn(&Plugged, &MmioState) -> Result<(), E>,
    ) -> Result<(), Error> {
        for (slot, state) in states.iter().enumerate() {
            let Some(state) = state else { continue };
            let missing = || Error::State(format!("slot {slot} had a device and has none"));
            let plugged = self.get(slot).ok_or_else(missing)?;
            act(&plugged, state).map_err(|e| Error::State(format!("the device {slot}: {e}")))?;
        }
        Ok(())
    }
}

impl Plugged {
    fn new(
        vm: &Arc<VmFd>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        (page, acknowledged): (Page, Arc<EventFd>),
        (slot, device, on_fault, interrupt): (usize, Arc<dyn Device>, OnFault, Event),
    ) -> Result<Self, Error> {
        const EVENTS: &str = "make events for a device";
        let mmio = Mmio::new(device, memory, interrupt.into(), page.clone(), on_fault);
        let mmio = mmio.map_err(host("start a device"))?;
        let kicks = mmio.kicks().map(|kick: BorrowedFd<'_>| for_kvm(kick));
        let kicks = kicks.collect::<Result<Vec<_>, _>>().map_err(host(EVENTS))?;
        let vm = Arc::clone(vm);
        let mut plugged = Self { mmio, vm, kicks: Vec::new(), acknowledged, page, slot };
        // KVM takes these writes without leaving the guest. So the device does not hear of them, and goes on to say
        // that it has used buffers: drivers look at their rings at each interrupt.
        let routed = plugged.vm.register_ioevent(
            &plugged.acknowledged,
            &plugged.register(register::INTERRUPT_ACK),
            VIRTIO_MMIO_INT_VRING,
        );
        if let Err(error) = routed {
            plugged.let_go();
            return Err(kvm("route acknowledgments of interrupts")(error));
        }
        for kick in kicks {
            let queue = plugged.kicks.len() as u32;
            let notify = plugged.register(register::QUEUE_NOTIFY);
            let routed = plugged.vm.register_ioevent(&kick, &notify, queue);
            if let Err(error) = routed {
                // The slot may get another one.
                plugged.let_go();
                return Err(kvm("route a queue's notifications")(error));
            }
            plugged.kicks.push(kick);
        }
        Ok(plugged)
    }

    /// Where one of its registers is.
    fn register(&self, register: u32) -> IoEventAddress {
        IoEventAddress::Mmio(layout::slot_address(self.slot) + u64::from(register))
    }

    /// Ends what KVM does for it, but for its interrupt, which others may share. At the end of a VM, which ends all of
    /// that, it need not be done one by one.
    fn let_go(&self) {
        // It fails only for what is not registered.
        for (queue, kick) in self.kicks.iter().enumerate() {
            let notify = self.register(register::QUEUE_NOTIFY);
            let _ = self.vm.unregister_ioevent(kick, &notify, queue as u32);
        }
        let acknowledge = self.register(register::INTERRUPT_ACK);
        let reason = VIRTIO_MMIO_INT_VRING;
        let _ = self.vm.unregister_ioevent(&self.acknowledged, &acknowledge, reason);
    }
}

/// Whether a write to a register may start threads, or end some and wait for them.
fn changes_threads(offset: u64, data: &[u8]) -> bool {
    match u32::try_from(offset) {
        Ok(register::STATUS) => true,
        Ok(register::QUEUE_READY) => data.iter().all(|byte| *byte == 0),
        _ => false,
    }
}

/// The slot of an address and the register in it.
fn place(address: u64) -> (usize, u64) {
    let offset = address - layout::SLOTS;
    ((offset / layout::SLOT_SIZE) as usize, offset % layout::SLOT_SIZE)
}

/// The page of a slot, which has no device yet.
fn page(pages: &Arc<MmapRegion>, slot: usize) -> Result<Page, Error> {
    Page::of(pages, slot).ok_or(Error::Slot { slot, how: "does not exist" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_register_of_a_slot() {
        for slot in [0, 1, layout::MAX_SLOTS - 1] {
            for register in [0, 0x50, layout::SLOT_SIZE - 1] {
                assert_eq!(place(layout::slot_address(slot) + register), (slot, register));
            }
        }
    }
}
