//! The places of virtio devices.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};

use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmlab_devices::transport::mmio::{Mmio, MmioState, register};
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
    slots: Vec<RwLock<Option<Arc<Plugged>>>>,
}

/// A device in a slot.
struct Plugged {
    mmio: Mmio,
    vm: Arc<VmFd>,
    /// The events that writes to its notification register signal, by queue.
    kicks: Vec<EventFd>,
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
        let slots = (0..count).map(|_| RwLock::default()).collect();
        Ok(Self { vm, memory, control, interrupts: Interrupts::default(), slots })
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
        let of_device = (slot, device, on_fault, interrupt);
        let plugged = Plugged::new(&self.vm, self.memory.clone(), of_device)?;
        *place = Some(Arc::new(plugged));
        Ok(())
    }

    /// Takes a device out. When this returns, none of its requests is in progress.
    pub(super) fn unplug(&self, slot: usize) -> Result<(), Error> {
        let place = self.slots.get(slot).ok_or(Error::Slot { slot, how: "does not exist" })?;
        let plugged = place.write().unwrap_or_else(PoisonError::into_inner).take();
        let plugged = plugged.ok_or(Error::Slot { slot, how: "has no device" })?;
        plugged.mmio.quiesce();
        plugged.let_go();
        Ok(())
    }

    /// What a guest reads from the registers of slots.
    pub(super) fn read(&self, address: u64, data: &mut [u8]) {
        let (slot, offset) = place(address);
        match self.get(slot) {
            Some(plugged) => plugged.mmio.read(offset, data),
            None => read_empty(offset, data),
        }
    }

    /// What the calling processor's guest writes to them. It may not be done when the processor is to stop: see
    /// [`settle`](Self::settle).
    ///
    /// # Errors
    /// The device panicked at it.
    pub(super) fn write(&self, address: u64, data: &[u8]) -> Result<(), Panicked> {
        let (slot, offset) = place(address);
        let Some(plugged) = self.get(slot) else { return Ok(()) };
        if changes_threads(offset, data) {
            let data = data.to_vec();
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
        (slot, device, on_fault, interrupt): (usize, Arc<dyn Device>, OnFault, Event),
    ) -> Result<Self, Error> {
        const EVENTS: &str = "make events for a device";
        let mmio = Mmio::new(device, memory, interrupt.into(), on_fault);
        let mmio = mmio.map_err(host("start a device"))?;
        let kicks = mmio.kicks().map(|kick: BorrowedFd<'_>| for_kvm(kick));
        let kicks = kicks.collect::<Result<Vec<_>, _>>().map_err(host(EVENTS))?;
        let mut plugged = Self { mmio, vm: Arc::clone(vm), kicks: Vec::new(), slot };
        for kick in kicks {
            let queue = plugged.kicks.len() as u32;
            let routed = vm.register_ioevent(&kick, &plugged.notify_address(), queue);
            if let Err(error) = routed {
                // The slot may get another one.
                plugged.let_go();
                return Err(kvm("route a queue's notifications")(error));
            }
            plugged.kicks.push(kick);
        }
        Ok(plugged)
    }

    fn notify_address(&self) -> IoEventAddress {
        IoEventAddress::Mmio(layout::slot_address(self.slot) + u64::from(register::QUEUE_NOTIFY))
    }

    /// Ends what KVM does for it, but for its interrupt, which others may share. At the end of a VM, which ends all of
    /// that, it need not be done one by one.
    fn let_go(&self) {
        // It fails only for what is not registered.
        for (queue, kick) in self.kicks.iter().enumerate() {
            let _ = self.vm.unregister_ioevent(kick, &self.notify_address(), queue as u32);
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

/// What a slot says that has no device: that it is one of virtio-mmio, with none (virtio 1.2, 4.2.2).
fn read_empty(offset: u64, data: &mut [u8]) {
    /// `virt`
    const MAGIC: u32 = 0x7472_6976;
    const VERSION: u32 = 2;
    let value = match u32::try_from(offset) {
        Ok(register::MAGIC_VALUE) => MAGIC,
        Ok(register::VERSION) => VERSION,
        _ => 0,
    };
    data.fill(0);
    if data.len() == size_of::<u32>() {
        data.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0xaa; length];
        read_empty(offset, &mut data);
        data
    }

    #[test]
    fn an_empty_slot_says_that_it_is_one() {
        // Offsets and values of virtio 1.2, 4.2.2: MagicValue, Version, DeviceID and Status.
        assert_eq!(empty(0x000, 4), b"virt");
        assert_eq!(empty(0x004, 4), [2, 0, 0, 0]);
        assert_eq!(empty(0x008, 4), [0; 4]);
        assert_eq!(empty(0x070, 4), [0; 4]);
        // Its registers are read as a whole.
        for length in [1, 2, 8] {
            assert_eq!(empty(0x000, length), vec![0; length]);
        }
        assert_eq!(empty(layout::SLOT_SIZE - 4, 4), [0; 4]);
    }

    #[test]
    fn an_address_is_a_register_of_a_slot() {
        for slot in [0, 1, layout::MAX_SLOTS - 1] {
            for register in [0, 0x50, layout::SLOT_SIZE - 1] {
                assert_eq!(place(layout::slot_address(slot) + register), (slot, register));
            }
        }
    }
}
