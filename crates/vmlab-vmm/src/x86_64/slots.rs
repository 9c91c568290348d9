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
use vmlab_devices::{Device, OnFault};
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
    /// The registers of each slot, which the guest reads without being left. What it writes there comes here.
    pages: Vec<Page>,
    /// Signalled by guests that acknowledge an interrupt of a queue, for which nobody waits.
    acknowledged: Arc<EventFd>,
    slots: Vec<Place>,
}

/// A slot, and the device in it.
type Place = RwLock<Option<Arc<Plugged>>>;

/// A device in a slot.
struct Plugged {
    mmio: Mmio,
    vm: Arc<VmFd>,
    /// The events that writes to its notification register signal, by queue.
    kicks: Vec<EventFd>,
    /// That of all slots.
    acknowledged: Arc<EventFd>,
    slot: usize,
}

impl Slots {
    /// So many slots, all empty, for the processors that wait at a gate.
    pub(super) fn new(
        (vm, memory): (Arc<VmFd>, GuestMemoryAtomic<GuestMemoryMmap>),
        gate: Arc<Gate>,
        interrupts: Interrupts,
        count: usize,
    ) -> Result<Self, Error> {
        let control = Control::new(gate).map_err(host("start a thread"))?;
        let acknowledged = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let acknowledged = Arc::new(acknowledged.map_err(host("make an event"))?);
        // Behind those of the memory.
        let memory_slot = memory.memory().num_regions() as u32;
        let pages = if count > 0 { show(&vm, memory_slot, count)? } else { Vec::new() };
        let slots = (0..count).map(|_| RwLock::default()).collect();
        Ok(Self { vm, memory, control, interrupts, pages, acknowledged, slots })
    }

    fn at(&self, slot: usize) -> Result<(&Place, &Page), Error> {
        let place = self.slots.get(slot).zip(self.pages.get(slot));
        place.ok_or(Error::Slot { slot, how: "does not exist" })
    }

    fn get(&self, slot: usize) -> Option<Arc<Plugged>> {
        let slot = self.slots.get(slot)?;
        slot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a device into an empty slot.
    pub(super) fn plug(&self, plug: Plug) -> Result<(), Error> {
        let Plug { slot, device, on_fault } = plug;
        let (place, page) = self.at(slot)?;
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return Err(Error::Slot { slot, how: "has a device" });
        }
        let interrupt = self.interrupts.input(layout::slot_gsi(slot));
        let mmio = Mmio::new(device, self.memory.clone(), interrupt, page.clone(), on_fault);
        let plugged = mmio.map_err(host("start a device")).and_then(|mmio| {
            Plugged::new(Arc::clone(&self.vm), mmio, Arc::clone(&self.acknowledged), slot)
        });
        let plugged = plugged.inspect_err(|_| page.clear())?;
        *place = Some(Arc::new(plugged));
        Ok(())
    }

    /// Takes a device out. When this returns, none of its requests is in progress.
    pub(super) fn unplug(&self, slot: usize) -> Result<(), Error> {
        let (place, page) = self.at(slot)?;
        let missing = Error::Slot { slot, how: "has no device" };
        let Some(plugged) = self.get(slot) else { return Err(missing) };
        // This waits for the host. A processor must not wait for it at the lock.
        plugged.mmio.quiesce();
        let mut place = place.write().unwrap_or_else(PoisonError::into_inner);
        let plugged = place.take().ok_or(missing)?;
        plugged.let_go();
        // What its guest has written meanwhile must not come to the page of the next one.
        self.control.drain();
        page.clear();
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

    /// Ends all that KVM does for devices.
    pub(super) fn let_go(&self) {
        (0..self.slots.len()).filter_map(|slot| self.get(slot)).for_each(|it| it.let_go());
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
        vm: Arc<VmFd>,
        mmio: Mmio,
        acknowledged: Arc<EventFd>,
        slot: usize,
    ) -> Result<Self, Error> {
        let kicks = mmio.kicks().map(|kick: BorrowedFd<'_>| for_kvm(kick));
        let kicks = kicks.collect::<Result<_, _>>().map_err(host("make events for a device"))?;
        let plugged = Self { mmio, vm, kicks, acknowledged, slot };
        let route = |(event, at, value)| plugged.vm.register_ioevent(event, &at, value);
        let routed = plugged.signals().try_for_each(route);
        // The slot may get another one.
        routed.inspect_err(|_| plugged.let_go()).map_err(kvm("route a device's notifications"))?;
        Ok(plugged)
    }

    /// The events that KVM signals for writes of its guest, to which register, and of what. The guest is not left for
    /// them. So a device does not hear that an interrupt of a queue is acknowledged, and goes on to say that it has used
    /// buffers: drivers look at their rings at each interrupt.
    fn signals(&self) -> impl Iterator<Item = (&EventFd, IoEventAddress, u32)> {
        let base = layout::slot_address(self.slot);
        let register = move |register: u32| IoEventAddress::Mmio(base + u64::from(register));
        let kicks = self.kicks.iter().zip(0..);
        let kicks = kicks.map(move |(kick, queue)| (kick, register(register::QUEUE_NOTIFY), queue));
        let acknowledge = register(register::INTERRUPT_ACK);
        kicks.chain([(&*self.acknowledged, acknowledge, VIRTIO_MMIO_INT_VRING)])
    }

    /// Ends what KVM does for it. At the end of a VM, which ends all of that, it need not be done one by one.
    fn let_go(&self) {
        for (event, at, value) in self.signals() {
            // It fails only for what is not registered.
            let _ = self.vm.unregister_ioevent(event, &at, value);
        }
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

/// Has the guest read the registers of so many slots, at least one, as memory. This is KVM's memory of that number.
fn show(vm: &VmFd, slot: u32, count: usize) -> Result<Vec<Page>, Error> {
    let failed = |error| host("map registers")(io::Error::other(error));
    let region = MmapRegion::new(count * Page::SIZE).map_err(failed)?;
    let memory = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: layout::SLOTS,
        memory_size: region.size() as u64,
        userspace_addr: region.as_ptr() as u64,
    };
    let region = Arc::new(region);
    let pages = (0..count).map_while(|index| Page::of(&region, index)).collect();
    // SAFETY: the region is a whole mapping, which the pages keep until no processor runs any more, and which the guest
    // only reads. The host uses it by atomic operations.
    unsafe { vm.set_user_memory_region(memory) }.map_err(kvm("show registers"))?;
    Ok(pages)
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
